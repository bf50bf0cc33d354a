"""What is configured: schema, sources and merging. `load` is all that most callers need."""

from vitalis_serve.settings.loading import Resolved, companion, load, resolve
from vitalis_serve.settings.schema import Settings

__all__ = ["Resolved", "Settings", "companion", "load", "resolve"]
