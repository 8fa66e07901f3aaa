"""Text in Markdown as one HTML page that needs nothing else: pictures, films and style are in it.

A page can be sent by mail, opened without a network and printed. Whatever a user named (a folder, a
task) is shown as it is written: HTML in the text is escaped, never obeyed.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html import escape
from urllib.parse import unquote

import numpy as np

NARROW = 30  # characters: a table's cell of fewer does not break into lines
WIDE = 1000  # pixels: a picture above that scrolls on a phone instead of shrinking
FILM_WIDTH = 320  # pixels; a wider film is thinned, the browser enlarges it again
FRAMES_ON_PAPER, GAP = 4, 8  # of a film; pixels between them

# On a phone, tables and wide pictures scroll sideways in their own box, the page itself does not.
STYLE = """
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 68rem; color: #111; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 2px solid #0072B2; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
a { color: #0072B2; }
p, li { max-width: 46rem; overflow-wrap: break-word; }
p.pictures { max-width: none; }
nav { font-size: .9rem; line-height: 1.9; }
nav a { margin-right: .9em; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #bbb; text-align: left;
         vertical-align: top; min-width: 4em; }
th { border-bottom: 2px solid #555; }
td.narrow { white-space: nowrap; }
td:not(.narrow) { min-width: 15em; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
img { max-width: 100%; height: auto; vertical-align: top; margin: .2rem .8rem .2rem 0; }
img.chart { width: 30rem; }
img.film { width: 32rem; image-rendering: pixelated; }
img.paper { display: none; }
@media (max-width: 40rem) { body { padding: 0 .7rem 2rem; } table { font-size: .82rem; } }
@media print {
  @page { margin: 1.5cm; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  nav, img.film { display: none; }
  img.paper { display: inline; width: 100%; }
  img.chart { width: 47%; }
  img.wide { min-width: 0 !important; }
  .scroll { overflow: visible; orphans: 1; widows: 1; }
  table { font-size: 8pt; }
  th, td { padding: .1rem .3rem; min-width: 0; }
  td:not(.narrow) { min-width: 0; }
  th:first-child, td:first-child { position: static; }
  h2, h3, p:has(+ p.pictures) { break-after: avoid; }
  tr, img { break-inside: avoid; }
}
"""


def plain(text: str) -> str:
    """Text of a user for use in Markdown: its signs stay signs, and it stays on one line."""
    return re.sub(r"([\\`*_\[\]<>&#!~])", r"\\\1", " ".join(text.split()))


def html_page(text: str, read: Callable[[str], bytes | None]) -> str:
    """Markdown -> a whole HTML page: its headings, a list of links to them, tables, pictures.

    text: CommonMark with tables, beginning with the title as `# ...`. read: the bytes of a picture
    (PNG) or film (GIF) by the name that the text gives, None where there is none: then the page
    says so.
    """
    from markdown_it import MarkdownIt

    # HTML in the text is off, so it comes out escaped; links to scripts are refused.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for name, rule in (
        ("table_open", lambda *_: '<div class="scroll"><table>\n'),
        ("table_close", lambda *_: "</table></div>\n"),
        ("image", _image),
    ):
        parser.add_render_rule(name, lambda renderer, *rest, rule=rule: rule(*rest))
    tokens = parser.parse(text)
    sections, title = [], "World-Env"
    for token, following in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open" and token.tag == "h1":
            title = _words(following)
        if token.type == "heading_open" and token.tag == "h2":
            sections.append(_words(following))
            token.attrSet("id", f"section-{len(sections)}")
        if token.type == "td_open" and len(following.content) < NARROW:
            token.attrSet("class", "narrow")
        parts = following.children or []
        if token.type == "paragraph_open" and any(part.type == "image" for part in parts):
            token.attrSet("class", "pictures scroll")
    body = parser.renderer.render(tokens, parser.options, {"read": read})
    links = [f'<a href="#section-{i}">{escape(s)}</a>' for i, s in enumerate(sections, 1)]
    before, end, after = body.partition("</h1>\n")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{before}{end}<nav>{' '.join(links)}</nav>\n{after}</body>\n</html>\n"
    )


def _words(heading) -> str:
    """The text of a heading without its marks."""
    return "".join(child.content for child in heading.children)


def _image(tokens, index: int, options, env) -> str:
    """A picture as data in the page; a film also as some of its frames, for paper."""
    name, alt = unquote(tokens[index].attrs["src"]), escape(_words(tokens[index]))
    content = env["read"](name)
    if content is None:
        return f"<em>(no picture: {alt})</em>"
    if name.endswith(".gif"):
        from PIL import Image

        damaged = (OSError, ValueError, LookupError, SyntaxError, EOFError)
        try:
            film, on_paper = _film(content)
        except (*damaged, Image.DecompressionBombError):
            return f"<em>(no picture, its file is damaged: {alt})</em>"
        return _img("film", "gif", film, alt) + _img("paper", "png", on_paper, alt)
    # A PNG's width is in its header. Contact sheets and panels are wider than a chart.
    width = int.from_bytes(content[16:20], "big")
    if width <= WIDE:
        return _img("chart", "png", content, alt)
    # Half of its pixels is what its letters need to be read.
    return _img("wide", "png", content, alt, f' style="min-width: {width // 2}px"')


def _img(kind: str, form: str, content: bytes, alt: str, more: str = "") -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{kind}" alt="{alt}"{more} src="data:image/{form};base64,{data}">'


def _film(content: bytes) -> tuple[bytes, bytes]:
    """(a GIF of at most FILM_WIDTH, a PNG of some of its frames side by side)."""
    import imageio.v3 as imageio

    if not content.startswith(b"GIF8"):
        raise ValueError("no GIF")
    frames = imageio.imread(content, extension=".gif", index=None)[..., :3]  # (T, H, W, 3)
    stride = -(-frames.shape[2] // FILM_WIDTH)
    if stride > 1:
        frames = frames[:, ::stride, ::stride]
        seconds = imageio.immeta(content, extension=".gif").get("duration", 160)
        content = imageio.imwrite("<bytes>", frames, extension=".gif", duration=seconds, loop=0)
    picks = np.linspace(0, len(frames) - 1, FRAMES_ON_PAPER).round().astype(int)
    apart = np.pad(frames[picks], ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
    strip = np.concatenate(list(apart), axis=1)[:, :-GAP]
    return content, imageio.imwrite("<bytes>", strip, extension=".png")
