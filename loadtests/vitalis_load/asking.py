"""What a run sends: which request is due when, and its document. The same seed gives the same run, in every process."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from vitalis_load import prompts
from vitalis_load.arrivals import Constant, Poisson, Trace, Users, due
from vitalis_load.lengths import Length
from vitalis_load.prompts import Shared, Text, Tokenisation, dice_of
from vitalis_load.tasks import Message, Output, Task, document

if TYPE_CHECKING:
    from vitalis_load.scenario import Scenario

_ORDER = "Write a long text about all of this."
_NO_LENGTH = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is due `at` seconds after the repeat began; `index` counts all of them, over all processes.

    Of a task with turns it is the first turn. The lengths are a trace's, 0 where the task says them.
    """

    at: float
    task: Task
    index: int
    prompt_tokens: int = _NO_LENGTH
    output_tokens: int = _NO_LENGTH


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `key`: label of the credential, "" for the run's own. `pause`: seconds to wait after its answer."""

    task: Task
    api: str
    key: str
    document: dict[str, Any]
    turn: int  # of its conversation, from 0
    wanted_tokens: int | None  # of the answer; None where the model ends when it likes
    prompt_tokens: int  # about so many; 0 for the user's own prompts
    words: int  # of text made here, for `prompts.fit`; 0 for the user's own
    pause: float = 0.0


class Plan:
    """A scenario with its dice thrown. Documents are made one at a time, when they are asked for."""

    def __init__(self, scenario: "Scenario", seed: int, salt: str, model: str, tokenisation: Tokenisation) -> None:
        self.scenario = scenario
        self.tokenisation = tokenisation
        self._seed, self._salt, self._model = seed, salt, model
        self._shared = [task for task in scenario.tasks if task.arrivals is None]
        self._weights = list(accumulate(task.weight for task in self._shared))
        self._places: dict[int, tuple[int, int, Task]] = {}  # user -> conversation, its first request, its task

    # when

    def arrivals(self) -> Iterator[Arrival]:
        """Of an open loop, in the order of time; nothing of closed users."""
        streams = [self._stream("", self.scenario.arrivals)] if self._shared else []
        streams += [self._stream(task.name, task.arrivals) for task in self.scenario.tasks if task.arrivals]
        together = heapq.merge(*streams, key=lambda row: row[0])
        for index, (at, task, prompt, output) in enumerate(together):
            yield Arrival(at, task, index, prompt, output)

    def split(self, processes: int, process: int) -> Iterator[Arrival]:
        """Those of one process (from 0) of so many; all of them together are `arrivals()`."""
        return islice(self.arrivals(), process, None, processes)

    def _stream(
        self, name: str, arrivals: Users | Constant | Poisson | Trace | None
    ) -> Iterator[tuple[float, Task, int, int]]:
        own = next((task for task in self.scenario.tasks if task.name == name), None)
        if isinstance(arrivals, Trace):
            yield from self._replay(arrivals, own)
        elif arrivals is not None and not isinstance(arrivals, Users):
            fixed = arrivals.seed if isinstance(arrivals, Poisson) else None
            dice = dice_of(self._seed if fixed is None else fixed, "arrivals", name)
            moments = due(arrivals, self.scenario.rate(arrivals), self.scenario.course(own), dice)
            for number, at in enumerate(moments):
                yield at, own or self._task("arrival", number), _NO_LENGTH, _NO_LENGTH

    def _replay(self, trace: Trace, own: Task | None) -> Iterator[tuple[float, Task, int, int]]:
        named = {task.name: task for task in self.scenario.tasks}
        end = self.scenario.seconds
        for number, asked in enumerate(self.scenario.trace(trace)):
            if asked.at / trace.speed >= end:
                return
            task = own or named.get(asked.task) or self._task("arrival", number)
            yield asked.at / trace.speed, task, asked.prompt_tokens, asked.output_tokens

    def _task(self, *what: object) -> Task:
        """By weight."""
        if len(self._shared) == 1:
            return self._shared[0]
        return dice_of(self._seed, "task", *what).choices(self._shared, cum_weights=self._weights)[0]

    # what

    def request(self, arrival: Arrival, turn: int = 0, answers: Sequence[str] = ()) -> Ask:
        """Of an open loop. A task with `turns` is asked for turn 0, 1, 2 ... of the same arrival.

        Args:
            answers: The texts of its conversation so far, "" or none where they are not kept: text made here stands
                in for them then.
        """
        lengths = (arrival.prompt_tokens, arrival.output_tokens)
        return self._ask(arrival.task, arrival.index, turn, answers, lengths, ("arrival", arrival.index))

    def next_request(self, user: int, turn: int, answers: Sequence[str] = ()) -> Ask:
        """Of closed user `user` (a number of its own over all processes), request number `turn` of all it makes.

        Args:
            answers: The texts this user had so far, the latest last; those of the present conversation are used.
        """
        conversation, first, task = self._place(user, turn)
        number = turn - first
        said = answers[len(answers) - number :] if 0 < number <= len(answers) else ()
        who = ("user", user, conversation)
        return self._ask(task, user * 1_000_003 + conversation, number, said, (_NO_LENGTH, _NO_LENGTH), who)

    def probes(self) -> list[Ask]:
        """Requests of different lengths for one token each, whose usage tells `fit_each` how the model counts."""
        task = self.scenario.tasks[0].model_copy(
            update={"stream": False, "output": Output(max_tokens=1), "turns": 1, "think_seconds": None}
        )
        first, *others = dict.fromkeys(each.api for each in self.scenario.tasks)
        lengths = [*((first, tokens) for tokens in (60, 160, 300)), *((api, 160) for api in others)]
        return [
            self._ask(task.model_copy(update={"api": api, "prompt": Text(tokens=Length(min=tokens, max=tokens))}),
                      number, 0, (), (_NO_LENGTH, _NO_LENGTH), ("probe", number))
            for number, (api, tokens) in enumerate(lengths)
        ]  # fmt: skip

    def _place(self, user: int, turn: int) -> tuple[int, int, Task]:
        conversation, first, task = self._places.get(user) or (0, 0, self._task("user", user, 0))
        if turn < first:
            conversation, first, task = 0, 0, self._task("user", user, 0)
        while turn >= first + task.turns:
            conversation, first = conversation + 1, first + task.turns
            task = self._task("user", user, conversation)
        self._places[user] = (conversation, first, task)
        return conversation, first, task

    def _ask(
        self, task: Task, index: int, turn: int, answers: Sequence[str], lengths: tuple[int, int],
        who: tuple[object, ...],
    ) -> Ask:  # fmt: skip
        if isinstance(task.prompt, prompts.File):
            return self._from_file(task, task.prompt, index, who)
        counting = self.tokenisation.of(task.api)
        talk = _Talk(task, counting, (self._seed, self._salt, *who), (self._seed, *who), lengths)
        system = self._prefix(task, task.prompt, who)
        messages: list[Message] = []
        for number in range(turn + 1):
            messages.append({"role": "user", "content": talk.question(number, bool(system))})
            if number < turn:
                answer = answers[number] if number < len(answers) else ""
                messages.append({"role": "assistant", "content": answer or talk.answer(number)})
        words = len(system.split()) + sum(len(str(message["content"]).split()) for message in messages)
        expected = round(counting.overhead + counting.per_word * words)
        limit, wanted, exact = talk.limit(turn)
        made = document(task, self._model, system, messages, limit, exact)
        return Ask(task, task.api, task.tenant, made, turn, wanted, expected, words, self._pause(task, turn, who))

    def _prefix(self, task: Task, prompt: Text | Shared, who: tuple[object, ...]) -> str:
        if not isinstance(prompt, Shared):
            return ""
        group = dice_of(self._seed, *who, "group").randrange(prompt.groups)
        words = max(1, round(prompt.prefix_tokens / self.tokenisation.per_word))
        return prompts.unique(words, self._seed, self._salt, task.name, "prefix", group)

    def _pause(self, task: Task, turn: int, who: tuple[object, ...]) -> float:
        think: Length | None = task.think_seconds
        if think is None or turn == task.turns - 1:
            arrivals = self.scenario.arrivals
            think = arrivals.think_seconds if isinstance(arrivals, Users) else think
        return think.draw(dice_of(self._seed, *who, turn, "pause")) if think is not None else 0.0

    def _from_file(self, task: Task, file: prompts.File, index: int, who: tuple[object, ...]) -> Ask:
        lines = prompts.read_file(file.path)
        place = index if file.order == "cycle" else dice_of(self._seed, *who, "line").randrange(len(lines))
        line = lines[place % len(lines)]
        limit, wanted, exact = _Talk(
            task, self.tokenisation, (), (self._seed, *who), (0, line.output_tokens or 0)
        ).limit(0)
        messages = list(line.messages) or [{"role": "user", "content": line.prompt}]
        made = document(task, self._model, "", messages, limit, exact)
        return Ask(task, task.api, task.tenant, made, 0, wanted, 0, 0, self._pause(task, 0, who))


class _Talk:
    """The texts and lengths of one conversation. Lengths do not depend on the run's salt, texts do."""

    def __init__(
        self, task: Task, tokenisation: Tokenisation, text: tuple[object, ...], dice: tuple[object, ...],
        lengths: tuple[int, int],
    ) -> None:  # fmt: skip
        self._task, self._tokenisation, self._text, self._dice = task, tokenisation, text, dice
        self._prompt_tokens, self._output_tokens = lengths

    def question(self, turn: int, prefixed: bool) -> str:
        dice = dice_of(*self._dice, turn, "prompt")
        prompt = self._task.prompt
        spread = prompt.tokens if isinstance(prompt, (Text, Shared)) else Length(min=1, max=1)
        if turn and self._task.follow_up_tokens is not None:
            spread = self._task.follow_up_tokens
        tokens = self._prompt_tokens if self._prompt_tokens and not turn else spread.whole(dice)
        # what the chat's frame costs is the first message's, unless a prefix stands before it
        words = self._tokenisation.words(tokens + (self._tokenisation.overhead if turn or prefixed else 0))
        room = words - len(_ORDER.split())
        asked = prompts.unique(room, *self._text, turn) if room > 0 else prompts.label(*self._text, turn)
        return f"{asked} {_ORDER}" if room > 0 else asked

    def answer(self, turn: int) -> str:
        """Stands in for one that was not kept."""
        return prompts.unique(
            max(1, round(self.limit(turn)[0] / self._tokenisation.per_word)), *self._text, turn, "answer"
        )

    def limit(self, turn: int) -> tuple[int, int | None, bool]:
        """The most tokens of this turn's answer, those wanted, and whether exactly these."""
        output = self._task.output
        if self._output_tokens:
            return self._output_tokens, self._output_tokens, output.exact
        if output.tokens is None:
            return output.max_tokens or 1, None, False
        tokens = output.tokens.whole(dice_of(*self._dice, turn, "output"))
        return tokens, tokens, output.exact
