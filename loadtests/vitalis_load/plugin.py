"""What joins this to Locust: options, what happens when a test begins and ends, messages between master and workers,
signals. One Plugin a process; the locustfile makes it."""

import logging
import os
import resource
import signal
import sys
import time
from typing import Any

import gevent
import msgspec
from locust import events
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from vitalis_load import options, order, preflight, rows, runfolder
from vitalis_load.conductor import LAST_SECONDS, Conductor
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.meter import Batch
from vitalis_load.order import Begin, Order
from vitalis_load.prompts import Tokenisation
from vitalis_load.records import Record
from vitalis_load.scenario import SCALES, Scenario, load, read_files
from vitalis_load.session import Session

LEAD_SECONDS = 1.0  # from the order to begin to the beginning: every worker has heard it by then
PARENT_SECONDS = 1.0
SAYS = "vitalis-load: "  # begins the lines that `runs` reads
BEGIN, END, BATCH, TROUBLE = (f"vitalis_{word}" for word in ("begin", "end", "batch", "trouble"))

logger = logging.getLogger("vitalis_load")


class Plugin:
    """`session` is there where load is made, `conductor` where it is directed."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.conductor: Conductor | None = None
        self.environment: Any = None
        self.failure: LoadFailure | None = None
        self._main = gevent.getcurrent()
        self._begin: Begin | None = None
        self._order_now: Order | None = None
        self._zero = 0.0
        self._clients: list[str] = []  # workers by their number
        self._unsent: list[Batch] = []
        self._signals = 0
        self._interrupted = False
        self._users_before = 1
        self._parent = 0
        given = os.environ.get(order.VARIABLE, "")
        self._given = msgspec.json.decode(given, type=Order) if given else None
        rows.finer_times()
        events.init_command_line_parser.add_listener(_add_options)
        events.init.add_listener(self._init)
        events.test_start.add_listener(self._test_start)
        events.test_stopping.add_listener(self._test_stopping)
        events.test_stop.add_listener(self._test_stop)
        events.quitting.add_listener(self._quitting)
        events.worker_connect.add_listener(self._worker_connect)

    # which scenario

    @property
    def driven(self) -> bool:
        """Started by `runs`."""
        return self._given is not None

    def scenario(self) -> Scenario:
        """Raises LoadFailure."""
        if self._given is not None:
            return self._given.scenario_made()
        asked = self.environment.parsed_options
        return load(asked.scenario, scale=asked.scale, overrides=options.overrides(asked.set or ()))

    def _order(self) -> Order:
        """Of the options; asks the server for its models. Raises LoadFailure."""
        if self._given is not None:
            return self._given
        asked = self.environment.parsed_options
        chosen = self.scenario()
        target = preflight.watched(preflight.check(self._target(chosen), chosen, logger.info), logger.info)
        made = Order(
            scenario=chosen.resolved(), target=target, seed=asked.seed, salt=f"{time.time_ns():x}",
        )  # fmt: skip
        if asked.out:
            folder = runfolder.begin(made, asked.out, scale=asked.scale, processes=self._processes())
            made.folder = str(folder / "repeat-1")
            logger.info("what is measured goes to %s; `vitalis-load report` makes its report", folder)
        return made

    def _target(self, chosen: Scenario) -> Any:
        asked = self.environment.parsed_options
        return options.target(
            chosen, url=self.environment.host or "", model=asked.model, key_file=asked.key_file, key_env=asked.key_env,
            keys=asked.keys or (), data_folder=asked.data_folder, metrics_url=asked.metrics_url,
            metrics_token_env=asked.metrics_token_env, engines=asked.engine or (),
        )  # fmt: skip

    def _processes(self) -> int:
        runner = self.environment.runner
        return len(runner.clients.ready) if isinstance(runner, MasterRunner) else 1

    # the shape

    def tick(self) -> tuple[int, float] | None:
        """How many users there shall be now; None: the test is over."""
        if self.failure is not None:
            return None
        conductor = self.conductor
        if conductor is None:
            try:
                users = self._users(self.scenario(), 0.0)
            except LoadFailure as failure:
                self._fail(failure)
                return None
            return users, float(users)
        if conductor.due_to_end():
            conductor.finish()
            return None
        users = self._users(conductor.scenario, max(0.0, conductor.clock()))
        before, self._users_before = self._users_before, users
        return users, float(max(users, before))  # all of them at once, up or down

    def _users(self, chosen: Scenario, at: float) -> int:
        """Closed users; in an open loop one of Locust's users a process stands for all that comes there."""
        if not chosen.open:
            return max(1, chosen.users_at(at))
        return self.conductor.processes if self.conductor is not None else max(1, self._processes())

    # Locust's events

    def _init(self, environment: Any, runner: Any, **_: Any) -> None:
        self.environment = environment
        worker = isinstance(runner, WorkerRunner)
        forked = worker and bool(environment.parsed_options.processes)
        if worker:
            runner.register_message(BEGIN, self._on_begin)
            runner.register_message(END, self._on_end, concurrent=True)
        else:
            runner.register_message(BATCH, self._on_batch)
            runner.register_message(TROUBLE, self._on_trouble)
            try:
                chosen = self.scenario()
                if not self.driven:
                    self._target(chosen)
            except LoadFailure as failure:
                print(f"{SAYS}{failure.message}", file=sys.stderr, flush=True)
                sys.exit(failure.code)
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, self._worker_signalled if worker else self._signalled, forked)
        self._parent = os.getppid() if forked else (self._given.parent if self._given is not None else 0)
        if self._parent:
            gevent.spawn(self._watch_parent, forked)
        logging.getLogger("locust.runners").addFilter(_without_spawn_rates)
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection for each request in flight

    def _test_start(self, environment: Any, **_: Any) -> None:
        runner = environment.runner
        try:
            if isinstance(runner, WorkerRunner):
                self._start_worker()
            else:
                self._start_master(runner)
        except LoadFailure as failure:
            self._fail(failure)

    def _test_stopping(self, environment: Any, **_: Any) -> None:
        environment.stop_timeout = 0.0  # users that were to finish their requests on a way down are ended now
        if self.conductor is not None:
            self.conductor.finish()

    def _test_stop(self, **_: Any) -> None:
        if self.session is not None:
            self.session.finish()

    def _quitting(self, environment: Any, **_: Any) -> None:
        conductor = self.conductor
        if conductor is not None:
            conductor.finish()
        failure = self.failure or (conductor.failure if conductor is not None else None)
        if failure is not None:
            environment.process_exit_code = int(failure.code)
        elif self._interrupted:
            environment.process_exit_code = int(Exit.INTERRUPTED)
        elif self.driven:
            environment.process_exit_code = int(Exit.OK)

    # the master, or the only one

    def _start_master(self, runner: Any) -> None:
        made = self._order()
        zero = time.monotonic() + LEAD_SECONDS
        clients = [client.id for client in runner.clients.ready] if isinstance(runner, MasterRunner) else []
        processes = len(clients) if clients else 1
        self._order_now, self._zero, self._clients = made, zero, clients
        self.environment.stop_timeout = made.scenario_made().deadline_seconds
        self.conductor = Conductor(
            made, processes, zero, dismiss=self._dismiss, say=self._say, every=2.0 if self.driven else 10.0
        )
        if isinstance(runner, LocalRunner):
            self.session = self._make_session(order.begin(made, 0, 1, zero), made.target, self.conductor.take)
            self.session.start()
        for process, client in enumerate(clients):
            self._send_begin(client, process, processes)

    def _send_begin(self, client: str, process: int, processes: int) -> None:
        assert self._order_now is not None
        told = order.begin(self._order_now, process, processes, self._zero)
        self.environment.runner.send_message(BEGIN, msgspec.json.encode(told), client_id=client)

    def _worker_connect(self, client_id: str, **_: Any) -> None:
        """One that comes while a repeat is under way has users, and no part of an open loop."""
        conductor = self.conductor
        if conductor is None or conductor.finished or client_id in self._clients:
            return
        self._clients.append(client_id)
        self._send_begin(client_id, len(self._clients) - 1, conductor.processes)

    def _dismiss(self) -> None:
        runner = self.environment.runner
        if isinstance(runner, LocalRunner):
            if self.session is not None:
                gevent.spawn(self.session.finish)
        else:
            runner.send_message(END)

    def _on_batch(self, msg: Any, **_: Any) -> None:
        if self.conductor is not None:
            self.conductor.take(msgspec.msgpack.decode(msg.data, type=Batch))

    def _on_trouble(self, msg: Any, **_: Any) -> None:
        code, sentence = msg.data
        failure = LoadFailure(f"a worker cannot go on: {sentence}", Exit(code))
        if self.conductor is not None:
            self.conductor.fail(failure)

    def _say(self, line: str) -> None:
        if not self.driven:
            logger.info(line)
            return
        try:
            print(f"{SAYS}{line}", flush=True)
        except OSError:
            return  # nobody listens any more

    def _fail(self, failure: LoadFailure) -> None:
        """Ends the test with its sentence."""
        runner = self.environment.runner
        if isinstance(runner, WorkerRunner):
            runner.send_message(TROUBLE, [int(failure.code), failure.message])
            return
        self.failure = failure
        print(f"{SAYS}{failure.message}", file=sys.stderr, flush=True)
        if not self.environment.parsed_options.headless:
            gevent.spawn(runner.stop)
            self.failure = None

    # a worker

    def _on_begin(self, msg: Any, **_: Any) -> None:
        self._begin = msgspec.json.decode(msg.data, type=Begin)
        self.session = None

    def _start_worker(self) -> None:
        told = self._begin
        if told is None:
            raise LoadFailure("the master told this worker nothing of its part: start both with the same locustfile")
        chosen = Scenario.of(told.scenario)
        read_files(chosen)
        target = self._given.target if self._given is not None else self._target(chosen)
        target = msgspec.structs.replace(target, model=told.model)
        self.session = self._make_session(told, target, self._ship)
        self.session.start()

    def _on_end(self, **_: Any) -> None:
        if self.session is not None:
            self.session.finish()

    def _ship(self, batch: Batch) -> None:
        """What cannot be sent now is sent with the next."""
        self._unsent.append(batch)
        while self._unsent:
            try:
                self.environment.runner.send_message(BATCH, msgspec.msgpack.encode(self._unsent[0]))
            except Exception as error:  # noqa: BLE001  whatever the messages' library has: nothing measured is lost by it
                logger.warning("the master is not reached (%s): what was measured is kept for it", error)
                return
            self._unsent.pop(0)

    # both

    def _make_session(self, told: Begin, target: Any, hand_over: Any) -> Session:
        chosen = Scenario.of(told.scenario)
        plan = chosen.plan(
            told.seed,
            salt=told.salt,
            model=told.model,
            tokenisation=Tokenisation(told.per_word, told.overhead, told.frames),
        )
        return Session(
            chosen, plan, target, process=told.process, processes=told.processes, zero=order.zero_here(told),
            repeat=told.salt, hand_over=hand_over, heard=self._heard,
        )  # fmt: skip

    def _heard(self, record: Record) -> None:
        rows.show(self.environment, record)

    def _signalled(self, _forked: bool) -> None:
        """Ends the test in order; the second time at once."""
        self._signals += 1
        if self._signals > 1:
            os._exit(int(Exit.INTERRUPTED))
        running = self.conductor is not None and not self.conductor.finished
        headless = bool(self.environment.parsed_options.headless)
        self._interrupted = running or headless
        if self.conductor is not None:
            self.conductor.finish()
        elif headless:  # it waits for workers, which those that are there already must be told to do no longer
            self.environment.runner.quit()
            gevent.kill(self._main, SystemExit(int(Exit.INTERRUPTED)))
            return
        gevent.kill(self._main, KeyboardInterrupt)

    def _worker_signalled(self, forked: bool) -> None:
        """A master on this machine was told too and says when to end; for a while it is waited for."""
        if forked:
            gevent.spawn_later(LAST_SECONDS + 2, os._exit, int(Exit.INTERRUPTED))
            return
        if self.session is not None:
            self.session.finish()
        gevent.kill(self._main, KeyboardInterrupt)

    def _watch_parent(self, forked: bool) -> None:
        """No load without whoever asked for it."""
        while os.getppid() == self._parent:
            gevent.sleep(PARENT_SECONDS)
        if forked:
            os._exit(int(Exit.INTERRUPTED))
        if self.conductor is not None:
            self.conductor.stop("the program that had started it was killed")
        else:
            os._exit(int(Exit.INTERRUPTED))


def _add_options(parser: Any, **_: Any) -> None:
    add = parser.add_argument
    add("--scenario", default="short-chat", help="A scenario's name, or a YAML file.")
    add("--scale", default="full", choices=list(SCALES), help="full, or small for a CPU.")
    add("--set", action="append", metavar="FIELD=VALUE", help="Another value for a field.", include_in_web_ui=False)
    add("--model", default="", help="Default: the first that the server has.")
    add("--seed", type=int, default=1, help="The same seed asks the same.")
    for name, words in (
        ("--key-file", "A file with the key."),
        ("--key-env", "The variable that has the key."),
        ("--data-folder", "Of a running vitalis-serve; used where there is no --host."),
        ("--metrics-url", "Control's address, for the gateway's metrics."),
        ("--metrics-token-env", "The variable that has control's token."),
        ("--out", "A folder for what is measured; without it nothing is written."),
    ):
        add(name, default="", help=words, include_in_web_ui=False)
    for name, shape, words in (
        ("--keys", "TENANT=VARIABLE", "The variable that has the key of one of the scenario's tenants."),
        ("--engine", "NAME=ADDRESS", "Where an engine's /metrics is."),
    ):
        add(name, action="append", metavar=shape, help=words, include_in_web_ui=False)


def _without_spawn_rates(record: logging.LogRecord) -> bool:
    """All users at once is what a scenario may ask for."""
    return "spawn rate is very high" not in record.getMessage()
