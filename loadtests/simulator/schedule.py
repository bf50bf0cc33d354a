"""Which sequences an engine works on, step by step, as vLLM's scheduler would. Pure: no clock, no I/O.

How it works: `begin` chooses the next step's work (one token for every sequence that decodes, then prefill in order
within the token budget, admitting from the queue while there are seats and KV blocks) and returns how long the step
takes; `finish` applies it and returns the sequences that got a token. A step lasts the decode step, plus a little for
each sequence that decodes and for each token of their contexts, plus its prefill tokens over the prefill speed. A
sequence that finds no KV block makes the youngest (or least urgent) one start over; that step admits nobody.
"""

import heapq
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from simulator.blocks import Blocks, Holding
from simulator.options import Options


class State(IntEnum):
    """Where a sequence is."""

    WAITING = 0
    RUNNING = 1
    GONE = 2


class Sequence:
    """One request inside the engine. `width` tokens are generated at each step (n choices)."""

    __slots__ = (
        "arrived", "block_hashes", "cached", "computed", "decodes", "first_token", "generated", "held", "holding",
        "order", "owner", "preempted", "priority", "prompt_tokens", "scheduled", "state", "target", "width",
    )  # fmt: skip

    def __init__(
        self, owner: Any, prompt_tokens: int, target: int, *, priority: int = 0, width: int = 1,
        block_hashes: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.owner = owner
        self.prompt_tokens = prompt_tokens
        self.target = target  # steps that generate, not counting width
        self.priority = priority
        self.width = width
        self.block_hashes = block_hashes
        self.order = 0
        self.holding = Holding()
        self.preempted = 0  # how often
        self.cached = 0
        self.computed = 0  # tokens prefilled so far: of the prompt, after a preemption of the answer too
        self.decodes = False  # prefill is done
        self.generated = 0
        self.held = False  # a stalled stream: keeps its seat, gets no token
        self.state = State.GONE  # until it is added
        self.arrived = 0.0
        self.scheduled = 0.0
        self.first_token = 0.0

    @property
    def to_prefill(self) -> int:
        return self.prompt_tokens + self.generated * self.width

    @property
    def rank(self) -> tuple[int, int]:
        return (self.priority, self.order)


class Schedule:
    """All sequences of one engine, and its counters."""

    def __init__(self, options: Options) -> None:
        self._speed = options.speed
        self._max_num_seqs = options.max_num_seqs
        self._budget = options.max_num_batched_tokens
        self._block_tokens = options.block_tokens
        self._by_priority = options.scheduling_policy == "priority"
        self._caching = options.prefix_caching
        self.blocks = Blocks(options.kv_cache_tokens // options.block_tokens)
        self.running: dict[Sequence, None] = {}  # a dict for its order and its cheap removal
        self.waiting_count = 0
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._orders = 0
        self._decoding: list[Sequence] = []
        self._prefilling: list[tuple[Sequence, int]] = []
        self.step_tokens = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cache_queries = 0
        self.cache_hits = 0

    def add(self, sequence: Sequence) -> None:
        self._orders += 1
        sequence.order = self._orders
        if not self._by_priority:
            sequence.priority = 0
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its seat and its blocks are free at once."""
        if sequence.state is State.RUNNING:
            del self.running[sequence]
            self.blocks.release(sequence.holding)
        elif sequence.state is State.WAITING:
            self.waiting_count -= 1
        sequence.state = State.GONE

    def has_work(self) -> bool:
        return self.waiting_count > 0 or any(not sequence.held for sequence in self.running)

    def begin(self, now: float) -> float:
        """Chooses the next step's work. Returns the step's length in seconds; 0 work is possible."""
        budget, preemptions = self._budget, self.preemptions
        self._decoding = []
        size = self._block_tokens
        for sequence in list(self.running):
            if sequence.held or not sequence.decodes or sequence.state is not State.RUNNING:
                continue
            # nearly always there is room in the last block: this line runs for every token
            room = sequence.holding.count * size
            if sequence.prompt_tokens + (sequence.generated + 1) * sequence.width <= room or self._make_room(sequence):
                self._decoding.append(sequence)
                budget -= sequence.width
        if self.preemptions > preemptions:
            self._decoding = [sequence for sequence in self._decoding if sequence.state is State.RUNNING]
        self._prefilling = list(self._prefill(budget, now, admit=self.preemptions == preemptions))
        prefill_tokens = sum(tokens for _, tokens in self._prefilling)
        self.step_tokens = prefill_tokens + sum(sequence.width for sequence in self._decoding)
        speed = self._speed
        seconds = speed.decode_step_seconds + speed.per_sequence_seconds * len(self._decoding)
        if speed.per_context_token_seconds:
            seconds += speed.per_context_token_seconds * sum(sequence.to_prefill for sequence in self._decoding)
        if speed.prefill_tokens_per_second:
            seconds += prefill_tokens / speed.prefill_tokens_per_second
        return seconds

    def finish(self) -> list[Sequence]:
        """Ends the step that `begin` chose. Returns the sequences that got a token, `generated` already raised."""
        got = [one for one in self._decoding if one.state is State.RUNNING and not one.held]
        for sequence, tokens in self._prefilling:
            if sequence.state is not State.RUNNING:
                continue
            sequence.computed += tokens
            if sequence.block_hashes and self._caching:
                whole = min(sequence.computed, sequence.prompt_tokens) // self._block_tokens
                self.blocks.name(sequence.holding, sequence.block_hashes[:whole])
            if sequence.computed >= sequence.to_prefill:
                sequence.decodes = True
                if not sequence.generated:
                    self.prompt_tokens += sequence.prompt_tokens
                if not sequence.held:
                    got.append(sequence)
        for sequence in got:
            sequence.generated += 1
            self.generation_tokens += sequence.width
        self._decoding = []
        self._prefilling = []
        return got

    def kv_usage(self) -> float:
        """The share of the pool that live sequences hold."""
        return self.blocks.used / self.blocks.total if self.blocks.total else 0.0

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.waiting_count += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for one more token, if need be by preempting; False where the sequence itself had to go."""
        while not self.blocks.grow(sequence.holding, self._needed(sequence.to_prefill + sequence.width)):
            victim = max(self.running, key=lambda candidate: candidate.rank)
            if victim is sequence and len(self.running) == 1:
                return True  # alone and still too big: the pool is a soft bound for one
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preempted += 1
        del self.running[sequence]
        self.blocks.release(sequence.holding)
        sequence.computed = 0
        sequence.decodes = False
        self._enqueue(sequence)

    def _prefill(self, budget: int, now: float, admit: bool) -> Iterator[tuple[Sequence, int]]:
        for sequence in self.running:
            if not sequence.decodes and budget > 0:
                tokens = min(sequence.to_prefill - sequence.computed, budget)
                budget -= tokens
                yield sequence, tokens
        while admit and budget > 0 and len(self.running) < self._max_num_seqs:
            admitted = self._admit()
            if admitted is None:
                return
            admitted.scheduled = admitted.scheduled or now
            tokens = min(admitted.to_prefill - admitted.computed, budget)
            budget -= tokens
            yield admitted, tokens

    def _admit(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting:
            return None
        sequence = self._waiting[0][1]
        found = self._find(sequence)
        held = sequence.block_hashes[:found]
        if not self.blocks.begin(sequence.holding, self._needed(sequence.to_prefill), held) and self.running:
            return None
        heapq.heappop(self._waiting)
        self.waiting_count -= 1
        sequence.state = State.RUNNING
        self.running[sequence] = None
        sequence.computed = len(sequence.holding.names) * self._block_tokens
        if self._caching and not sequence.preempted:
            self.cache_queries += sequence.prompt_tokens
            self.cache_hits += sequence.computed
            sequence.cached = sequence.computed
        return sequence

    def _find(self, sequence: Sequence) -> int:
        """How many leading blocks need not be computed."""
        if not self._caching or not sequence.block_hashes:
            return 0
        # the last token is always computed: its logits are what is sampled from
        return self.blocks.found(sequence.block_hashes, (sequence.prompt_tokens - 1) // self._block_tokens)
