"""`python -m simulator calibrate RUN`: a recorded run of a real engine to figures that make the simulator like it."""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.reading import RepeatData, Repeats, read
from vitalis_load.records import Record

from simulator import fitting
from simulator.calibration import Calibration, Engine, Quality
from simulator.fitting import CannotTell, Fit, Served

HARMONY_LEAD = 3  # <|channel|>analysis<|message|>, which no client sees
_STEP_TOKENS = 2048  # a step's most tokens, where nothing says it
_UNACCOUNTED = 0.1  # of the engine's tokens, by somebody who is not in the records
_NAMES = {
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "kv_cache_size_tokens": "kv_cache_tokens",
    "kv_cache_tokens": "kv_cache_tokens",
    "kv_tokens": "kv_cache_tokens",
    "max_model_len": "max_model_len",
    "block_size": "block_tokens",
}


def served(record: Record, harmony: bool, interval: float) -> Served | None:
    """What one record tells; None where it tells nothing."""
    begin = record.first_token if record.stream else record.head
    tokens = record.completion_tokens
    ended = record.ended
    whole = not record.error and not record.unfinished
    if tokens is None:
        tokens, ended = round(record.chunks * interval), record.last_token or record.ended
    if not tokens or begin is None:
        return None
    hidden = 0
    if harmony and record.api != "completions" and (record.reasoning_tokens is None or record.reasoning_tokens):
        hidden = HARMONY_LEAD if interval < 1.5 else round(interval)
    hidden = min(hidden, tokens - 1)
    prompt = record.prompt_tokens or 0
    return Served(
        sent=record.sent,
        first=begin if record.stream else record.sent,
        ended=ended,
        tokens=tokens,
        prompt=max(0, prompt - (record.cached_tokens or 0)),
        context=prompt,
        hidden=hidden,
        usable=whole and record.stream and record.completion_tokens is not None and record.prompt_tokens is not None
        and tokens - hidden >= fitting.SHORTEST and ended > begin,
    )  # fmt: skip


def calibrate(run: Repeats, engine: Engine) -> tuple[Calibration, Fit]:
    """`engine`: what is known of it beside what the run says. Raises CannotTell."""
    for repeat in run.repeats:
        _one_engine(repeat)
    records = [record for repeat in run.repeats for record in repeat.records]
    ratios = sorted(
        record.completion_tokens / record.chunks
        for record in records
        if record.stream and record.completion_tokens and record.chunks > 1 and not record.error
    )
    interval = max(1.0, ratios[len(ratios) // 2]) if ratios else 1.0
    harmony = any(record.reasoning_tokens for record in records)
    notes = []
    if all(record.cached_tokens is None for record in records) and _cache_hits(run) > 0.02:
        notes.append(
            "the server did not say how much of each prompt was in its cache (--enable-prompt-tokens-details), and its "
            f"metrics say {100 * _cache_hits(run):.0f} %: prefill looks quicker than it is"
        )
    if any(_grown(repeat, "preemptions") for repeat in run.repeats):
        notes.append("the engine preempted: what it computed twice is not seen")
    known = _options(run.info.target)
    known |= {name: value for name, value in msgspec.structs.asdict(engine).items() if value is not None}
    told = [[one for record in repeat.records if (one := served(record, harmony, interval))] for repeat in run.repeats]
    fit = fitting.find(told, known.get("max_num_batched_tokens", _STEP_TOKENS))
    speed, info = fit.speed, run.info
    if "max_num_batched_tokens" not in known:
        notes.append(f"the engine's max_num_batched_tokens is not known: {_STEP_TOKENS} was taken")
    calibration = Calibration(
        decode_step_seconds=speed.decode_step_seconds,
        per_sequence_seconds=speed.per_sequence_seconds,
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        per_context_token_seconds=speed.per_context_token_seconds,
        overhead_seconds=fit.overhead_seconds,
        engine=Engine(**known),
        fit=Quality(
            requests=fit.requests, alone=fit.alone, batch=fit.batch, context=fit.context, explained=fit.explained,
            error_p50=fit.error_p50, error_p90=fit.error_p90, intervals=fit.intervals, notes=fit.notes + notes,
        ),
        run={
            "id": info.id, "model": info.model, "scenario": info.scenario.get("name", ""), "scale": info.scale,
            "began_at": info.began_at, "commit": info.commit, "versions": info.versions, "machine": info.machine,
        },
    )  # fmt: skip
    return calibration, fit


def _one_engine(repeat: RepeatData) -> None:
    """Raises CannotTell where the records cannot be all that one engine did."""
    names = {engine.name for sample in repeat.samples for engine in sample.engines}
    if len(names) > 1:
        raise CannotTell(
            f"repeat {repeat.number} was served by {len(names)} engines ({', '.join(sorted(names))}), and no record "
            "says which one it was: record a run against one engine"
        )
    made = _grown(repeat, "generation_tokens")
    seen = sum(record.completion_tokens or record.chunks for record in repeat.records)
    if made > 1000 and made > seen * (1 + _UNACCOUNTED):
        raise CannotTell(
            f"in repeat {repeat.number} the engine generated {made:.0f} tokens and the records have {seen}: somebody "
            "else used it, or warm-up is in the samples; record a run with the engine to itself"
        )


def _grown(repeat: RepeatData, field: str) -> float:
    """How much a total of the engine's grew while requests were sent."""
    last = max((record.ended for record in repeat.records), default=0.0)
    values = [getattr(e, field) for sample in repeat.samples if 0 <= sample.at <= last for e in sample.engines]
    return float(values[-1] - values[0]) if values else 0.0


def _cache_hits(run: Repeats) -> float:
    """The share of prompt tokens that the engine found in its cache."""
    queries = sum(_grown(repeat, "cache_queries") for repeat in run.repeats)
    return sum(_grown(repeat, "cache_hits") for repeat in run.repeats) / queries if queries else 0.0


def _options(target: Mapping[str, Any]) -> dict[str, int]:
    """The engine's options, wherever in it they are."""
    found: dict[str, int] = {}
    for key, value in target.items():
        name = _NAMES.get(key.strip("-").replace("-", "_"))
        if name is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            found.setdefault(name, int(value))
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                found = _options(inner) | found
    return found


def lines(calibration: Calibration) -> Iterable[str]:
    """For the terminal."""
    fit = calibration.fit
    assert fit is not None

    def within(name: str, factor: float, digits: int) -> str:
        low, high = fit.intervals[name]
        return f"  ({factor * max(0.0, low):.{digits}f} to {factor * high:.{digits}f})"

    yield f"from {fit.requests} answers, {fit.alone} of them of an idle engine; 95 % intervals in brackets"
    step = within("decode_step_seconds", 1000, 3)
    yield f"  decode step          {1000 * calibration.decode_step_seconds:10.3f} ms{step}"
    each = within("per_sequence_seconds", 1000, 4)
    yield f"  for each sequence    {1000 * calibration.per_sequence_seconds:10.4f} ms{each}"
    if calibration.per_context_token_seconds:
        each = within("per_context_token_seconds", 1e9, 2)
        yield f"  for each context token {1e9 * calibration.per_context_token_seconds:8.2f} ns{each}"
    low, high = fit.intervals["prefill_seconds_per_token"]
    span = f"  ({1 / high:.0f} to {1 / low:.0f})" if low > 0 else ""
    yield f"  prefill              {calibration.prefill_tokens_per_second:10.0f} tokens/s{span}"
    yield f"  around the engine    {1000 * calibration.overhead_seconds:10.1f} ms a request"
    yield (
        f"measured with {fit.batch[0]:.0f} to {fit.batch[1]:.0f} sequences at once and contexts of "
        f"{fit.context[0]:.0f} to {fit.context[1]:.0f} tokens; beyond that the figures are extrapolated"
    )
    yield (
        f"half of the answers took what the model says within {100 * fit.error_p50:.1f} %, nine of ten within "
        f"{100 * fit.error_p90:.1f} %; it explains {100 * fit.explained:.1f} % of the variance of their paces"
    )
    for note in fit.notes:
        yield f"note: {note}"


def main(argv: list[str]) -> int:
    """Exit code 0; 2 with one sentence where the run cannot be used or does not tell; 4 where it cannot write."""
    parser = argparse.ArgumentParser(
        prog="python -m simulator calibrate",
        description="Finds a decode step's time, what each sequence adds, and prefill's speed, from a recorded run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="a run's folder, or its result.json or run.json")
    parser.add_argument("-o", "--output", type=Path, help="where to write the calibration; calibration.json in the run")
    for name in ("--max-num-seqs", "--max-num-batched-tokens", "--kv-cache-tokens", "--max-model-len", "--block-size"):
        parser.add_argument(name, type=int, help="of the engine, where the run does not say it")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.run if arguments.run.is_dir() else arguments.run.parent
    output: Path = arguments.output or folder / "calibration.json"
    engine = Engine(
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_tokens=arguments.kv_cache_tokens,
        max_model_len=arguments.max_model_len,
        block_tokens=arguments.block_size,
    )
    try:
        if not arguments.run.exists():
            raise LoadFailure(f"{arguments.run} does not exist; give the folder of a run")
        calibration, _ = calibrate(read(folder), engine)
    except LoadFailure as failure:
        print(f"simulator: {failure.message}", file=sys.stderr)
        return failure.code
    except CannotTell as reason:
        print(f"simulator: {folder}: {reason}", file=sys.stderr)
        return Exit.BAD_INPUT
    for line in lines(calibration):
        print(line)
    try:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
    except OSError as error:
        print(f"simulator: {output} cannot be written ({error.strerror})", file=sys.stderr)
        return Exit.CANNOT_WRITE
    print(f"written to {output}; use it with --calibration, of `python -m simulator` or of `vitalis-load plan`")
    return Exit.OK
