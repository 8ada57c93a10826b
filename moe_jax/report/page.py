"""The page as HTML: escaping, tables, pictures, and the frame around the sections."""

import base64
import html
from collections.abc import Iterable, Sequence

CSS = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#1c2126;background:#fff;
max-width:1080px;margin:0 auto;padding:16px 20px 60px}
h1{font-size:25px;line-height:1.25;margin:12px 0 2px;overflow-wrap:anywhere}
h2{font-size:20px;margin:40px 0 6px;padding-top:10px;border-top:2px solid #e3e6ea}
h3{font-size:16px;margin:22px 0 4px}
p,ul{margin:6px 0;max-width:80ch}
.note{color:#566069;font-size:13.5px}
nav{display:flex;flex-wrap:wrap;gap:4px 14px;margin:10px 0}
a{color:#1f5fa8}
img{max-width:100%;height:auto;display:block;margin:8px 0}
figure{margin:0;overflow-x:auto}
figcaption{color:#566069;font-size:13.5px;max-width:80ch}
.wide{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:13.5px}
th,td{padding:3px 10px;border-bottom:1px solid #e3e6ea;text-align:left;vertical-align:top;white-space:nowrap}
th{color:#3b444c;font-weight:600;background:#f6f7f9}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td.w{white-space:normal;min-width:30em}
code,.t{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:12.5px}
.t{background:#eef1f4;border-radius:3px;padding:0 3px;unicode-bidi:isolate;white-space:pre}
.k{color:#6b757e;font-size:11.5px;margin-right:9px}
details{margin:6px 0}
summary{cursor:pointer;font-weight:600}
.layers>input{margin:0 3px 0 0}
.layers>label{margin-right:12px;white-space:nowrap;cursor:pointer}
.of{display:none}
.passage{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:13px;line-height:1.75;
white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #e3e6ea;border-radius:4px;padding:8px 10px;margin:4px 0 12px}
.passage span{border-radius:2px;unicode-bidi:isolate;padding:1px 0}
@media(max-width:760px){body{padding:10px 12px 40px}figure img{max-width:none}}
.legend{display:flex;flex-wrap:wrap;gap:3px 5px;margin:8px 0}
.legend button{font:12px ui-monospace,monospace;color:#1c2126;
border:1px solid #c9cfd6;border-radius:3px;padding:1px 6px;cursor:pointer}
.legend button[aria-pressed=true]{outline:2px solid #1c2126}
"""


def text(value: object, limit: int = 0) -> str:
    """Any text as HTML: markup escaped, what does not print (controls, bidi marks, lone surrogates) as its escape.

    limit: cut longer texts to so many characters; 0: do not.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    if limit and len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return html.escape(shown, quote=True)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash where there is none."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share for a table."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kinds: str = "") -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
      head, rows: cells, HTML.
      kinds: a letter for each column: "n" numbers, "w" text that may wrap, anything else text.
    """
    classes = [f' class="{kind}"' if kind in "nw" else "" for kind in kinds.ljust(len(head), ".")]
    top = "".join(f"<th{c}>{cell}</th>" for c, cell in zip(classes, head))
    body = "".join("<tr>" + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes, row)) + "</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{header}<tbody>{body}</tbody></table></div>\n'


def picture(png: bytes, alt: str, caption: str = "") -> str:
    """A picture inside the page; `caption` is HTML."""
    data = base64.b64encode(png).decode()
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img alt="{text(alt)}" src="data:image/png;base64,{data}">{below}</figure>\n'


def paragraph(inside: str, note: bool = False) -> str:
    """A paragraph of HTML."""
    return f'<p class="note">{inside}</p>\n' if note else f"<p>{inside}</p>\n"


def frame(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole page.

    Args:
      title: plain text.
      lead: HTML below the title.
      sections: (anchor, title as plain text, HTML).
    """
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{text(name)}</h2>\n{inside}</section>\n' for anchor, name, inside in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head>\n<body><h1>{text(title)}</h1>\n"
        f"{lead}<nav>{links}</nav>\n{body}</body></html>\n"
    )
