"""Hypothesis: the same examples every time in `make test`, new and more of them in `make soak`. And the fixtures of
servers that whole sessions share."""

from hypothesis import settings

from tests.support.loading import load_python
from tests.support.postgres import postgres, postgres_url
from tests.support.stores import place

__all__ = ["load_python", "place", "postgres", "postgres_url"]

# No deadline: it is wall-clock time, and a busy machine's pause is not a defect.
settings.register_profile("test", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("test")
