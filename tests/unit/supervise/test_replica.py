"""A replica's task with an engine that somebody else runs."""

import asyncio
from dataclasses import dataclass

from vitalis_serve.fleet import Replica
from vitalis_serve.fleet import ReplicaState as State
from vitalis_serve.supervise.attendant import Traffic
from vitalis_serve.supervise.lifecycle import Policy, Start, Stop
from vitalis_serve.supervise.output import Output
from vitalis_serve.supervise.replica import Answer, Listing, ReplicaSpec, ReplicaTask, Sight


@dataclass
class Given:
    """An engine that answers, and says that its process was started at `started`."""

    started: float
    looks: int = 0

    async def looked_at(self) -> None:
        """Until it was told of at least once more."""
        wanted = self.looks + 2  # the next may be under way
        while self.looks < wanted:
            await asyncio.sleep(0.005)

    async def models(self, deadline: float) -> Listing:
        return Listing(("there",))

    async def answers(self, model: str, deadline: float) -> Answer:
        return Answer()

    async def look(self, deadline: float) -> Sight:
        self.looks += 1
        return Sight(True, started=self.started)


def test_a_process_that_was_started_later_is_another_one(tmp_path):
    """It came back between two looks. Where several answer at one address none is taken for new twice, and one that was
    replaced while it was drained did not die."""
    engine = Given(1000.0)

    async def run() -> None:
        async def traffic(_: str) -> Traffic:
            return Traffic()

        spec = ReplicaSpec(
            "engine-0", "unix:/nowhere", (), 4, engine, Policy(hung_seconds=8, owned=False), probe_seconds=0.01
        )
        output = Output(tmp_path / "log")
        task = ReplicaTask(
            spec, tree="t", run_folder=tmp_path, output=output, publish=lambda: shown.append(task.snapshot()),
            traffic=traffic,
        )  # fmt: skip
        running = asyncio.create_task(task.run())
        deadline = asyncio.get_running_loop().time() + 20
        task.post(Start())
        assert await task.until(lambda life: life.state is State.READY, deadline)
        await engine.looked_at()
        for started, incarnation in ((2000.0, 2), (3000.0, 3)):
            engine.started = started
            assert await task.until(
                lambda life, n=incarnation: (life.state, life.incarnation) == (State.READY, n), deadline
            )
        for _ in range(3):
            for engine.started in (1000.0, 3000.0):
                await engine.looked_at()
        assert (task.life.state, task.life.incarnation) == (State.READY, 3)
        task.post(Stop())
        assert await task.until(lambda life: life.state is State.STOPPED, deadline)
        engine.started = 4000.0
        task.post(Start())
        assert await task.until(lambda life: life.state is State.READY, deadline)
        await engine.looked_at()
        running.cancel()
        await asyncio.wait({running})

    shown: list[Replica] = []
    asyncio.run(run())
    seen = [(replica.state, replica.incarnation) for replica in shown]
    ready, suspect = State.READY, State.SUSPECT
    assert seen[:6] == [(State.STARTING, 1), (ready, 1), (suspect, 2), (ready, 2), (suspect, 3), (ready, 3)]
    assert seen[6:] == [(State.STOPPED, 3), (State.STARTING, 3), (ready, 3)]
    assert shown[2].detail == "another process answers there now"
