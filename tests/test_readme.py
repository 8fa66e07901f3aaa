"""What README and docs/*.md say, against the code and the results: a sentence that went stale
fails here."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import cli
import summary
from evaluate import mean_interval
from order import wall_seconds
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
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
SOURCES = sorted(ROOT.glob("*.py"))
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(title: str) -> str:
    """The text below the heading `## title`, up to the next one, on whichever page has it."""
    pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)"
    (text,) = (text for page in PAGES.values() for text in re.findall(pattern, page, re.M | re.S))
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
    """Top-level functions, classes and constants of a file; methods and fields as Class.name."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        names |= _names(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for child in node.body for name in _names(child)}
    return names


def _names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    targets = [x for t in targets for x in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def texts(path: Path) -> list[str]:
    """The strings of a file, with "..." in the place of what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            values = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
            found.append("".join(values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"\{[^}]*\}", "...", node.value))  # a template for str.format
    return found


# --------------------------------------------------------------------------------------- the result


def test_results_are_those_of_the_summary():
    """The table between the markers is made from results/summary.json and nothing else."""
    assert README.count(BEGIN) == README.count(END) == 1
    shown = README.split(BEGIN)[1].split(END)[0].strip()
    path = ROOT / "results" / "summary.json"
    expected = "not measured yet"
    if path.is_file():
        expected = summary.results_block(json.loads(path.read_text())).strip()
    assert shown == expected, "run: python cli.py summary"


def test_the_planned_seeds_alone_say_what_the_page_says():
    """The lower end of the gain is below three points without the seed that was added, and above
    with it."""
    gains = []
    for seed in range(6):
        record = json.loads((ROOT / "results" / "runs" / f"dream-{seed}.json").read_text())
        found = record["stages"]["evaluate"]["results"]
        gains.append(100 * (found["policy"]["oracle"]["mean"] - found["sft"]["oracle"]["mean"]))
    assert mean_interval(gains[:5])[1] < 3 < mean_interval(gains)[1]
    words = " ".join(section("Result").split())
    assert "with the planned five alone the lower end" in words and "below three points" in words


def test_real_episodes_in_words():
    """What `compare` has counted for filtered BC, the method, and LOOP in the real simulator."""
    compared = json.loads((ROOT / "results" / "compare" / "compare.json").read_text())
    cost = {row["method"]: row["real_episodes"] for row in compared["rows"]}
    assert (cost["filtered_bc"], cost["dream"]) == (1000, 1400)
    assert cost["real_equal_rollouts"] / cost["dream"] == pytest.approx(5 / 3, abs=0.05)
    words = " ".join(section("Does the dream tell the truth?").split())
    assert "fourteen hundred real episodes against a thousand" in words
    assert "two thirds more real episodes than the method" in words
    own = json.loads((ROOT / "results" / "summary.json").read_text())
    more = own["dream_real_episodes"]["value"] / own["filtered_bc_real_episodes"]["value"] - 1
    assert more == pytest.approx(2 / 5, abs=0.05) and "about two fifths" in README


def test_false_stops_in_words():
    found = json.loads((ROOT / "results" / "summary.json").read_text())
    assert found["false_stops_generated"]["value"] > 3 * found["false_stops"]["value"]
    assert "falsely several times as often" in " ".join(section("Result").split())


def test_no_stored_run_has_seen_the_starts_that_are_called_unseen():
    """Of Meta-World's tasks: docs/protocol.md says how many to skip."""
    skipped = int(re.search(r"evaluate RUN --skip (\d+)", PAGES["protocol.md"])[1])
    records = [json.loads(p.read_text()) for p in (ROOT / "results" / "runs").glob("*.json")]
    ours = [r["config"] for r in records if set(r["config"]["tasks"]) <= set(DEFAULT_SUITE)]
    unseen = json.loads((ROOT / "results" / "unseen.json").read_text())
    skip, more = (int(re.search(rf"--{x} (\d+)", unseen["command"])[1]) for x in ("skip", "starts"))
    assert max(config["test_starts"] for config in ours) == skip and skip + more == skipped


def test_the_gain_on_unseen_starts_is_that_of_its_runs():
    found = json.loads((ROOT / "results" / "unseen.json").read_text())
    for key, before, after in (
        ("gain_oracle", "sft_oracle", "policy_oracle"),
        ("gain_no_oracle", "sft_none", "policy_reflector"),
    ):
        gains = [100 * (run[after]["mean"] - run[before]["mean"]) for run in found["runs"]]
        value, low, high = (round(x, 1) for x in mean_interval(gains))
        assert found[key] == {"value": value, "low": low, "high": high, "n": len(gains)}
    told = "gains {value} points on SFT with the oracle's stop ({low} to {high}"
    assert told.format(**found["gain_oracle"]) in " ".join(PAGES["protocol.md"].split())


RECIPE = (ROOT / "results" / "RECIPE.md").read_text()
ATTEMPTS = (ROOT / "results" / "attempts.md").read_text()


def test_sections_that_the_recipe_names_are_there():
    """Those in the last column of its levers, and those in quotation marks."""
    titles = re.findall(r"^#+ (.*)", ATTEMPTS, re.M)
    levers = rows(RECIPE.split("## Levers")[1].split("## Marks")[0])[1:]
    named = [name for *_, sections in levers for name in sections.split("; ")]
    named += [" ".join(name.split()) for name in re.findall(r'"([^"]*)"', RECIPE)]
    for name in named:
        first = name.removesuffix(" (two sections)")
        assert [title for title in titles if title.startswith(first)], name


def test_marks_of_the_recipe_are_those_of_the_summary():
    found = json.loads((ROOT / "results" / "summary.json").read_text())
    for mark, unit, goal, measured, key, reached in rows(RECIPE.split("## Marks")[1])[1:]:
        limit, way = goal.split(" or ")
        value = found[key.strip("`")]["value"] * (100 if unit.startswith("%") else 1)
        assert measured == f"{value:.{len(measured.partition('.')[2])}f}", mark
        right = value >= float(limit) if way == "more" else value <= float(limit)
        assert reached == ("yes" if right else "no"), mark


def test_prose_around_the_results_states_no_figure():
    """Figures stand in the generated table only, where they cannot go stale."""
    before, rest = section("Result").split(BEGIN)
    assert not re.findall(r"\d", before + rest.split(END)[1])


# ----------------------------------------------------------------------------------------- commands


def commands() -> list[str]:
    """Every command of the pages as written: what stands behind cli.py up to the closing back-tick
    or the end of the line, and what `make train` and `make -C` hand on in ARGS."""
    pages = "\n".join(PAGES.values())
    found = set(re.findall(r"[^`\w]cli\.py ([^`\n]*)", pages))
    return sorted(found | {f"train {a}" for a in re.findall(r'make train ARGS="([^"]*)"', pages)})


def find(words: list[str]):
    """The command of the Typer app that `words` begin with; None when there is none."""
    command = typer.main.get_command(cli.app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands.get(word)
    return None if command is None or hasattr(command, "commands") else command


SIGNATURES = re.findall(r"^\| `python cli\.py ([^`]*)`", section("The other commands"), re.M)


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    """The command exists, and takes the options and arguments that stand there. (In the table of
    commands stand names, of which some need an option more.)"""
    words = shlex.split(line)
    command = find(words)
    assert command is not None, f"python cli.py {line}"
    if line in SIGNATURES:
        return
    parts = 2 if words[0] == "demos" else 1
    command.make_context(words[parts - 1], words[parts:])


def test_a_command_that_does_not_parse_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        test_commands_parse("train --no-such-option 1")
    with pytest.raises(Exception, match="valid int"):  # in full or short, by typer's version
        test_commands_parse("evaluate RUN --starts many")


def test_every_command_is_listed():
    """The table of commands leaves none out."""
    group = typer.main.get_command(cli.app)
    names = set()
    for name, command in group.commands.items():
        names |= {f"{name} {sub}" for sub in getattr(command, "commands", {})} or {name}
    listed = {
        " ".join(word for word in command.split() if word.islower())
        for command in re.findall(
            r"^\| `python cli\.py ([^`]*)`", section("The other commands"), re.M
        )
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
    """What the pages set as code, in the text and in blocks."""
    found = []
    for page in PAGES.values():
        text, *parts = re.split(r"^```\w*(?: .*)?\n", page, flags=re.M)
        blocks, prose = parts[::2], [text, *parts[1::2]]
        found += blocks + re.findall(r"`([^`\n]+)`", "\n".join(prose))
    return found


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


@pytest.mark.parametrize("item, words, function, test", PAPER, ids=[row[0] for row in PAPER])
def test_functions_and_tests_of_the_paper_exist(item, words, function, test):
    assert len(words) > 10, "the equation in words is missing"
    module, _, name = function.strip("`").partition(".")
    assert name in defined(ROOT / f"{module}.py")
    module, _, name = test.strip("`").partition(".")
    assert name in defined(ROOT / "tests" / f"{module}.py")


def test_names_from_the_code_exist():
    """`module.name`, anywhere on the pages, is defined in that module."""
    modules = {path.stem: path for path in [*SOURCES, *ROOT.glob("tests/*.py")]}
    for span in set(code()):
        module, _, name = span.partition(".")
        is_file = name in ("py", "md", "html", "json")
        if module in modules and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name) and not is_file:
            assert name in defined(modules[module]), span


def test_linked_files_exist():
    """Pictures and files that are named, except those that commands make."""
    missing = []
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
        missing += [link for link in links if link and not (folder / link).exists()]
    folders = "results|tests|docs|launch|notebooks"
    named = re.compile(rf"(?:(?:{folders})/[\w./-]+\.\w+|\w+\.(?:py|txt)|LICENSE|Makefile)")
    # By `summary`, from finished runs, and by `bench`, on a machine that does nothing else.
    made = {"results/summary.json", "results/bench.md"}
    named = {span for span in code() if named.fullmatch(span)} - made
    missing += [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


def test_anchors_exist():
    """A link to a heading, on its own page or another, finds one."""
    for page, text in PAGES.items():
        for link, anchor in re.findall(r"\]\(([^)\s#]*)#([\w-]+)\)", text):
            target = PAGES[Path(link).name if link else page]
            headings = re.findall(r"^#+ (.*)$", target, re.M)
            slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page}: {link}#{anchor}"


def test_every_page_is_linked():
    """No page in docs/ that the README does not name."""
    for page in PAGES:
        assert page == "README.md" or f"](docs/{page})" in README, page


# ------------------------------------------------------------------- glossary, failures, machines


def test_glossary_is_in_order_and_its_files_exist():
    terms = rows(PAGES["glossary.md"])[1:]
    names = [term.lower() for term, _, _ in terms]
    assert names == sorted(names) and len(names) == len(set(names))
    for term, sentence, file in terms:
        assert sentence.endswith(".") and sentence.count(". ") == 0, term
        assert (ROOT / file.strip("`")).is_file(), term


FAILURES = rows(section("When something looks wrong"))[1:]


@pytest.mark.parametrize("seen, file, why, remedy", FAILURES, ids=[row[0] for row in FAILURES])
def test_messages_are_those_of_the_code(seen, file, why, remedy):
    """What stands in back-ticks is said by the file beside it, word for word."""
    assert why and remedy
    said = [" ".join(text.split()) for text in texts(ROOT / file.strip("`"))]
    for message in re.findall(r"`([^`]+)`", seen):
        assert any(pattern(message).search(text) for text in said), message


def pattern(message: str) -> re.Pattern:
    """`a ... b` as a search for a, anything, b."""
    return re.compile(".*".join(re.escape(part) for part in message.split("...")))


def test_a_message_that_nobody_says_is_noticed():
    with pytest.raises(AssertionError):
        test_messages_are_those_of_the_code("`the dream never lies ...`", "`gauge.py`", "a", "b")


MACHINES = rows(section("Which machine"))[1:]


@pytest.mark.parametrize("fork, command, minutes, memory, source", MACHINES)
def test_minutes_and_memory_are_measured_or_marked(fork, command, minutes, memory, source):
    """Each row has its figures from the file that it names, or says that it is an estimate, and of
    what."""
    path = source.strip("`")
    if source.startswith("estimate"):
        told = re.search(r"`([\w./]+)`", source)[1]
        module, _, name = told.partition(".")
        if not (ROOT / told).is_file():
            assert name in defined(ROOT / f"{module}.py")
            assert "ESTIMATE" in (ROOT / f"{module}.py").read_text()
        return
    record = json.loads((ROOT / path).read_text())
    if path == "results/summary.json":
        found = record["train_minutes"]["value"], record["train_peak_gib"]["value"]
    else:
        stages = record["stages"] if "stages" in record else record[command.strip("`")]["stages"]
        if "command" in record:  # beside what is the default anyway
            given = command.strip("`").removeprefix("make ").split(" --out")[0]
            assert set(given.split()) <= set(record["command"].split())
        seconds = wall_seconds(stages)
        found = seconds / 60, max(stage["peak_gib"] for stage in stages.values())
    assert (minutes, memory) == (f"{found[0]:.1f}", f"{found[1]:.1f} GiB")


def test_the_first_picture_came_when_the_page_says():
    """`make example`, and a dream of one's own on both machines."""
    measured = json.loads((ROOT / "results" / "first_dream.json").read_text())
    words = " ".join(section("Two commands").split())
    key = "seconds_to_the_first_picture"
    minutes = [f"{m[key] / 60:.1f}" for m in measured.values() if key in m]
    assert len(minutes) == 3
    assert f"{minutes[0]} minutes after the first command" in words
    assert f"after {minutes[1]} minutes on" in words and f"after {minutes[2]} on" in words


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
    before = summary.summarize_runs(tmp_path)
    record = json.loads(next((ROOT / "results" / "runs").glob("dream-*.json")).read_text())
    record["config"]["tasks"] = ["libero-object-milk"]
    (tmp_path / "runs" / "other.json").write_text(json.dumps(record))
    assert summary.summarize_runs(tmp_path) == before


# -------------------------------------------------------------------------------------- the example


def test_the_example_of_a_task_can_be_played(monkeypatch):
    """The task of docs/task.md, as it stands there: the expert succeeds, an equal seed gives an
    equal start, a snapshot goes on as if nothing had happened, the hand is drawn where it is."""
    import numpy as np

    import instructions

    text = PAGES["task.md"].split("```python")[1].split("```")[0]
    monkeypatch.setitem(instructions.INSTRUCTIONS, "dot", ("reach the edge",) * 3)
    spaces: dict = {}
    exec(compile(text, "docs/task.md", "exec"), spaces)
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
