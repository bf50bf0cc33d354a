"""How many examples a property test tries: its own count in `make test`, no fewer than the profile's in `make soak`."""

from hypothesis import settings


def examples(own: int) -> int:
    """`own`, or what the profile `soak` of tests/conftest.py asks for where that is in force and more."""
    if settings.get_current_profile_name() != "soak":
        return own
    return max(own, settings.get_profile("soak").max_examples)
