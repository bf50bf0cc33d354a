"""Prefix hits and balance of each routing policy, as a markdown table: `python tests/simulation/routing_table.py`.

Conversations are drawn by Zipf's law; each turn sends the whole conversation so far (a system prompt that its tenant
shares, then turns) and is keyed by everything through the first user message. Engines have a real prefix cache of
400,000 tokens in blocks of 16, shared with what runs.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # pytest brings its own path
    ROOT = Path(__file__).parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "loadtests")]

from vitalis_serve.gateway.routing import affinity_key

from tests.simulation.world import CAPACITY, Draw, Request, World, in_window, ttft_p99

BLOCK = 16
TENANTS = 8
POLICIES = ("affinity", "least_tokens", "round_robin")


@dataclass(slots=True, eq=False)
class Conversation:
    number: int
    tenant: int
    tokens: int
    system: int
    turns: int = 0

    def blocks(self) -> tuple[int, ...]:
        """Hashes of its full blocks: the tenant's for the system prompt, its own after that."""
        shared = self.system // BLOCK
        mine = range(shared, self.tokens // BLOCK)
        return tuple(hash((self.tenant, i)) for i in range(shared)) + tuple(
            hash((self.tenant, self.number, i)) for i in mine
        )


def conversations(count: int, draw: Draw) -> list[Conversation]:
    return [Conversation(i, i % TENANTS, 512 + draw.prompt(), 512) for i in range(count)]


def requests(seed: int, replicas: int, load: float, seconds: float) -> list[Request]:
    """Turns of 150 conversations a replica; one that gets long ends, and a new one takes its place."""
    draw = Draw(seed)
    count = 150 * replicas
    live = conversations(count, draw)
    weights = [1 / rank for rank in range(1, count + 1)]
    fresh = count
    made = []
    for at in draw.arrivals(load * CAPACITY * replicas, seconds):
        (index,) = draw.random.choices(range(count), weights)
        talk = live[index]
        if talk.turns >= 8 or talk.tokens > 12_000:
            fresh += 1
            talk = live[index] = Conversation(fresh, talk.tenant, 512 + draw.prompt(), 512)
        output = draw.output()
        key = affinity_key(b"%d" % talk.tenant, b"%d" % talk.number)
        made.append(Request(at, f"t{talk.tenant}", talk.tokens, output, affinity=key, blocks=talk.blocks()))
        talk.turns += 1
        talk.tokens += output + draw.lognormal(40, 200, 2000)
    return made


@dataclass(frozen=True, slots=True)
class Line:
    replicas: int
    load: float
    policy: str
    hits: float  # prompt tokens found in a cache, of all
    imbalance: float  # busiest replica's work (prefilled and generated tokens) over the mean
    ttft_p99: float
    answered: float


def measure(replicas: int, load: float, policy: str, *, seed: int = 1, seconds: float = 40, warm: float = 10) -> Line:
    made = requests(seed, replicas, load, seconds)
    World(replicas, routing=policy, seed=seed).run(made, seconds + 30)
    steady = [r for r in in_window(made, warm, seconds) if r.first]
    work: Counter[str] = Counter({f"engine-{i}": 0 for i in range(replicas)})
    for request in steady:
        work[request.replica] += request.prompt - request.cached + 2 * request.output
    return Line(
        replicas,
        load,
        policy,
        sum(r.cached for r in steady) / sum(r.prompt for r in steady),
        max(work.values()) * replicas / sum(work.values()),
        ttft_p99(steady),
        len(steady) / max(1, len(in_window(made, warm, seconds))),
    )


def table(counts: tuple[int, ...] = (2, 4, 8, 16), loads: tuple[float, ...] = (0.7, 1.0, 1.3)) -> str:
    rows = [
        "| replicas | offered load | policy | prefix hits | max / mean load | TTFT p99 | answered |",
        "|---|---|---|---|---|---|---|",
    ]
    for replicas in counts:
        for load in loads:
            for policy in POLICIES:
                line = measure(replicas, load, policy)
                rows.append(
                    f"| {replicas} | {load:.1f} | {policy} | {line.hits:.0%} | {line.imbalance:.2f} "
                    f"| {line.ttft_p99 * 1e3:.0f} ms | {line.answered:.1%} |"
                )
    return "\n".join(rows)


if __name__ == "__main__":
    random.seed(0)
    print(table())
