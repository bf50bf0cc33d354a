"""Files of tenants, keys and limits: what they come to, and everything that is wrong with them."""

import hashlib
from typing import Any

import pytest
from vitalis_serve.control.import_file import Refusal, read
from vitalis_serve.control.importing import Plan, Present, plan
from vitalis_serve.store.rates import Rates, Subject
from vitalis_serve.store.records import Key

NOW = 1_000_000
DIGEST = hashlib.sha256(b"vts_abcdefghijkl_of-another-system").hexdigest()
OLD = Key("oldoldoldold", "acme", "d" * 64, 1, name="app", old_digest="e" * 64, old_until=5)
GONE = Key("gonegonegone", "acme", "f" * 64, 1, name="past", revoked_at=2)
PRESENT = Present({"acme": "active", "left": "disabled"}, (OLD, GONE), {Subject("route", "reason")}, {"chat", "reason"})


def come_to(text: str, **options: Any) -> Plan:
    return plan(read(text.encode()), PRESENT, NOW, **options)


def refused(text: str, **options: Any) -> list[str]:
    """What is said of it, a sentence a line, without the first."""
    with pytest.raises(Refusal) as caught:
        come_to(text, **options)
    return caught.value.error().message.splitlines()[1:]


def test_rows_become_what_they_say() -> None:
    made = come_to(f"""
tenants:
  - name: relief
    notes: field hospitals
    limits: {{requests_per_minute: 600, tokens_per_day: 2_000_000}}
keys:
  - {{tenant: relief, name: 007, class: interactive, scopes: [inference, debug], routes: [chat], expires_in_days: 2}}
  - tenant: acme
    name: on
    digest: {DIGEST.upper()}
    id: abcdefghijkl
    limits:
      concurrent: 5
limits:
  - {{kind: route, name: chat, tokens_per_minute: 9}}
  - {{kind: key, name: oldoldoldold, concurrent: 1}}
""")
    assert [(t.name, t.created_at, t.notes) for t in made.tenants] == [("relief", NOW, "field hospitals")]
    first, second = made.keys
    assert (first.tenant, first.name, first.class_, first.scopes) == (
        "relief",
        "007",
        "interactive",
        ("inference", "debug"),
    )
    assert (first.routes, first.expires_at) == (("chat",), NOW + 2 * 86_400)
    ((of, whole),) = made.secrets
    assert of is first
    assert whole.startswith(f"vts_{first.id}_")
    assert hashlib.sha256(whole.encode()).hexdigest() == first.digest
    assert (second.id, second.name, second.digest, second.expires_at) == ("abcdefghijkl", "on", DIGEST, None)
    assert made.rates == {
        Subject("tenant", "relief"): Rates(requests_per_minute=600, tokens_per_day=2_000_000),
        Subject("key", "abcdefghijkl"): Rates(concurrent=5),
        Subject("route", "chat"): Rates(tokens_per_minute=9),
        Subject("key", "oldoldoldold"): Rates(concurrent=1),
    }


@pytest.mark.parametrize(("text", "place", "said"), [
    ("keys:\n- {tenant: acmee, name: x}", "2 (keys, row 1)", "there is no tenant 'acmee'; did you mean 'acme'?"),
    ("keys:\n- {tenant: left, name: x}", "2 (keys, row 1)", "tenant 'left' was revoked: it gets nothing new"),
    ("keys:\n- {tenant: acme, name: x, routes: [chatt]}", "2 (keys, row 1)",
     "routes: there is no route 'chatt'; did you mean 'chat'?"),
    ("keys:\n\n- {tenant: acme, name: x, scopes: [inferense]}", "3 (keys, row 1)",
     "scopes.0: there is no scope 'inferense'; did you mean 'inference'?"),
    ("keys:\n- {tenant: acme}", "2 (keys, row 1)", "name: this field is missing"),
    ("keys:\n- {tenant: acme, name: ''}", "2 (keys, row 1)", "name: give a name of 1 to 128 characters"),
    ("keys:\n- {tenant: acme, name: x, clas: batch}", "2 (keys, row 1)", "clas: there is no such field"),
    ("keys:\n- {tenant: acme, name: x, name: y}", "2 (keys, row 1)", "name is given twice (first on line 2)"),
    ("keys:\n- {tenant: acme, name: x, digest: abc}", "2 (keys, row 1)",
     "digest: give the SHA-256 of the whole key, 64 hex digits"),
    ("keys:\n- {tenant: acme, name: x, id: abcdefghijkl}", "2 (keys, row 1)",
     "id: give the digest with it; of a key that is made here the id is made too"),
    (f"keys:\n- {{tenant: acme, name: x, digest: {'f' * 64}}}", "2 (keys, row 1)",
     "digest: it is that of key gonegonegone of tenant 'acme'; make another secret"),
    (f"keys:\n- {{tenant: acme, name: x, digest: {'e' * 64}}}", "2 (keys, row 1)",
     "digest: it is that of key oldoldoldold of tenant 'acme'; make another secret"),
    (f"keys:\n- {{tenant: acme, name: x, digest: {DIGEST}, id: gonegonegone}}", "2 (keys, row 1)",
     "id: key gonegonegone of tenant 'acme' has it already"),
    ("keys:\n- {tenant: acme, name: x}\n- {tenant: acme, name: x}", "3 (keys, row 2)",
     "key acme/x stands on line 2 (keys, row 1) already"),
    ("tenants: [{name: b}, {name: b}]", "1 (tenants, row 2)", "tenant b stands on line 1 (tenants, row 1) already"),
    ("tenants:\n- name: left", "2 (tenants, row 1)",
     "tenant 'left' existed and was revoked; names are not given twice"),
    ("tenants:\n- {name: b, limits: {concurrent: 0}}", "2 (tenants, row 1)", (
        "limits.concurrent: 0 is no limit: give a whole number from 1 to 1000000000000000, or null for no "
        "limit of this kind; to shut someone out, revoke the key or tenant"
    )),
    ("limits:\n- {kind: tenant, name: acme}", "2 (limits, row 1)", (
        "give at least one of requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, "
        "tokens_per_month"
    )),
    ("limits:\n- {kind: rout, name: chat, concurrent: 1}", "2 (limits, row 1)",
     "kind: limits are those of a key, a tenant or a route, not of a 'rout'"),
    ("limits:\n- {kind: key, name: gonegonegone, concurrent: 1}", "2 (limits, row 1)",
     "there is no key 'gonegonegone'; there are: oldoldoldold"),
    ("limits:\n- {kind: tenant, name: acme, concurrent: 1}\n- {kind: tenant, name: acme, concurrent: 2}",
     "3 (limits, row 2)",
     "limits of tenant/acme stands on line 2 (limits, row 1) already"),
    ("tenants: x", "1", "tenants: give a list, each row with a dash before it"),
    ("tenants: [x]", "1 (tenants, row 1)", "give a row as `field: value`"),
    ("tenant: []", "1", "there is no section 'tenant'; did you mean 'tenants'?"),
    ("", "1", "give lists named tenants, keys, limits"),
    ("{}", "1", "there are no rows: give lists named tenants, keys, limits"),
    ("tenants: []", "1", "there are no rows: give lists named tenants, keys, limits"),
    ("- a", "1", "give lists named tenants, keys, limits"),
    ("tenants:\n  - name: [", "3", "this is not valid YAML: did not find expected node content"),
    ("tenants:\n  - &a {name: b}\n  - *a", "3", "this file takes no references (*): write the value out"),
    ("tenants: " + "[" * 200_000, "1", "this is nested too deeply to be a file of tenants"),
    ("- " * 200_000, "1", "this is nested too deeply to be a file of tenants"),
    ("tenants: [" + "{name: x}," * 20_001 + "]", "1", "more than 20000 rows: give them in several files"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text: str, place: str, said: str) -> None:
    assert refused(text) == [f"line {place}: {said}"]


def test_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        read(b"tenants:\n- {name: a}\n- {name: \xff}\n")
    assert caught.value.error().message.endswith("line 3: this is not UTF-8 text")
    assert refused("tenants:\n- {name: a\x00}")[0].startswith("line 1: this is not valid YAML: ")


def test_every_bad_row_is_named_and_only_those() -> None:
    """Nor is a key called bad for its tenant's row."""
    rows = [f"- {{tenant: acme, name: k{n}}}" for n in range(1000)]
    rows[17] = "- {tenant: acme, name: k17, class: urgent}"
    rows[500] = "- {tenant: broken, name: k500}"
    rows[999] = "- {tenant: acme, name: k1}"
    said = refused("\n".join(["tenants:", "- {name: broken, notess: x}", "keys:", *rows]))
    assert [line.partition(":")[0] for line in said] == [
        "line 2 (tenants, row 1)", "line 21 (keys, row 18)", "line 1003 (keys, row 1000)",
    ]  # fmt: skip


THERE = """
tenants: [{name: acme}]
keys: [{tenant: acme, name: app}, {tenant: acme, name: past}]
limits: [{kind: route, name: reason, concurrent: 3}]
"""


def test_what_is_there_already_is_an_error_that_names_it_or_is_skipped() -> None:
    """A name whose key was revoked is free."""
    with pytest.raises(Refusal) as caught:
        come_to(THERE)
    error = caught.value.error()
    assert error.code == "already_exists"
    assert error.message.splitlines() == [
        "nothing was imported: 3 of 4 rows are there already; leave them out, or skip what exists:",
        "line 2 (tenants, row 1): tenant 'acme' already exists",
        "line 3 (keys, row 1): key 'app' of tenant 'acme' already exists (id oldoldoldold)",
        "line 4 (limits, row 1): limits of route 'reason' already exist",
    ]
    made = come_to(THERE, skip_existing=True)
    assert (made.tenants, [key.name for key in made.keys], made.rates, made.skipped) == ([], ["past"], {}, 3)


def test_skipping_hides_nothing_that_is_wrong() -> None:
    assert refused(THERE + "more: []", skip_existing=True) == [
        "line 5: there is no section 'more'; there are: keys, limits, tenants"
    ]
