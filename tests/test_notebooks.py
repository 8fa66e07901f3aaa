"""The notebooks: stored without outputs, in step with the modules, and run from top to bottom.

The last takes the tools of requirements-notebooks.txt and is skipped without them.
"""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MODULES = {path.stem for path in ROOT.glob("*.py")}


def cells(path: Path, kind: str) -> list[str]:
    """The text of a notebook's cells of one kind, "code" or "markdown"."""
    stored = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in stored if cell["cell_type"] == kind]


def tree(path: Path) -> ast.Module:
    """All code of a notebook; SyntaxError names the cell that does not compile."""
    for number, text in enumerate(cells(path, "code"), start=1):
        compile(text, f"{path.name}, code cell {number}", "exec")
    return ast.parse("\n".join(cells(path, "code")))


def test_there_are_three():
    assert [name[:2] for name in NAMES] == ["1_", "2_", "3_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_stored_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["id"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_names_of_the_modules_exist(path):
    """`from module import name`, and `module.name` of modules that are imported whole."""
    used, whole = set(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            whole |= {alias.name for alias in node.names} & MODULES
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            used |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used |= {(node.value.id, node.attr)} if node.value.id in whole else set()
    assert len(used) > 10
    missing = [pair for pair in used if not hasattr(importlib.import_module(pair[0]), pair[1])]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_nothing_private_and_no_class_in_a_cell(path):
    """What teaches the method stands in the modules; a cell calls it."""
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.ClassDef | ast.While)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr


def test_they_are_set_up_alike():
    """The cell that installs is the same three times; of the settings only the imports differ."""
    first, second = (
        {cells(path, "code")[number].split("\nwarnings.")[-1] for path in NOTEBOOKS}
        for number in (0, 1)
    )
    assert len(first) == len(second) == 1


def test_one_address():
    """Badges and first cells name one repository; the README says how to put another in."""
    places = {re.search(r'^REPOSITORY = "(.+?)"', cells(p, "code")[0], re.M)[1] for p in NOTEBOOKS}
    (place,) = places
    assert f"`{place}`" in (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        badge = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{path.name}"
        assert f"]({badge})" in cells(path, "markdown")[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_exercises_hide_their_answers(path):
    last = cells(path, "markdown")[-1]
    exercises = len(re.findall(r"^\*\*\d\.\*\* ", last, re.M))
    assert 2 <= exercises <= 3
    assert last.count("<details><summary>Answer</summary>") == exercises
    assert last.count("</details>") == exercises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_pages_are_small_and_of_this_notebook(path):
    """docs/*.html is rendered by `make notebooks`: every line of every code cell is on it."""
    page = ROOT / "docs" / f"{path.stem}.html"
    assert page.stat().st_size < 1e6
    shown = re.sub(r"<[^>]+>", "", page.read_text())
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'")):
        shown = shown.replace(entity, sign)
    shown = shown.replace("&amp;", "&")
    for text in cells(path, "code"):
        for line in text.splitlines():
            assert line in shown, f"{line!r}; run: make notebooks"


tools = ("nbclient", "nbconvert", "nbformat", "ipykernel", "latex2mathml")
needs_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in tools),
    reason="needs: python -m pip install -r requirements-notebooks.txt",
)


@needs_tools
def test_equations_become_mathml(monkeypatch):
    """Also those that a page would show raw are found: by an error, not by a reader."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    to_html = importlib.import_module("to_html")
    shown = to_html.mathml("costs nothing, $x_0$ and\n\n$$a = b$$")
    assert shown.count("<math") == shown.count("</math>") == 2 and "$" not in shown
    with pytest.raises(ValueError, match="no MathML"):
        to_html.mathml(r"$\nosuchcommand x$")


@needs_tools
@pytest.mark.parametrize("name", ["4_nothing.ipynb", "to_html.py"])
def test_what_is_no_notebook_is_refused_in_one_line(name, monkeypatch, capsys):
    """Before the ones that are in order have run for minutes."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    to_html = importlib.import_module("to_html")
    monkeypatch.setattr(to_html, "run", lambda notebook: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as refused:
        to_html.main([NOTEBOOKS[0], ROOT / "notebooks" / name])
    lines = capsys.readouterr().out.splitlines()
    assert refused.value.code == 2 and len(lines) == 1 and name in lines[0]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Where all three train, as a reader's do: each goes on from where the one before ended."""
    return tmp_path_factory.mktemp("notebooks") / "run"


@needs_tools
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs_from_top_to_bottom(path, run_folder, monkeypatch):
    """At `debug` size."""
    run_one(path, run_folder, monkeypatch)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=NAMES[1:])
def test_runs_alone(path, tmp_path, monkeypatch):
    """Every stage that it needs is trained."""
    run_one(path, tmp_path / "run", monkeypatch)


def run_one(path: Path, run_folder: Path, monkeypatch) -> None:
    """Run a notebook in a run folder."""
    import nbclient
    import nbformat

    monkeypatch.setenv("WORLDENV_NOTEBOOK", "debug")
    monkeypatch.setenv("WORLDENV_NOTEBOOK_RUN", str(run_folder))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    folder = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=folder).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    drawn = [
        output for cell in ran for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(drawn) >= 4, "pictures are shown inline"
