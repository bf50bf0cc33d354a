"""What is configured: schema, sources and merging. `load` is all that most callers need."""

from vitalis_serve.settings.loading import Resolved, load, resolve
from vitalis_serve.settings.schema import Settings

__all__ = ["Resolved", "Settings", "load", "resolve"]
