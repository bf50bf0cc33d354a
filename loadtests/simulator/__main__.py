"""`python -m simulator`."""

import sys

import uvloop

from simulator.options import Options, parse
from simulator.server import Server


async def _serve(options: Options) -> None:
    await Server(options).run()


def main(argv: list[str]) -> int:
    """Runs until SIGTERM. Exit code 0; 2 for bad usage; 3 where it cannot listen or open its log."""
    options = parse(argv)
    try:
        uvloop.run(_serve(options))
    except OSError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
