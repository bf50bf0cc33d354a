"""The command line of the simulated engine.

It takes vLLM's flags where the supervisor sends them (an engine's argv must work unchanged) and adds its own. A flag
of vLLM's that changes nothing here is accepted and has no effect; one that neither knows is refused, or with
--lenient warned about.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from simulator.calibration import Unusable, load
from simulator.rules import Rule, parse_rule
from simulator.speed import PRESETS, Speed

VERSION = "0.32.0"


@dataclass(frozen=True, slots=True)
class Options:
    """Everything the process was told at its start. Sizes in tokens, durations in seconds."""

    models: tuple[str, ...] = ("gpt-oss-20b",)
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str = ""
    control: str = ""  # "host:port" of a second listener that no misbehaviour touches
    log_path: str = ""
    log_token_times: bool = False
    speed: Speed = PRESETS["sim-20b"]
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_tokens: int = 400_000
    block_tokens: int = 16
    max_model_len: int = 131_072
    max_num_queued_requests: int = 0
    scheduling_policy: str = "fcfs"
    prefix_caching: bool = True
    stream_interval: int = 1
    prompt_tokens_details: bool = False
    request_id_headers: bool = False
    api_key: str = ""
    keep_alive_seconds: float = 75
    load_seconds: float = 0
    load_mode: str = "port"
    rules: tuple[Rule, ...] = field(default=())


# Flags of vLLM's that the supervisor passes and that change nothing here; the number is how many values they take.
_WITHOUT_EFFECT = {
    "--tensor-parallel-size": 1,
    "--pipeline-parallel-size": 1,
    "--data-parallel-size": 1,
    "--gpu-memory-utilization": 1,
    "--kv-cache-memory-bytes": 1,
    "--kv-cache-dtype": 1,
    "--dtype": 1,
    "--seed": 1,
    "--load-format": 1,
    "--tool-call-parser": 1,
    "--reasoning-parser": 1,
    "--chat-template": 1,
    "--sse-keep-alive-interval": 1,
    "--shutdown-timeout": 1,
    "--middleware": 1,
    "--max-lora-rank": 1,
    "--max-loras": 1,
    "--max-num-queued-tokens": 1,
    "--generation-config": 1,
    "--override-generation-config": 1,
    "--distributed-executor-backend": 1,
    "--uvicorn-log-level": 1,
    "--disable-access-log-for-endpoints": 1,
    "--async-scheduling": 0,
    "--no-async-scheduling": 0,
    "--enable-auto-tool-choice": 0,
    "--enable-lora": 0,
    "--enforce-eager": 0,
    "--trust-remote-code": 0,
    "--disable-uvicorn-access-log": 0,
    "--disable-fastapi-docs": 0,
    "--disable-log-requests": 0,
    "--no-enable-log-requests": 0,
    "--enable-server-load-tracking": 0,
    "--enable-prefix-caching": 0,
    "--fail-on-environ-validation": 0,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulator",
        description="A simulated vLLM: its routes, streams, errors and metrics, without a model.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="serve MODEL", help="as in `vllm serve MODEL`; optional")
    where = parser.add_argument_group("where it listens")
    where.add_argument("--host", default="127.0.0.1")
    where.add_argument("--port", type=int, default=8000, help="0: a free one, printed")
    where.add_argument("--uds", default="", help="a Unix socket's path instead of host and port")
    where.add_argument("--control", default="", metavar="HOST:PORT", help="second listener, never misbehaves")
    where.add_argument("--keep-alive-seconds", type=float, default=75, help="idle connections close after this")
    model = parser.add_argument_group("the model")
    model.add_argument("--model", default="")
    model.add_argument("--served-model-name", nargs="+", default=[])
    model.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=PATH")
    model.add_argument("--max-model-len", type=int, default=131_072)
    model.add_argument("--api-key", default="")
    speed = parser.add_argument_group("how fast it is")
    speed.add_argument("--preset", choices=sorted(PRESETS), default="sim-20b")
    speed.add_argument("--calibration", default="", metavar="FILE", help="of a real engine, see `simulator calibrate`")
    speed.add_argument("--decode-step-ms", type=float, help="a step's time; of the preset or calibration")
    speed.add_argument("--per-sequence-ms", type=float, help="added to a step for each sequence that decodes")
    speed.add_argument("--per-context-token-ns", type=float, help="added for each token of its context")
    speed.add_argument("--prefill-tokens-per-second", type=float, help="0: prefill takes no time")
    speed.add_argument("--max-num-seqs", type=int, default=64)
    speed.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens a step may hold")
    speed.add_argument("--kv-cache-tokens", type=int, default=400_000)
    speed.add_argument("--block-size", type=int, default=16)
    speed.add_argument("--max-num-queued-reqs", type=int, default=0, help="0: no bound")
    speed.add_argument("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs")
    speed.add_argument("--no-enable-prefix-caching", action="store_true")
    shape = parser.add_argument_group("what it tells")
    shape.add_argument("--log", default="", metavar="PATH", help="one JSON line for each finished request")
    shape.add_argument("--log-token-times", action="store_true", help="with when every token was made, and written")
    shape.add_argument("--stream-interval", type=int, default=1, help="tokens an event; the first has one")
    shape.add_argument("--enable-prompt-tokens-details", action="store_true")
    shape.add_argument("--enable-request-id-headers", action="store_true")
    trouble = parser.add_argument_group("how it misbehaves")
    trouble.add_argument("--misbehave", action="append", default=[], metavar="KIND|JSON", help="see /sim/misbehave")
    trouble.add_argument("--load-seconds", type=float, default=0, help="it is loading for this long")
    trouble.add_argument("--load-mode", choices=("port", "health"), default="port", help="what is missing meanwhile")
    trouble.add_argument("--ignore-sigterm", action="store_true")
    trouble.add_argument("--lenient", action="store_true", help="warn of unknown flags instead of refusing them")
    for flag, values in _WITHOUT_EFFECT.items():
        if values:
            parser.add_argument(flag, help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    return parser


def _speed(arguments: argparse.Namespace, base: Speed) -> Speed:
    step, each, prefill = arguments.decode_step_ms, arguments.per_sequence_ms, arguments.prefill_tokens_per_second
    context = arguments.per_context_token_ns
    return Speed(
        base.decode_step_seconds if step is None else step / 1000,
        base.per_sequence_seconds if each is None else each / 1000,
        base.prefill_tokens_per_second if prefill is None else prefill,
        base.per_context_token_seconds if context is None else context / 1e9,
    )


def _calibrated(parser: argparse.ArgumentParser, argv: list[str]) -> Speed | None:
    """What the calibration that argv names says; its engine's options become defaults."""
    path = parser.parse_known_args(argv)[0].calibration
    if not path:
        return None
    try:
        calibration = load(Path(path))
    except Unusable as error:
        parser.error(str(error))
    known = msgspec.structs.asdict(calibration.engine)
    known["block_size"] = known.pop("block_tokens")
    parser.set_defaults(**{name: value for name, value in known.items() if value is not None})
    return calibration.speed


def _models(arguments: argparse.Namespace) -> tuple[str, ...]:
    positional = arguments.words[1] if arguments.words[:1] == ["serve"] and len(arguments.words) > 1 else ""
    served = tuple(arguments.served_model_name) or (arguments.model or positional or "gpt-oss-20b",)
    return served + tuple(module.split("=", 1)[0] for module in arguments.lora_modules)


def parse(argv: list[str]) -> Options:
    """The options that argv asks for. A flag or a rule that is wrong ends the process with code 2 and a sentence."""
    parser = _parser()
    calibrated = _calibrated(parser, argv)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and not arguments.lenient:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (--lenient ignores them)")
    for word in unknown:
        print(f"simulator: ignored {word}", file=sys.stderr, flush=True)
    rules = []
    for text in arguments.misbehave:
        try:
            rules.append(parse_rule(text.encode() if text.startswith("{") else msgspec.json.encode({"kind": text})))
        except (ValueError, msgspec.MsgspecError) as error:
            parser.error(f"--misbehave {text}: {error}")
    if arguments.ignore_sigterm:
        rules.append(Rule(kind="ignore_sigterm"))
    return Options(
        models=_models(arguments),
        host=arguments.host,
        port=arguments.port,
        uds=arguments.uds,
        control=arguments.control,
        log_path=arguments.log,
        log_token_times=arguments.log_token_times,
        speed=_speed(arguments, calibrated or PRESETS[arguments.preset]),
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_tokens=arguments.kv_cache_tokens,
        block_tokens=arguments.block_size,
        max_model_len=arguments.max_model_len,
        max_num_queued_requests=arguments.max_num_queued_reqs,
        scheduling_policy=arguments.scheduling_policy,
        prefix_caching=not arguments.no_enable_prefix_caching,
        stream_interval=max(1, arguments.stream_interval),
        prompt_tokens_details=arguments.enable_prompt_tokens_details,
        request_id_headers=arguments.enable_request_id_headers,
        api_key=arguments.api_key,
        keep_alive_seconds=arguments.keep_alive_seconds,
        load_seconds=arguments.load_seconds,
        load_mode=arguments.load_mode,
        rules=tuple(rules),
    )
