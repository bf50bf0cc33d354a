"""What tenants cost: Python's share of a request with a token, limits and the ledger, beside a static key and none of
them: `python tests/bench/tenants.py`. Without sockets, as `hot_path.py`; all variants in turn, in one run.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

from tests.bench.hot_path import KEY, Bench, best  # noqa: E402
from tests.support.worker import snapshot  # noqa: E402

MANY = 10**9
RATES = {
    "requests_per_minute": MANY, "tokens_per_minute": MANY, "concurrent": 10_000, "tokens_per_day": 10**15,
    "tokens_per_month": 10**15,
}  # fmt: skip
ISSUER = "https://login.example.org"
SECRET = rsa.generate_private_key(public_exponent=65_537, key_size=2048)


def token() -> str:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": "vitalis-serve", "sub": "app", "tenant": "test", "iat": now, "exp": now + 3600}
    return jwt.encode(claims, SECRET, "RS256", headers={"kid": "one"})


def document(*, limited: bool) -> bytes:
    public = RSAAlgorithm.to_jwk(SECRET.public_key(), as_dict=True) | {"kid": "one", "use": "sig", "alg": "RS256"}
    issuer = {
        "name": "bench",
        "issuer": ISSUER,
        "audience": ["vitalis-serve"],
        "algorithms": ["RS256"],
        "keys": [public],
    }
    rates = RATES if limited else None
    key = {"id": "testkey00000", "key": KEY, "tenant": "test", "rates": rates}
    return snapshot(keys=[key], tenants=[{"name": "test", "rates": rates}], issuers=[issuer])


async def measure() -> None:
    folder = Path(tempfile.mkdtemp())
    ledger = {"spool_folder": str(folder / "spool"), "spent_path": str(folder / "spent.json")}
    variants: dict[str, Bench] = {
        "a key, and none of them": Bench(document(limited=False)),
        "ledger": Bench(document(limited=False), **ledger),
        "limits (key and tenant, five each)": Bench(document(limited=True)),
        "a token": Bench(document(limited=False), token()),
        "a token, limits of its tenant, ledger": Bench(document(limited=True), token(), **ledger),
        "a key, limits of it and its tenant, ledger": Bench(document(limited=True), **ledger),
    }
    await asyncio.sleep(0.2)
    found: dict[str, Any] = dict.fromkeys(variants, 1e9)
    for _ in range(20):
        for name, bench in variants.items():
            found[name] = min(found[name], best(10, 50, bench.requests))
            await asyncio.sleep(0)
    none = found["a key, and none of them"]
    for name, cost in found.items():
        print(f"{name:44} {cost:7.2f} us a request, {cost - none:+6.2f}")
    for bench in variants.values():
        bench.close()


if __name__ == "__main__":
    asyncio.run(measure())
