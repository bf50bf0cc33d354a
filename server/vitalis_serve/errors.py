"""Every error a client of the data plane or of control can be answered with, and the errors of start-up.

The table is design section 4's. `ServeError` carries the facts; turning them into bytes is the edge's work
(`gateway/replies.py`, `control/app.py`). Official clients retry 408, 409, 429 and 5xx by themselves, so an
error that must not be retried says so (`retry=False` becomes `x-should-retry: false`).
"""

from typing import Final

# code -> (status, type)
CODES: Final[dict[str, tuple[int, str]]] = {
    "invalid_json": (400, "invalid_request_error"),
    "invalid_request": (400, "invalid_request_error"),
    "unsupported_field": (400, "invalid_request_error"),
    "missing_key": (401, "authentication_error"),
    "invalid_key": (401, "authentication_error"),
    "expired_key": (401, "authentication_error"),
    "invalid_token": (401, "authentication_error"),
    "route_not_allowed": (403, "permission_error"),
    "scope_missing": (403, "permission_error"),
    "unknown_path": (404, "not_found_error"),
    "model_not_found": (404, "not_found_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "body_timeout": (408, "timeout_error"),
    "body_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "headers_too_large": (431, "invalid_request_error"),
    "requests_limit": (429, "rate_limit_error"),
    "tokens_limit": (429, "rate_limit_error"),
    "concurrency_limit": (429, "rate_limit_error"),
    "budget_spent": (429, "rate_limit_error"),
    "queue_full": (503, "overloaded_error"),
    "queue_timeout": (503, "overloaded_error"),
    "no_ready_engine": (503, "overloaded_error"),
    "draining": (503, "overloaded_error"),
    "ledger_unavailable": (503, "overloaded_error"),
    "limits_unavailable": (503, "overloaded_error"),
    "engine_unreachable": (502, "engine_error"),
    "engine_protocol": (502, "engine_error"),
    "first_token_timeout": (504, "timeout_error"),
    "idle_timeout": (504, "timeout_error"),
    "total_timeout": (504, "timeout_error"),
    "internal": (500, "internal_error"),
    # only from control
    "tenant_not_found": (404, "not_found_error"),
    "key_not_found": (404, "not_found_error"),
    "route_not_found": (404, "not_found_error"),
    "already_exists": (409, "conflict_error"),
    "tenant_disabled": (409, "conflict_error"),
    "key_closed": (409, "conflict_error"),
    "fleet_refused": (409, "conflict_error"),
    "authentication_failures": (429, "rate_limit_error"),
    "worker_unavailable": (503, "overloaded_error"),
    "supervisor_unavailable": (503, "overloaded_error"),
    "store_unavailable": (503, "storage_error"),
    "storage_full": (507, "storage_error"),
}

NEVER_RETRIED: Final = frozenset({"budget_spent", "first_token_timeout", "total_timeout"})


class ServeError(Exception):
    """One answer other than success: `code` from CODES, a sentence, the field at fault if there is one.

    `retry_after` is in seconds, 1 to 60, and only set where it was computed. `headers`: whole lines for the head of the
    answer, `name: value\\r\\n` each.
    """

    headers: bytes = b""

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        self.code = code
        self.status, self.type = CODES[code]
        self.message = message
        self.param = param
        self.retry_after = retry_after
        super().__init__(message)


class ConfigurationError(Exception):
    """Bad usage or configuration: one sentence naming file, key and remedy. The process exits with 2."""


class StartError(Exception):
    """Could not start (a port in use, a folder that cannot be written). Exits with 3: do not respawn."""
