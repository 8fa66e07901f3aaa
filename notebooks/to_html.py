"""Run notebooks from top to bottom and write what they show to docs/*.html.

    make notebooks                     all, at full size
    python notebooks/to_html.py FILE   one; it needs requirements-notebooks.txt

An .ipynb is never changed: stored notebooks have no outputs. The pages need no network, but for
Colab's badge: pictures are inside, and equations are MathML, which browsers draw themselves.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import latex2mathml.converter
import nbclient
import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).resolve().parent
CELL_SECONDS = 3600  # a machine that is busy with other things takes longer than two free cores

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { font-size: 13px; line-height: 1.35; overflow-x: auto; margin: 0; padding: 0.6rem 0.8rem; }
.jp-InputArea, .input_area { background: #f6f8fa; border-radius: 6px; margin: 0.8rem 0 0.2rem; }
.output_area pre, .output_subarea pre { border-left: 3px solid #d0d7de; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #d0d7de; padding: 0.25rem 0.7rem; }
details { background: #f6f8fa; border-radius: 6px; padding: 0.4rem 0.8rem; margin: 0.5rem 0; }
.anchor-link, .prompt { display: none; }
math[display="block"] { margin: 0.8rem 0; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def run(notebook: nbformat.NotebookNode) -> None:
    """Execute all cells in place, in the notebook's own folder, with this interpreter."""
    resources = {"metadata": {"path": str(HERE)}}
    nbclient.NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources
    ).execute()


def mathml(text: str) -> str:
    """Markdown with its $...$ and $$...$$ replaced by MathML."""

    def convert(display: str):
        def one(found: re.Match) -> str:
            drawn = latex2mathml.converter.convert(found[1].strip(), display=display)
            if "\\" in drawn:
                raise ValueError(f"no MathML for {found[0]!r}; write it with other commands")
            return drawn

        return one

    text = re.sub(r"\$\$(.+?)\$\$", convert("block"), text, flags=re.S)
    return re.sub(r"\$([^$\n]+?)\$", convert("inline"), text)


def page(notebook: nbformat.NotebookNode, title: str) -> str:
    """One HTML page of an executed notebook."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
    exporter = HTMLExporter(template_name="basic")
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(notebook)
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    return PAGE.format(title=title, style=style, body=body)


def main(paths: list[Path]) -> None:
    for path in paths:
        if path.suffix != ".ipynb" or not path.is_file():
            print(f"{path}: no such notebook; expected a file like notebooks/*.ipynb")
            sys.exit(2)
    for path in paths:
        started = time.time()
        notebook = nbformat.read(path, as_version=4)
        run(notebook)
        target = HERE.parent / "docs" / f"{path.stem}.html"
        title = path.stem.replace("_", " ")
        target.write_text(page(notebook, title), encoding="utf-8")
        size = target.stat().st_size / 1e6
        print(f"docs/{target.name}: {size:.2f} MB, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")))
