"""`python -m simulator`, and `python -m simulator calibrate RUN`."""

import sys

from simulator.options import parse


def main(argv: list[str]) -> int:
    """Runs until SIGTERM. Exit code 0; 2 for bad usage; 3 where it cannot listen or open its log."""
    # imported where they are used: to calibrate needs no server, and a server nothing of the load tests
    if argv[:1] == ["calibrate"]:
        from simulator.calibrate import main as calibrate

        return calibrate(argv[1:])
    options = parse(argv)
    import uvloop

    from simulator.server import Server

    async def serve() -> None:
        await Server(options).run()

    try:
        uvloop.run(serve())
    except OSError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
