"""What the README says, against the code and the results: a sentence that went stale fails here."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import cli
import studies
from tasks import (
    CAMERA_FOVY,
    CAMERA_NAME,
    CAMERA_POSITION,
    CAMERA_SIDEWAYS,
    DEFAULT_SUITE,
    SPLITS,
    EnvConfig,
)

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = sorted(ROOT.glob("*.py"))
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(title: str) -> str:
    """The text below the heading `## title`, up to the next one."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of the Markdown table rows in `text`, headers included, rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        for line in lines
        if not re.fullmatch(r"[|\-]+", line)
    ]
    return cells


def defined(path: Path) -> set[str]:
    """Top-level functions and classes of a file, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


# --------------------------------------------------------------------------------------- the result


def test_results_are_those_of_the_summary():
    """The table between the markers is made from results/summary.json and nothing else."""
    assert README.count(BEGIN) == README.count(END) == 1
    shown = README.split(BEGIN)[1].split(END)[0].strip()
    path = ROOT / "results" / "summary.json"
    expected = "not measured yet"
    if path.is_file():
        expected = studies.results_block(json.loads(path.read_text())).strip()
    assert shown == expected, "run: python cli.py summary"


def test_prose_around_the_results_states_no_figure():
    """Figures stand in the generated table only, where they cannot go stale."""
    before, rest = section("Result").split(BEGIN)
    assert not re.findall(r"\d", before + rest.split(END)[1])


# ----------------------------------------------------------------------------------------- commands


def commands() -> list[str]:
    """Every `python cli.py ...` of the README as written, up to the closing back-tick."""
    return sorted(set(re.findall(r"python cli\.py ([^`\n]*)", README)))


def find(words: list[str]):
    """The command of the Typer app that `words` begin with; None when there is none."""
    command = typer.main.get_command(cli.app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands.get(word)
    return None if command is None or hasattr(command, "commands") else command


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line):
    assert find(shlex.split(line)) is not None, f"python cli.py {line}"


def test_every_command_is_listed():
    """The table of commands leaves none out."""
    group = typer.main.get_command(cli.app)
    names = set()
    for name, command in group.commands.items():
        names |= {f"{name} {sub}" for sub in getattr(command, "commands", {})} or {name}
    listed = {
        " ".join(word for word in command.split() if word.islower())
        for command in re.findall(r"^\| `python cli\.py ([^`]*)`", README, re.M)
    }
    assert listed == names


def test_options_exist():
    """Each --option in a row of the table of commands belongs to that command."""
    for command, explanation in rows(section("The other commands"))[1:]:
        words = command.strip("`").removeprefix("python cli.py ").split()
        known = {name for parameter in find(words).params for name in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", explanation)) <= known, command


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (?:-C [\w-]+ )?([a-z-]+)", "\n".join(code())):
        assert re.search(rf"^{target}:", makefile, re.M), target


def code() -> list[str]:
    """What the README sets as code, in the text and in blocks."""
    text, *parts = re.split(r"^```\n", README, flags=re.M)
    blocks, texts = parts[::2], [text, *parts[1::2]]
    return blocks + re.findall(r"`([^`\n]+)`", "\n".join(texts))


# --------------------------------------------------------------------------------- files, functions


def test_reading_order_has_every_file():
    named = [row[0].strip("`") for row in rows(section("Reading order"))[1:]]
    assert len(named) == len(set(named))
    assert set(named) == {path.name for path in SOURCES}


def test_reading_order_is_from_the_bottom_up():
    """Only cli.py looks further down, at the doctor."""
    order = [row[0].strip("`").removesuffix(".py") for row in rows(section("Reading order"))[1:]]
    for position, name in enumerate(order):
        used = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                used.add(node.module)
        later = used & set(order[position + 1 :])
        assert later <= ({"doctor"} if name == "cli" else set()), name


PAPER = rows(section("From the paper to the code"))[1:]


@pytest.mark.parametrize("item, function, test", PAPER, ids=[row[0] for row in PAPER])
def test_functions_and_tests_of_the_paper_exist(item, function, test):
    module, _, name = function.strip("`").partition(".")
    assert name in defined(ROOT / f"{module}.py")
    module, _, name = test.strip("`").partition(".")
    assert name in defined(ROOT / "tests" / f"{module}.py")


def test_linked_files_exist():
    """Pictures and files that are named, except those that commands make."""
    named = re.findall(r"\]\(([^)]+)\)", README)
    named += re.findall(r"`((?:results|tests|docs)/[\w./]+\.\w+|LICENSE|\w+\.txt)`", README)
    # By `summary`, from finished runs, and by `bench`, on a machine that does nothing else.
    made = {"results/summary.json", "results/bench.md"}
    missing = [name for name in sorted(set(named) - made) if not (ROOT / name).is_file()]
    assert not missing


# ----------------------------------------------------------------------------- protocol, departures


def test_protocol_is_that_of_the_code():
    protocol, env = section("Protocol"), EnvConfig()
    for words in (
        ", ".join(DEFAULT_SUITE),
        f"`{CAMERA_NAME}` at ({', '.join(map(str, CAMERA_POSITION))}) m",
        f"sideways by {CAMERA_SIDEWAYS} m, fovy {CAMERA_FOVY:g} degrees",
        f"{env.size} x {env.size} px",
        f"K = {env.chunk} environment steps; horizon {env.horizon} decisions",
    ):
        assert words in protocol, words
    shown = {row[0]: row[1] for row in rows(protocol) if row[0] in SPLITS}
    assert shown == {name: f"{seeds[0]:,} - {seeds[-1]:,}" for name, seeds in SPLITS.items()}


def test_every_departure_is_told():
    """As many rows for a file as it has `# DEVIATION:` marks."""
    told = [row[0].strip("`") for row in rows(section("How it departs from the paper"))[1:]]
    for path in SOURCES:
        marks = re.findall(r"^\s*# DEVIATION:", path.read_text(), re.M)
        assert told.count(path.name) == len(marks), path.name


def test_a_run_on_libero_does_not_enter_the_summary(tmp_path):
    """Its figures are another benchmark's: the summary stays what it was."""
    (tmp_path / "runs").mkdir()
    for path in (ROOT / "results" / "runs").glob("*.json"):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    before = studies.summarize_runs(tmp_path)
    record = json.loads(next((ROOT / "results" / "runs").glob("dream-*.json")).read_text())
    record["config"]["tasks"] = ["libero-object-milk"]
    (tmp_path / "runs" / "other.json").write_text(json.dumps(record))
    assert studies.summarize_runs(tmp_path) == before


# -------------------------------------------------------------------------------------- the example


def test_the_example_of_a_task_can_be_played(monkeypatch):
    """README's own task, as it is written there: the expert succeeds, an equal seed gives an equal
    start, a snapshot goes on as if nothing had happened, and the hand is drawn where it is."""
    import numpy as np

    import instructions

    text = README.split("## Add your own task")[1].split("```python")[1].split("```")[0]
    monkeypatch.setitem(instructions.INSTRUCTIONS, "dot", ("reach the edge",) * 3)
    spaces: dict = {}
    exec(compile(text, "README.md", "exec"), spaces)
    env, again = spaces["DotEnv"](), spaces["DotEnv"]()
    first, _ = env.reset(seed=7)
    assert np.array_equal(again.reset(seed=7)[0]["image"], first["image"])
    assert not np.array_equal(again.reset(seed=8)[0]["state"], first["state"])
    assert env.observation_space.contains(first)
    column, row = env.camera.project(first["state"][:3]).astype(int)
    assert first["image"][row, column].min() == 255 and first["image"].mean() < 5
    _, observation, *_ = env.expert_step()
    saved = env.snapshot()
    after = env.expert_step()[1]
    env.restore(saved)
    assert np.array_equal(env.expert_step()[1]["state"], after["state"])
    decisions = 3  # of which one was played twice
    while not env.expert_step()[3]:
        decisions += 1
        assert decisions < env.config.horizon
    assert env.snapshot()["own"][1]
