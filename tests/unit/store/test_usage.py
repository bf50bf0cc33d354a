"""The ledger in the store, on SQLite and PostgreSQL: every request once, whatever is moved where."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.store.records import Key, Store, Tenant
from vitalis_serve.store.usage import DAY_MS, Mark, Moved, Range

from tests.support.postgres import Postgres
from tests.support.stores import Place

ALL = Range(0, 100_000)


def row(number: int, day: int = 100, **fields: Any) -> dict[str, Any]:
    """A request of 10 prompt and 5 completion tokens that ended `number` ms into the day."""
    ended = day * DAY_MS + number
    return {
        "id": f"{number:032x}",
        "began_ms": ended - 1,
        "ended_ms": ended,
        "day": day,
        "tenant": "acme",
        "key": "k1",
        "route": "chat",
        "model": "tiny",
        "api": "chat",
        "class_": "standard",
        "request_id": f"r{number}",
        "stream": True,
        "outcome": "ok",
        "code": "",
        "status": 200,
        "prompt_tokens": 10,
        "cached_tokens": 2,
        "completion_tokens": 5,
        "reasoning_tokens": 1,
        "prompt_estimated": False,
        "completion_estimated": False,
        **fields,
    }


async def totals(store: Store, wanted: Range = ALL, by: tuple[str, ...] = ()) -> Any:
    rows = await store.usage.sums(wanted, by, 1000)
    return [(*(r[name] for name in by), r["requests"], r["prompt_tokens"]) for r in rows]


def test_what_is_given_twice_is_stored_once(place: Place) -> None:
    async def work(store: Store) -> None:
        rows = [row(n) for n in range(2500)]
        assert await store.usage.add(rows, [Mark("h/a", None, 10)], 7) == 2500
        assert await store.usage.add([*rows[:3], row(3000), row(3000)], [Mark("h/a", 10, 20)], 8) == 1
        assert await totals(store) == [(2501, 25_010)]
        assert await store.usage.positions("h/") == {"h/a": (20, 8)}

    place.with_store(work)


def test_a_mark_that_is_elsewhere_keeps_the_whole_batch_out(place: Place) -> None:
    async def work(store: Store) -> None:
        await store.usage.add([row(1)], [Mark("h/a", None, 10), Mark("h/b", None, 5)], 7)
        for marks in (
            [Mark("h/a", None, 20)],
            [Mark("h/a", 5, 20)],
            [Mark("h/c", 0, 20)],
            [Mark("h/b", 5, 6), Mark("h/a", 11, 20)],
        ):
            with pytest.raises(Moved):
                await store.usage.add([row(2)], marks, 8)
        assert await totals(store) == [(1, 10)]
        assert await store.usage.positions("h/") == {"h/a": (10, 7), "h/b": (5, 7)}

    place.with_store(work)


def test_of_two_that_store_the_same_batch_at_once_one_does(place: Place) -> None:
    async def work(store: Store) -> None:
        batch = [row(n) for n in range(100)]
        marks = [Mark("h/a", None, 10)]
        ended = await asyncio.gather(*(store.usage.add(batch, marks, 7) for _ in range(5)), return_exceptions=True)
        assert sorted(map(str, ended)) == ["100", *["h/a"] * 4]
        assert await totals(store) == [(100, 1000)]

    place.with_store(work)


def test_marks_of_other_hosts_are_not_ours_and_old_ones_are_forgotten(place: Place) -> None:
    async def work(store: Store) -> None:
        await store.usage.add([], [Mark("h_/a", None, 1), Mark("h_/b", None, 2)], 100)
        await store.usage.add([], [Mark("hx/a", None, 3)], 50)
        assert await store.usage.positions("h_/") == {"h_/a": (1, 100), "h_/b": (2, 100)}
        await store.usage.forget(["h_/a"])
        await store.usage.forget_before(100)
        assert await store.usage.positions("h") == {"h_/b": (2, 100)}

    place.with_store(work)


def test_last_use_of_a_key_moves_on_only(place: Place) -> None:
    async def work(store: Store) -> None:
        async with store.change() as change:
            await change.add_tenant(Tenant("acme", 1))
            for key_id in ("k1", "k2"):
                await change.add_key(Key(key_id, "acme", key_id, 1))
        day = 100 * 86_400
        await store.usage.add([row(5000), row(9000), row(7000, key="oidc:azure")], [], 1)
        assert [k.last_used_at for k in await store.keys()] == [day + 9, None]
        await store.usage.add([row(8000), row(1000, key="k2")], [], 1)
        assert [k.last_used_at for k in await store.keys()] == [day + 9, day + 1]

    place.with_store(work)


def test_sums_by_each_group_and_within_a_range(place: Place) -> None:
    async def work(store: Store) -> None:
        rows = [
            row(1, day=100),
            row(2, day=101, outcome="client_gone", completion_estimated=True),
            row(3, day=101, key="k2", outcome="engine_error"),
            row(4, day=102, tenant="other", key="k3", outcome="cut", prompt_estimated=True, completion_estimated=True),
            row(5, day=102, route="reason", outcome="refused"),
        ]
        await store.usage.add(rows, [], 1)
        assert await totals(store, by=("tenant",)) == [("acme", 4, 40), ("other", 1, 10)]
        assert await totals(store, by=("day", "key")) == [
            (100, "k1", 1, 10), (101, "k1", 1, 10), (101, "k2", 1, 10), (102, "k1", 1, 10), (102, "k3", 1, 10),
        ]  # fmt: skip
        assert await totals(store, Range(101, 101), ("tenant",)) == [("acme", 2, 20)]
        assert await totals(store, Range(100, 102, key="k1"), ("route",)) == [("chat", 2, 20), ("reason", 1, 10)]
        assert await totals(store, Range(100, 102, tenant="other", route="chat")) == [(1, 10)]
        assert await totals(store, Range(103, 200)) == []
        assert await store.usage.sums(ALL, (), 9) == [
            {
                "requests": 5,
                "failed": 3,
                "estimated": 2,
                "prompt_tokens": 50,
                "cached_tokens": 10,
                "completion_tokens": 25,
                "reasoning_tokens": 5,
            }
        ]
        assert len(await store.usage.sums(ALL, ("day",), 2)) == 2

    place.with_store(work)


def test_roll_up_changes_no_sum_in_any_step_of_it(place: Place) -> None:
    """The single rows of old days go a few at a time; late ones of such a day are moved the next time."""

    async def work(store: Store) -> None:
        rows = [row(n, day=100 + n % 3, key=f"k{n % 2}", outcome="cut" if n % 5 == 0 else "ok") for n in range(30)]
        await store.usage.add(rows, [], 1)
        groups = ("day", "tenant", "key", "route")
        before = await store.usage.sums(ALL, groups, 100)
        moved = []
        while count := await store.usage.roll_up(102, most=7):
            moved.append(count)
            assert await store.usage.sums(ALL, groups, 100) == before
        assert moved == [7, 7, 6]
        assert {r["day"] for r in await store.usage.requests(ALL, 100)} == {102}
        await store.usage.add([row(1000, day=101), row(1001, day=99)], [], 1)
        assert await totals(store, by=("day",)) == [(99, 1, 10), (100, 10, 100), (101, 11, 110), (102, 10, 100)]
        assert await store.usage.roll_up(102) == 2
        assert await totals(store, by=("day",)) == [(99, 1, 10), (100, 10, 100), (101, 11, 110), (102, 10, 100)]
        assert await store.usage.drop_sums(101) == 3
        assert await totals(store, by=("day",)) == [(101, 11, 110), (102, 10, 100)]

    place.with_store(work)


def test_roll_up_beside_writers_and_another_roll_up_counts_each_once(place: Place) -> None:
    async def work(store: Store) -> None:
        async def write(first: int) -> None:
            for n in range(first, first + 200, 20):
                await store.usage.add([row(m) for m in range(n, n + 20)], [], 1)

        async def sum_up() -> None:
            for _ in range(30):
                await store.usage.roll_up(200, most=15)

        await asyncio.gather(write(0), write(1000), sum_up(), sum_up())
        while await store.usage.roll_up(200):
            pass
        assert await store.usage.requests(ALL, 10) == []
        assert await totals(store) == [(400, 4000)]

    place.with_store(work)


def test_single_requests_newest_first_page_by_page(place: Place) -> None:
    async def work(store: Store) -> None:
        # Several that ended in one millisecond lie across the pages' borders.
        rows = [row(n, ended_ms=100 * DAY_MS + n // 4) for n in range(20)]
        await store.usage.add(rows, [], 1)
        seen: list[dict[str, Any]] = []
        while page := await store.usage.requests(ALL, 3, (seen[-1]["ended_ms"], seen[-1]["id"]) if seen else None):
            seen += page
        assert [r["id"] for r in seen] == [f"{n:032x}" for n in reversed(range(20))]
        assert seen[0] == {("class" if name == "class_" else name): value for name, value in rows[19].items()}
        assert [r["id"] for r in await store.usage.requests(ALL, 9, request_id="r7")] == [f"{7:032x}"]
        assert await store.usage.requests(Range(100, 100, tenant="other"), 9) == []
        assert await store.usage.requests(Range(101, 101), 9) == []

    place.with_store(work)


def test_a_server_killed_between_batches_has_each_batch_whole_or_not_at_all(postgres: Postgres, tmp_path: Path) -> None:
    """What it loses of the last ones (it promises nothing here) it loses together with their marks."""
    place = Place(tmp_path, postgres.database())

    async def write(store: Store, until: int = 5) -> int:
        position: int | None = (await store.usage.positions("h/")).get("h/a", (None, 0))[0]
        for n in range(position or 0, until):
            await store.usage.add([row(n * 100 + m) for m in range(100)], [Mark("h/a", n or None, n + 1)], 1)
        return position or 0

    async def read(store: Store) -> Any:
        return await totals(store)

    place.with_store(write)
    postgres.kill()
    postgres.start()
    position = place.with_store(lambda store: write(store, 0))
    assert place.with_store(read) == [(position * 100, position * 1000)][: 1 if position else 0]
    place.with_store(lambda store: write(store, 10))
    assert place.with_store(read) == [(1000, 10_000)]
