#!/usr/bin/env python3
"""Writes the figures of docs/ beside itself: `python3 docs/figures/draw.py`. Standard library only; a test holds the
committed files, and the arrows of replica-states.svg, to this file and to the code."""

from html import escape
from pathlib import Path

INK, SOFT, ALARM = "#33404d", "#51606e", "#8a2f2f"
GREY, BLUE, GREEN, SAND, ROSE = "#f4f6f8", "#dbe7f3", "#e3f1e1", "#f6ecd9", "#f3e1e8"
TIP = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto-start-reverse"'
HALO = 'stroke="white" stroke-width="3" paint-order="stroke" stroke-opacity="0.85"'
Point = tuple[float, float]

SERVING = ("ready", "busy", "suspect", "hung")
DOWN = ("backoff", "failed")


class Figure:
    def __init__(self, width: int, height: int, title: str) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="tip" {TIP}><path d="M0 1 L9 5 L0 9 Z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            '<g font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
        ]

    def box(self, x: float, y: float, width: float, height: float, text: str, fill: str = GREY) -> None:
        """Around its centre; the first line is bold."""
        left, top = x - width / 2, y - height / 2
        self.parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="7" '
            f'fill="{fill}" stroke="{SOFT}"/>'
        )
        self.text(x, y, text, size=13, bold_first=True)

    def group(self, left: float, top: float, width: float, height: float, text: str) -> None:
        self.parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="9" fill="none" stroke="{SOFT}" '
            'stroke-dasharray="2 3"/>'
        )
        self.text(left + width / 2, top + 13, text, size=11)

    def text(
        self, x: float, y: float, text: str, *, size: int = 11, colour: str = INK, anchor: str = "middle",
        bold_first: bool = False,
    ) -> None:  # fmt: skip
        lines = text.split("\n")
        first = y - (len(lines) - 1) * size * 0.6 + size * 0.35
        for i, line in enumerate(lines):
            weight = ' font-weight="bold"' if bold_first and i == 0 and len(lines) > 1 else ""
            self.parts.append(
                f'<text x="{x:g}" y="{first + i * size * 1.25:g}" font-size="{size}" fill="{colour}" '
                f'text-anchor="{anchor}"{weight} {HALO}>{escape(line)}</text>'
            )

    def arrow(
        self, *points: Point, dashed: bool = False, both: bool = False, colour: str = SOFT,
        states: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
    ) -> None:  # fmt: skip
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        extra = ' stroke-dasharray="6 4"' if dashed else ""
        extra += ' marker-start="url(#tip)"' if both else ""
        if states:
            extra += f' data-from="{" ".join(states[0])}" data-to="{" ".join(states[1])}"'
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.3" marker-end="url(#tip)"{extra}/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</g>", "</svg>", ""])


def processes() -> Figure:
    f = Figure(980, 500, "The processes of one host and what connects them")
    f.arrow((205, 90), (342, 90), dashed=True)
    f.text(273, 68, "run/supervisor.sock:\nfleet commands")
    f.arrow((120, 118), (190, 226), dashed=True)
    f.text(118, 186, "HTTP 8081:\ntenants, keys,\nmetrics")
    f.arrow((430, 130), (275, 226), both=True)
    f.text(322, 172, "socket pair:\nheartbeats, fleet")
    f.arrow((490, 130), (490, 226), both=True)
    f.text(500, 178, "socket pair: heartbeats,\nfleet, drain; the data\nsocket is handed down", anchor="start")
    f.arrow((580, 130), (752, 226), both=True)
    f.text(722, 172, "socket pair:\nstop, kill, exited")
    f.arrow((640, 90), (940, 90), (940, 400), (904, 400), dashed=True)
    f.text(848, 76, "probes")
    f.arrow((342, 262), (397, 262), dashed=True, both=True)
    f.text(370, 322, "run/control.sock:\nkeys and routes out,\nmetrics back")
    f.arrow((370, 303), (370, 270), colour="#a9b3bd")
    f.arrow((800, 298), (800, 362))
    f.text(808, 330, "starts, reaps, kills", anchor="start")
    f.arrow((520, 298), (520, 400), (696, 400), dashed=True)
    f.text(608, 386, "run/engine-0.sock")
    f.text(608, 414, "requests")
    f.arrow((800, 438), (800, 456))
    f.arrow((440, 400), (470, 300), dashed=True)
    f.text(432, 360, "HTTP 8080")
    f.text(120, 90, "the command line,\nPrometheus, people\nwith control.token", size=12)
    f.text(410, 418, "clients: OpenAI's, Anthropic's, any HTTP", size=12)
    f.box(491, 90, 296, 78, "supervisor\nvitalis-serve up, or gateway\nowns processes, replica states, orders", BLUE)
    f.box(240, 262, 200, 70, "control\nadmin API on loopback\nowns vitalis.db", SAND)
    f.box(500, 262, 200, 70, "worker-0\nthe gateway, port 8080\nowns requests and slots", GREEN)
    f.box(800, 262, 194, 70, "keeper\none for each engine\nnothing below it outlives it", GREY)
    f.box(800, 400, 204, 74, "engine-0\nvLLM's API server,\nin its own environment", ROSE)
    f.box(790, 474, 330, 34, "vLLM's EngineCore and tensor-parallel workers", ROSE)
    return f


def request() -> Figure:
    steps = (
        ("bytes from the client\nprotocol.py: httptools, limits and deadlines of head and body", "400  408  431"),
        ("path and method\nthe allow-list of paths.py", "404  405  415"),
        ("key\nits SHA-256, looked up in the snapshot of keys", "401  403  503"),
        ("body\ntop level decoded, policy applied, route found, written back once", "400  403  404  408  413  503"),
        ("admission\na slot at the replica with the fewest requests, or the queue", "503 with Retry-After"),
        ("pool\nan idle connection to that engine, or a new one", "502"),
        ("hold\nthe head and the first events are kept until a token comes", "502  503  504, or the engine's 4xx"),
        ("relay\nbytes as they come, one write for each read", "the API's own error event"),
        ("release, once\nconnection, slot, counts, access log", ""),
    )
    f = Figure(880, len(steps) * 66 + 20, "A request's way through one worker")
    for i, (step, refusal) in enumerate(steps):
        y = 40 + i * 66
        if i:
            f.arrow((360, y - 43), (360, y - 23))
        if refusal:
            f.arrow((580, y), (622, y), colour="#b06a6a")
            f.text(630, y, refusal, size=12, colour=ALARM, anchor="start")
        f.box(360, y, 440, 46, step, GREEN if 0 < i < len(steps) - 1 else GREY)
    admission, pool, hold = (40 + i * 66 for i in (4, 5, 6))
    f.arrow((140, hold), (100, hold), (100, admission), (139, admission), dashed=True)
    f.arrow((140, pool), (101, pool), dashed=True)
    f.text(94, pool - 2, "failed before\na token:\nanother replica,\nat most\n3 tries", anchor="end")
    return f


def replica_states() -> Figure:
    f = Figure(900, 430, "States of a replica")
    one = lambda a, b: ((a,), (b,))  # noqa: E731
    f.arrow((125, 60), (274, 60), states=one("planned", "starting"))
    f.arrow((60, 80), (60, 266), states=one("planned", "stopped"))
    f.arrow((386, 60), (579, 60), states=one("starting", "ready"))
    f.text(478, 46, "the model answered right")
    f.arrow((300, 80), (300, 240), states=(("starting",), DOWN))
    f.text(292, 206, "exited, or not\nready in time", anchor="end")
    f.arrow((362, 240), (362, 82), states=(DOWN, ("starting",)))
    f.text(355, 160, "after the\npause, or\nrestart", anchor="end")
    f.arrow((386, 74), (645, 284), both=True, states=one("starting", "draining"))
    f.parts[-1] = f.parts[-1].replace(
        'data-from="starting" data-to="draining"', 'data-from="starting draining" data-to="draining starting"'
    )
    f.text(452, 148, "stop; restart", anchor="end")
    f.arrow((600, 214), (446, 262), states=(SERVING, DOWN))
    f.text(528, 276, "exited, or hung and killed")
    f.arrow((710, 214), (710, 279), states=(SERVING, ("draining",)))
    f.text(718, 246, "drain, restart, scale, stop", anchor="start")
    f.arrow((644, 300), (446, 300), states=(("draining",), DOWN))
    f.text(540, 314, "crashed meanwhile")
    f.arrow((710, 320), (710, 390), (80, 390), (80, 311), states=one("draining", "stopped"))
    f.text(400, 378, "nothing in flight, or drain_seconds over; then ended within stop_seconds")
    f.arrow((215, 290), (126, 290), states=(DOWN, ("stopped",)))
    f.text(170, 276, "drain, stop")
    f.arrow((105, 268), (276, 80), states=one("stopped", "starting"))
    f.text(150, 176, "restart,\nscale")
    f.arrow((672, 90), (738, 90), both=True)
    f.parts[-1] = f.parts[-1].replace("/>", ' data-from="ready busy" data-to="busy ready"/>')
    f.text(706, 60, "all slots taken")
    f.arrow((636, 110), (656, 150), both=True)
    f.parts[-1] = f.parts[-1].replace("/>", ' data-from="ready suspect hung" data-to="suspect ready"/>')
    f.text(636, 136, "no proof\nof health", anchor="end")
    f.arrow((776, 110), (690, 150), both=True)
    f.parts[-1] = f.parts[-1].replace("/>", ' data-from="busy suspect hung" data-to="suspect busy"/>')
    f.arrow((717, 172), (759, 172), states=one("suspect", "hung"))
    f.text(738, 203, "none for hung_seconds")
    f.group(570, 22, 300, 192, "serving: ready and busy take new requests")
    f.group(216, 240, 230, 90, "down")
    f.box(75, 60, 100, 40, "planned")
    f.box(330, 60, 112, 40, "starting")
    f.box(626, 90, 90, 40, "ready", GREEN)
    f.box(786, 90, 90, 40, "busy", GREEN)
    f.box(666, 172, 100, 40, "suspect", SAND)
    f.box(806, 172, 90, 40, "hung", SAND)
    f.box(275, 290, 90, 40, "backoff", ROSE)
    f.box(385, 290, 90, 40, "failed", ROSE)
    f.box(710, 300, 130, 40, "draining", BLUE)
    f.box(75, 290, 100, 40, "stopped")
    return f


FIGURES = {"processes.svg": processes, "request.svg": request, "replica-states.svg": replica_states}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name(name).write_text(str(draw()))
