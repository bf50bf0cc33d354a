"""What keys, tenants and routes may use: requests and tokens per minute, requests at once, tokens per day and month.
Pure.
"""

import msgspec


class Rates(msgspec.Struct, frozen=True):
    """Limits of one key, tenant or route; None: no limit of that kind. All above 0."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
