"""Who may use control: its own token, and what a peer that guesses gets.

The right token is always let in, whoever else behind the same address guesses: with 238 bits there is
nothing to guess, and everyone on this machine shares one address. The limit keeps failures from filling the
log.
"""

import hmac
from collections import OrderedDict
from pathlib import Path

from vitalis_serve.control.files import kept_secret
from vitalis_serve.errors import ServeError


def control_token(path: Path) -> str:
    """The token in `path`, made on the first start. Raises StartError if it can be neither read nor made."""
    return kept_secret(path, "vtc_")


class Failures:
    """How many failures each peer has left: a token bucket a peer, for the last `peers` peers that failed.

    Times are seconds of a clock that never goes back.
    """

    def __init__(self, burst: float = 10, per_second: float = 1, peers: int = 1024) -> None:
        self._burst = burst
        self._per_second = per_second
        self._peers = peers
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def count(self, peer: str, now: float) -> float:
        """One more failure: 0 if it is within the limit, else the seconds until the next one would be."""
        left, since = self._buckets.pop(peer, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        wait = 0.0 if left >= 1 else (1 - left) / self._per_second
        self._buckets[peer] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > self._peers:
            self._buckets.popitem(last=False)
        return wait


class Access:
    """Answers whether an `Authorization` header opens control."""

    def __init__(self, token: str, failures: Failures) -> None:
        self._expected = f"bearer {token}".encode()
        self._failures = failures

    def check(self, authorization: bytes | None, peer: str, now: float) -> None:
        """Raises ServeError `missing_key`, `invalid_key` or `authentication_failures`."""
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if hmac.compare_digest(scheme.lower() + b" " + token.strip(), self._expected):
            return
        wait = self._failures.count(peer, now)
        if wait:
            raise ServeError(
                "authentication_failures",
                "too many requests without the right token came from this address",
                retry_after=max(1.0, wait),
            )
        if not token:
            raise ServeError(
                "missing_key",
                "control needs `Authorization: Bearer` with the token in the file control.token",
            )
        raise ServeError("invalid_key", "this is not control's token: it stands in the file control.token")
