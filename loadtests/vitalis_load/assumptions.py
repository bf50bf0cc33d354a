"""What a plan stands on, in sentences."""

from simulator.calibration import Calibration
from simulator.options import Options
from simulator.virtual import HEADROOM

from vitalis_load.planning import Setting, measured_seconds


def assumptions(setting: Setting) -> list[str]:
    """About the engine, the traffic, the gateway and the fleet."""
    known = setting.calibration
    return [_engine(setting.options), _known(known, setting.options), *_traffic(setting)]


def _engine(options: Options) -> str:
    speed = options.speed
    each = f"{1000 * speed.decode_step_seconds:.2f} ms + {1000 * speed.per_sequence_seconds:.3f} ms a sequence"
    if speed.per_context_token_seconds:
        each += f" + {1e9 * speed.per_context_token_seconds:.1f} ns a token of context"
    return (
        f"an engine's step takes {each}; it prefills {speed.prefill_tokens_per_second:.0f} tokens/s, runs at most "
        f"{options.max_num_seqs} sequences at once with {options.max_num_batched_tokens} tokens a step, and holds "
        f"{options.kv_cache_tokens} tokens of KV"
    )


def _known(known: Calibration | None, options: Options) -> str:
    if known is None:
        return (
            "that is the preset sim-20b, an imagined engine: give the --calibration of a run on yours "
            "(`python -m simulator calibrate RUN`) before money depends on it"
        )
    where = " ".join(str(known.run[name]) for name in ("model", "scenario", "id") if known.run.get(name))
    text = f"its speed was measured ({where or 'run unknown'})"
    if known.fit is None:
        return text
    low, high = known.fit.batch
    text += f" with {low:.0f} to {high:.0f} sequences at once, and is off by {known.fit.error_p90:.1%} at p90"
    if options.max_num_seqs > 1.5 * high:
        text += f"; beyond {high:.0f} it is extrapolated, and up to {options.max_num_seqs} may run"
    return text


def _traffic(setting: Setting) -> list[str]:
    traffic = setting.traffic
    margin, seconds = 1 + traffic.margin, measured_seconds(traffic)
    spare = f"; {traffic.spare} more to spare" if traffic.spare else ", and none is to spare for restarts and failures"
    when = (
        f"{traffic.rate:g} requests/s x {traffic.peak_factor:g} (peak) x {margin:g} (margin) = "
        f"{traffic.planned_rate:.4g} requests/s, at random (Poisson), for {seconds:.0f} s after "
        f"{traffic.warmup_seconds:.0f} s of warm-up, {traffic.repeats} times with other seeds: the worst counts"
    )
    who = (
        "lengths are drawn independently of each other; every answer reaches its length; nobody gives up, is refused "
        "or comes again"
    )
    gateway = (
        "one gateway: by class and then in order; shared prefixes go to the same replica while it has a seat, the rest "
        f"to the least busy; a tenth of the seats is for emergencies, {HEADROOM:.0%} of the KV for growing answers"
    )
    return [when, who, gateway, f"all replicas are up and equally fast{spare}"]
