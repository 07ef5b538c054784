"""The HTML page that holds a report: the document, tiles, tables, folded parts. Style and script are files beside it.

One file, nothing fetched: it opens from a disk without a network, and years later.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent

HATCH = """<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>
<pattern id="hatch" width="5" height="5" patternTransform="rotate(45)" patternUnits="userSpaceOnUse">
<rect width="2" height="5" fill="var(--hatch)"/></pattern></defs></svg>"""


def page(title: str, body: str) -> str:
    """The whole document, with report.css and report.js inside."""
    style = (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>\n"
        f"<body>{HATCH}<main>{body}</main>\n<script>{script}</script></body></html>\n"
    )


def tile(label: str, value: str, start: str = "") -> str:
    """One number, with the one it started from."""
    came = f'<span class="from">{html.escape(start)} → </span>' if start else ""
    return f'<div class="card tile"><b>{came}{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A table in a card; columns from `numbers_from` on are numbers. "" when there are no rows."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index >= numbers_from else ''}>{html.escape(cell)}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    if not body:
        return ""
    return f'<div class="card"><h3>{html.escape(title)}</h3><table><tr>{cells("th", columns)}</tr>{body}</table></div>'


def section(title: str, *parts: str, columns: bool = True) -> str:
    """A heading and its cards; "" when all of them are empty."""
    body = "".join(parts)
    if not body:
        return ""
    return f"<h2>{html.escape(title)}</h2>" + (f'<div class="grid2">{body}</div>' if columns else body)


def folded(title: str, body: str) -> str:
    """Something long that opens on a click."""
    return f'<details class="card"><summary>{html.escape(title)}</summary>{body}</details>' if body else ""
