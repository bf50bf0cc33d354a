"""vitalis-load under Locust: web UI, headless, --processes, --master and --worker, as Locust has them.

    locust -f loadtests/locustfile.py --scenario short-chat --host http://127.0.0.1:8080 --key-file var/first-key

The scenario says how many users there are and what they ask, or when requests are due whoever has answered before.
"""

from collections.abc import Callable

import gevent
from locust import LoadTestShape, User, task
from vitalis_load.plugin import Plugin

plugin = Plugin()
REST_SECONDS = 0.5


class ScenarioUser(User):
    """One closed user of the scenario; of an open loop, one for all that comes in this process."""

    def on_start(self) -> None:
        self._session = None
        self._pause = 0.0

    def on_stop(self) -> None:
        if self._session is not None:
            self._session.users -= 1

    def wait_time(self) -> float:
        return self._pause

    @task
    def turn(self) -> None:
        session = plugin.session
        if session is None or session.over.is_set():
            gevent.sleep(REST_SECONDS)
            return
        if session is not self._session:
            self._session, self._turn = session, 0
            session.users += 1
            self._number, self._connection = session.user_number(), session.connection()
        if session.scenario.open:
            session.over.wait()
            return
        self._pause = session.turn(self._number, self._turn, self._connection)
        self._turn += 1


class ScenarioShape(LoadTestShape):
    """As many users as the scenario has at each moment, until everything was answered."""

    def reset_time(self) -> None:
        super().reset_time()
        if plugin.conductor is not None and plugin.conductor.finished:
            plugin.conductor = None

    def tick(self) -> tuple[int, float] | None:
        return plugin.tick()


_: Callable[[], tuple[int, float] | None] = ScenarioShape().tick
