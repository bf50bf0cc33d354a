"""What has to be had before an engine starts: `python -m vitalis_serve.preparation SETTINGS.json RESULT`.

A process of its own, because downloading and converting block for minutes and start processes themselves: below a
keeper all of it ends at once with Ctrl-C. Progress goes to standard output, the model's folder to RESULT; exit codes as
everywhere.
"""

import os
import sys
from pathlib import Path

from vitalis_serve.engines import flags, models
from vitalis_serve.engines.environment import cache_folder, engine_python
from vitalis_serve.engines.memory import architecture_of
from vitalis_serve.engines.placement import check_heads
from vitalis_serve.errors import ConfigurationError, StartError
from vitalis_serve.settings import Settings


def main(arguments: list[str]) -> int:
    source, result = (Path(argument) for argument in arguments)
    settings = Settings.model_validate_json(source.read_text())
    try:
        folder = _ensure(settings)
    except (ConfigurationError, StartError, OSError) as exc:
        sys.stdout.write(f"{exc}\n")
        return 2 if isinstance(exc, ConfigurationError) else 3
    result.write_text(str(folder))
    return 0


def _ensure(settings: Settings) -> Path:
    python, cache = engine_python(settings.engines, os.environ), cache_folder(os.environ)
    # Asking vLLM for its options takes seconds the first time, and a wrong one would cost a start that fails.
    if unasked := flags.check(settings.engines.engine_args, python, cache):
        _show(f"options of the engines are not checked: {unasked}")
    folder = models.ensure(settings.model, cache, python, _show)
    if settings.engines.tensor_parallel > 1:  # one engine a GPU runs whatever vLLM understands, described or not
        check_heads(settings, architecture_of(folder))
    return folder


def _show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
