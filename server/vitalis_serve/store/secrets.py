"""Keys: how one is made and what of it may be kept.

A key is `vts_<id>_<secret>`. The id (12 characters) is public: it stands in listings and logs. The secret has
238 bits, so that a plain SHA-256 of the whole key is enough: there is nothing to guess from a list.
"""

import hashlib
import secrets
import string
from typing import Final, NamedTuple

ID_LENGTH: Final = 12
SECRET_LENGTH: Final = 40
_BASE62: Final = string.digits + string.ascii_letters


class NewKey(NamedTuple):
    """`key` is shown once and never stored."""

    id: str
    key: str
    digest: str


def new_key(key_id: str = "") -> NewKey:
    """A key that no one has seen; with `key_id` another secret for a key that is there."""
    key_id = key_id or _random(ID_LENGTH)
    key = f"vts_{key_id}_{_random(SECRET_LENGTH)}"
    return NewKey(key_id, key, digest(key))


def digest(key: str) -> str:
    """Hex SHA-256 of the whole key, as the store and the workers know it."""
    return hashlib.sha256(key.encode()).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))
