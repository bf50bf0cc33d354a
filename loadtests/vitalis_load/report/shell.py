"""The frame of every page: one file, whose own policy lets it load nothing at all."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent


def document(title: str, body: Iterable[str], *, data: bytes = b"") -> bytes:
    """A whole page. `data`: JSON that the page carries along, to be saved from it."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # "</" would end the script element
    carried = data.decode().replace("</", "<\\/")
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>\n</head>\n<body>",
            *body,
            f'<script type="application/json" id="data">{carried}</script>' if data else "",
            f"<script>{script}</script>\n</body>\n</html>\n",
        )
    ).encode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def section(name: str, title: str, content: str, about: str = "") -> str:
    """Nothing where there is nothing to show. `about` is one line of plain text under the heading."""
    if not content:
        return ""
    said = f'<p class="about">{escape(about)}</p>' if about else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{said}{content}</section>'


def banner(kind: str, title: str, sentences: Sequence[str] = ()) -> str:
    """`kind`: good, bad, warn or note."""
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    symbol = {"good": "✓", "bad": "✕", "warn": "!", "note": "i"}[kind]
    rest = f"<ul>{said}</ul>" if said else ""
    return (
        f'<div class="banner {kind}" role="note"><span class="symbol" aria-hidden="true">{symbol}</span>'
        f"<div><strong>{escape(title)}</strong>{rest}</div></div>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """Cells are markup already; a head that begins with "#" is of numbers, which stand to the right."""
    names = "".join(_cell("th", head.lstrip("#"), head) for head in heads)
    body = "".join(
        f"<tr>{''.join(_cell('td', cell, head) for head, cell in zip(heads, row, strict=True))}</tr>" for row in rows
    )
    if not body:
        return ""
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(tag: str, content: str, head: str) -> str:
    kind = ' class="number"' if head.startswith("#") else ""
    return f"<{tag}{kind}>{content}</{tag}>"


def save(name: str) -> str:
    """A button that saves the JSON that the page carries; page.js shows it."""
    return f'<button id="save" type="button" data-name="{escape(name)}" hidden>Save as JSON</button>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, as plain text; what is empty is left out."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{rows}</dl>' if rows else ""
