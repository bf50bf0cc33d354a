"""What is load-tested: where it is, what opens it, what it is asked for, and where it tells of itself."""

import msgspec


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """`url`: http://HOST:PORT, https://HOST:PORT or unix:/PATH, a path prefix allowed (/v1 itself is not part of it).
    `keys`: by the scenarios' label of whose credential it is; "" is everybody else's. `metrics_url` and
    `metrics_token`: of the gateway's control. `engines`: by name, where each engine's /metrics is: http://... or
    unix:/PATH of its socket. `engine_pids`: of those that run on this machine, by the same names. `gateway`: False for
    an engine asked directly. `stamps`: whether times are the kernel's where it has them (stamps.py)."""

    url: str
    model: str = ""  # "": the first that it serves
    keys: dict[str, str] = {}
    metrics_url: str = ""
    metrics_token: str = ""
    engines: dict[str, str] = {}
    engine_pids: dict[str, int] = {}
    gateway: bool = True
    stamps: bool = True

    def key(self, label: str) -> str:
        """The credential for a scenario's label; that of everybody ("") where it has none of its own."""
        return self.keys.get(label) or self.keys.get("", "")

    def __repr__(self) -> str:
        return f"Target(url={self.url!r}, model={self.model!r}, keys of {sorted(self.keys)})"  # no secret in any log


def alike(one: Target, other: Target) -> tuple[Target, Target]:
    """Both measured by the same clock: where one is asked over a Unix socket, of which the kernel tells no times,
    those of the other are the loop's as well, or the one with the better clock would look quicker."""
    stamps = not any(target.url.startswith("unix:") for target in (one, other))
    return msgspec.structs.replace(one, stamps=stamps), msgspec.structs.replace(other, stamps=stamps)
