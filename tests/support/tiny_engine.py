"""The least that a supervisor can take for an engine: a real child process on a Unix socket, with bad habits.

Protocol, one line each way: `ask` -> `right`; `look` -> `RUNNING COUNTER`; `work N` sets what it says is running;
`freeze` stops the counter (otherwise it moves while work runs); `exit CODE`.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--load-seconds", type=float, default=0)
    parser.add_argument("--exit-at-start", type=int)
    parser.add_argument("--say", default="")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--below", action="store_true", help="with a child in its group and one in its own session")
    options = parser.parse_args()
    if options.say:
        print(options.say, flush=True)
    if options.exit_at_start is not None:
        sys.exit(options.exit_at_start)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.below:
        for own in (False, True):
            subprocess.Popen(["sleep", "1000"], start_new_session=own)
    await asyncio.sleep(options.load_seconds)
    state = {"running": 0, "frozen": False, "began": time.monotonic()}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word, _, argument = (await reader.readline()).decode().strip().partition(" ")
        if word == "exit":
            os._exit(int(argument))
        if word == "work":
            state["running"] = int(argument)
        if word == "freeze":
            state["frozen"] = True
        moves = state["running"] and not state["frozen"]
        counter = time.monotonic_ns() if moves else 0
        if not (word == "ask" and state["frozen"]):
            writer.write(b"right\n" if word == "ask" else f"{state['running']} {counter}\n".encode())
            await writer.drain()
            writer.close()

    server = await asyncio.start_unix_server(serve, options.socket)
    print("listening", flush=True)
    await server.serve_forever()


asyncio.run(main())
