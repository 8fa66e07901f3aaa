"""Reports of scripted runs: what the pages hold, that nothing else is needed to read them, and that
bad input harms nothing."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from scripted import random_episode
from trees import tree
from typer.testing import CliRunner

import charts
import cli
import demos
import overview
import page
import report
import runs
from evaluate import agreement, mean_interval, wilson
from runs import BadRun, Run

DEBUG = runs.preset("debug")
A_TASK = 20  # test starts a task in the scripted results


def result(successes: dict[str, int]) -> dict:
    """What evaluate.summarize makes of that many successes of A_TASK starts a task."""

    def row(count: int, n: int) -> dict:
        low, high = wilson(count, n)
        return {"success": count / n, "low": low, "high": high, "n": n}

    total = row(sum(successes.values()), A_TASK * len(successes))
    tasks = {task: row(count, A_TASK) for task, count in successes.items()}
    return total | {"mean": total["success"], "tasks": tasks}


def results(better: int) -> dict:
    """SFT solves 10 of 20 starts in each task, filtered BC one more and dream BC
    two, the method `better` more."""
    return {
        name: {
            termination: result({task: 10 + more - lost for task in DEBUG.tasks})
            for lost, termination in enumerate(("oracle", "reflector", "none"))
        }
        for name, more in (("sft", 0), ("filtered_bc", 1), ("dream_bc", 2), ("policy", better))
    }


def finished_run(folder: Path, better: int = 4, **settings) -> Run:
    """A run folder as a finished run leaves it, without checkpoints and episodes."""
    run = Run.create(folder, replace(DEBUG, **settings))
    card = {"reflector_auroc": 0.9, "ece": 0.1, "brier": 0.05, "reflector_false_stops": 0.05}
    card |= {"false_stops_low": 0.01, "false_stops_high": 0.2, "recall_at_success": None}
    probe = {"novel": [0.1] * 4, "real": [1, 0, 1, 0]}
    step = {"return": 0.5, "success": 0.6, "groups_with_spread": 0.7, "kl": 0.01, "scale": 0.2}
    results_of_stages = {
        "demos": {"ledger": {"demonstrations": 4}},
        "sft": {},
        "explore": {"ledger": {"exploration_episodes": 1234}},
        "filtered_bc": {},
        "simulator": {"sim_psnr_1": 30.0, "sim_psnr_last": 20.0, "hand_mm": 5, "hand_mm_last": 9},
        "reflector": card | {"episodes": 8, "threshold": 0.6, "generated": card},
        "dream_bc": {},
        "calibrate": {
            "etas": {"handle-press": 0.625},
            "ledger": {"calibration_episodes": 20, "imagined_frames": 300},
        },
        "rl": {
            "history": [step, step | {"success": None}],
            "probes": [
                probe | {"iteration": 0, "imagined": [1, 1, 1, 0]},
                probe | {"iteration": 2, "imagined": [1, 1, 1, 1]},
            ],
            "kept": 0,
            "ledger": {"gauge_episodes": 35, "imagined_frames": 5000},
            "films": {"success": "handle-press, start 7: success in both"},
        },
        "evaluate": {
            "results": results(better),
            "hardware": "an abacus",
            "versions": "torch 2",
            "ledger": {"evaluation_episodes": 400},
        },
    }
    for minutes, (name, found) in enumerate(results_of_stages.items()):
        run.finish_stage(name, 60 * minutes, 1, {"line": f"{name} is done", **found})
    (folder / "pictures").mkdir()
    film = np.zeros((9, 64, 128, 3), np.uint8)
    film[:, :, 64:] = np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    demos.write_film(folder / "pictures" / "film_success.gif", film, scale=2)
    demos.write_png(folder / "pictures" / "demonstrations.png", film[0])
    return run


class Page(HTMLParser):
    """What a browser would find: tables, pictures, links, text, and every tag."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.sources, self.links, self.tags, self.text = [], [], [], set(), ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.sources += [found[name] for name in ("src", "srcset", "data") if name in found]
        self.links += [found["href"]] if "href" in found else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


def in_process(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_one_line(result, *words: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and result.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def assert_needs_nothing_else(text: str) -> None:
    """All pictures are data; links stay in the page; no script, no style from elsewhere."""
    found = Page(text)
    assert all(source.startswith("data:image/") for source in found.sources)
    assert all(link.startswith("#") for link in found.links)
    assert not found.tags & {"script", "link", "iframe", "object", "video", "base"}
    assert "url(" not in text and "@import" not in text
    for link in found.links:
        assert f'id="{link[1:]}"' in text


# --- a page --------------------------------------------------------------------------------------


def test_plain_text_comes_out_as_it_was():
    """Signs of Markdown and of HTML in a name are shown, not obeyed; a cell stays a cell."""
    names = ["<b>x</b>", "a_b_c", "*x* **y**", "`z`", "[t](http://x.y)", "![i](x.png)", "&lt;", "~"]
    rows = report.table(["name"], [[page.plain(name)] for name in [*names, "p|q", "\\|"]])
    text = page.html_page("\n".join(["# " + page.plain("<i># t"), "", *rows]), lambda name: None)
    found = Page(text)
    assert [row[0] for row in found.rows[1:]] == [*names, "p|q", "\\|"]
    assert not found.tags & {"b", "i", "em", "strong", "code", "a", "img"}
    assert "<title>&lt;i&gt;# t</title>" in text


def test_html_in_the_text_is_never_obeyed():
    text = page.html_page("# t\n\n<script>x()</script>\n\n[l](javascript:x)\n", lambda name: None)
    assert not Page(text).tags & {"script", "a"} and "&lt;script&gt;" in text


def test_pictures_are_in_the_page():
    """A PNG byte for byte; a film thinned where it is wide, and some of its frames for paper."""
    film = np.zeros((7, 10, 960, 3), np.uint8)
    film[:] = np.arange(7, dtype=np.uint8)[:, None, None, None] * 30
    files = {
        "a.png": imageio.imwrite("<bytes>", film[3], extension=".png"),
        "a.gif": imageio.imwrite("<bytes>", film, extension=".gif", duration=100, loop=0),
    }
    text = page.html_page("# t\n\n![one](a.png)\n![two](a.gif)\n![three](b.png)\n", files.get)
    png, gif, strip = (base64.b64decode(s.split(",")[1]) for s in Page(text).sources)
    assert png == files["a.png"] and "(no picture: three)" in text
    frames = imageio.imread(gif, extension=".gif", index=None)
    assert frames.shape == (7, 4, 320, 3) and imageio.immeta(gif)["duration"] == 100
    assert np.abs(frames[:, 0, 0, 0].astype(int) - np.arange(7) * 30).max() <= 2  # the palette
    on_paper = imageio.imread(strip)[..., :3]
    assert on_paper.shape == (4, 4 * 320 + 3 * page.GAP, 3)
    picked = on_paper[0, :: 320 + page.GAP, 0].astype(int)
    assert np.abs(picked - np.array([0, 2, 4, 6]) * 30).max() <= 2
    assert (on_paper[:, 320 : 320 + page.GAP] == 255).all()


@pytest.mark.parametrize("damage", ["short", "empty", "a picture", "huge"])
def test_a_damaged_film_is_told_in_its_place(damage):
    film = np.zeros((7, 10, 96, 3), np.uint8)
    whole = imageio.imwrite("<bytes>", film, extension=".gif", duration=100, loop=0)
    content = {
        "short": whole[:100],
        "empty": b"",
        "a picture": imageio.imwrite("<bytes>", film[0], extension=".png"),
        "huge": whole[:6] + b"\xff\xff\xff\xff" + whole[10:],
    }[damage]
    text = page.html_page("# t\n\n![two](a.gif)\n", {"a.gif": content}.get)
    assert "its file is damaged: two)" in text


# --- one run -------------------------------------------------------------------------------------


def test_a_spoiled_record_shows_no_other_file(tmp_path):
    """Neither named in a text of the run, nor by a link among its pictures."""
    run, secret = finished_run(tmp_path / "run"), tmp_path / "secret.png"
    secret.write_bytes(b"the user's own, which nobody is to get")
    run.stages["sft"]["line"] = f"fine ![x](../secret.png) ![y]({secret})"
    run.stages["rl"]["warning"] = run.stages["evaluate"]["versions"] = "![x](../secret.png)"
    (run.folder / "stages.json").write_text(json.dumps(run.stages))
    (run.folder / "pictures").mkdir(exist_ok=True)
    (run.folder / "pictures" / "demonstrations.png").unlink(missing_ok=True)
    (run.folder / "pictures" / "demonstrations.png").symlink_to(secret)
    assert in_process("report", run.folder).exit_code == 0
    text = (run.folder / "report.html").read_text()
    assert base64.b64encode(secret.read_bytes()).decode() not in text and "../secret.png" in text


def test_page_of_a_run(tmp_path):
    """The same tables as report.md, the pictures that it names, and nothing from outside."""
    run = finished_run(tmp_path / "run")
    path = report.write_report(run)
    markdown, text = path.read_text(), path.with_suffix(".html").read_text()
    assert_needs_nothing_else(text)
    found = Page(text)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    expected = [row for row in cells if set("".join(row)) != {"-"}]
    plain_cells = [[re.sub(r"\\(.)|\*\*", r"\1", cell) for cell in row] for row in expected]
    assert found.rows == plain_cells and len(expected) > 40
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert {"pictures/success_oracle.png", "pictures/learning.png"} <= set(names)
    films = sum(name.endswith(".gif") for name in names)
    assert films == 1 and len(found.sources) == len(names) + films and "no picture" not in text
    for words in ("Real success", "Learning curve", "Films", "Ledger", "1,234", "an abacus"):
        assert words in found.text
    # Success per task, with its interval, under every termination.
    low, high = wilson(14, 20)
    assert ["policy", "stopped by", "mean", *DEBUG.tasks] in found.rows
    (row,) = [row for row in found.rows if row[:2] == ["post-trained", "oracle"]]
    assert row[3:] == [f"70.0 [{100 * low:.1f}, {100 * high:.1f}]"] * 2
    for termination in ("oracle", "reflector", "none"):
        rows = [row for row in found.rows if row[1] == termination]
        assert [row[0] for row in rows] == ["SFT", "filtered BC", "dream BC", "post-trained"]


def test_agreement_of_the_policy_that_was_kept(tmp_path):
    """Probe 0 is kept: real 1 0 1 0 and imagined 1 1 1 0, two starts a task."""
    run = finished_run(tmp_path / "run")
    found = report.kept_agreement(run)
    assert found["table"] == {"both": 2, "hallucinated": 1, "missed": 0, "neither": 1}
    assert found["tasks"][DEBUG.tasks[0]]["agreement"]["share"] == 0.5
    assert found["tasks"][DEBUG.tasks[1]]["agreement"]["share"] == 1.0
    rows = Page(report.write_report(run).with_suffix(".html").read_text()).rows
    assert ["dream success", "2", "1 (hallucinated)"] in rows
    assert ["dream failure", "0 (missed)", "1"] in rows


def test_agreement_at_the_test_starts_comes_before_the_gauge_s(tmp_path):
    """The gauge's starts have chosen the policy, the test starts nothing; before the evaluation
    and in runs of earlier versions the gauge's is shown."""
    run = finished_run(tmp_path / "run")
    assert "The kept policy, from the gauge's starts" in report.write_report(run).read_text()
    tasks = [task for task in DEBUG.tasks for _ in range(2)]
    found = agreement(np.ones(4, bool), np.array([True, False, False, False]), tasks)
    run.stages["evaluate"]["agreement"] = found
    assert report.kept_agreement(run) == found
    page = report.write_report(run)
    assert "The kept policy, from the test starts" in page.read_text()
    assert ["dream success", "1", "3 (hallucinated)"] in Page(
        page.with_suffix(".html").read_text()
    ).rows


def test_rounds_are_one_learning_curve(tmp_path):
    """Iterations of the second round count on; the agreement is that of the last."""
    run = finished_run(tmp_path / "run", rounds=2)
    second = json.loads(json.dumps(run.stages["rl"]))
    second["probes"][0]["imagined"] = [1, 0, 1, 0]
    run.stages["rl_2"] = second
    history, probes = report.whole_loop(run)
    assert len(history) == 4 and [p["iteration"] for p in probes] == [0, 2, 2, 4]
    assert report.kept_agreement(run)["agreement"]["share"] == 1.0


def test_each_task_s_eta_in_dreams_is_told(tmp_path):
    text = report.write_report(finished_run(tmp_path / "run")).read_text()
    assert "each task has an eta of its own: handle-press 0.62." in text


def test_warnings_of_iterations_are_told(tmp_path):
    """Those that differ in their figures alone are one line; without any there is none."""
    run = finished_run(tmp_path / "run")
    assert "steps too large" not in report.write_report(run).read_text()
    step = run.stages["rl"]["history"][0]
    alike = [step | {"groups_with_spread": share} for share in (0.0, 0.04)]
    run.stages["rl"]["history"] = [step, *alike, step | {"clip_fraction": 0.6}]
    text = report.write_report(run).read_text()
    assert "4 iterations.\n\n- in 2 of 4 iterations (first in 2): no signal: in 100% of" in text
    assert "\n- in 1 of 4 iterations (first in 4): steps too large: more than half" in text


def test_either_stop_rule_is_told_by_one_function(tmp_path):
    """The second look has shown a gain in reality, and strayed."""
    run = finished_run(tmp_path / "run")
    run.stages["rl"]["probes"][1] |= {"real": [1, 1, 1, 1], "novel": [0.5] * 4}
    found = report.gauge_report(run)
    assert (found["starts"], found["real_keeps"], found["novelty_keeps"]) == (4, 2, 0)
    look = {"iteration": 2, "imagined": 1, "real": 1, "agreement": 1, "hallucinated": 0}
    assert found["looks"][1] == look | {"missed": 0, "novel": 0.5}
    assert "By novelty alone, without real episodes, the policy after 0 iterations" in (
        report.write_report(run).read_text()
    )
    del run.stages["rl"]["probes"]
    assert report.gauge_report(run) is None


def test_trust_is_in_the_page(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.folder / "trust").mkdir()
    found = {"starts_per_task": 3, "split": "dev", "words": ["<img src=x> lies & *more*"]}
    found["agreement"] = {"sft": report.kept_agreement(run)}
    (run.folder / "trust" / "trust.json").write_text(json.dumps(found))
    shutil.copy(run.folder / "pictures" / "film_success.gif", run.folder / "trust" / "worst.gif")
    chart = run.folder / "trust" / "counterfactual.png"
    shutil.copy(run.folder / "pictures" / "demonstrations.png", chart)
    text = report.write_report(run).with_suffix(".html").read_text()
    assert_needs_nothing_else(text)
    seen = Page(text)
    assert "Held against reality" in seen.text and "<img src=x> lies & *more*" in seen.text
    assert seen.text.count("The worst lies") == 1 and text.count("image/gif") == 2
    assert 'alt="Dreams that follow their actions"' in text
    before = tree(run.folder)
    for damaged in ('{"words": [', "{}", "[]", json.dumps(found | {"agreement": {"sft": {}}})):
        (run.folder / "trust" / "trust.json").write_text(damaged)
        assert_one_line(in_process("report", run.folder), "trust.json", "not readable", "again")
    (run.folder / "trust" / "trust.json").write_text(json.dumps(found))
    assert tree(run.folder) == before


@pytest.mark.parametrize(
    "stage, key, value, both",
    [
        ("evaluate", "results", None, True), ("evaluate", "results", {"sft": 5}, True),
        ("evaluate", "results", {"x": {}}, False), ("rl", "history", [3], False),
        ("rl", "probes", 5, True),
        ("reflector", "generated", "x", False), ("simulator", "line", "\ud800", False),
    ],
)  # fmt: skip
def test_stages_that_are_spoiled(tmp_path, stage, key, value, both):
    """One line for one run, and for two where their page tells of it (`both`); nothing is
    written then."""
    run, other = finished_run(tmp_path / "run"), finished_run(tmp_path / "other", seed=1)
    run.stages[stage][key] = value
    (run.folder / "stages.json").write_text(json.dumps(run.stages))
    before = tree(tmp_path)
    assert_one_line(in_process("report", run.folder), "stages.json", "expected", "again")
    if both:
        told = in_process("report", run.folder, other.folder)
        assert_one_line(told, "stages.json", "expected", "again")
    assert tree(tmp_path) == before


def test_a_folder_s_name_is_shown_as_it_is(tmp_path):
    run = finished_run(tmp_path / "<b>bold *x*")
    found = Page(report.write_report(run).with_suffix(".html").read_text())
    assert "World-Env: <b>bold *x*" in found.text and "b" not in found.tags


def test_page_of_an_unfinished_run_says_what_is_missing(tmp_path):
    run = finished_run(tmp_path / "run")
    for stage in ("rl", "evaluate"):
        del run.stages[stage]
    text = report.write_report(run).with_suffix(".html").read_text()
    assert_needs_nothing_else(text)
    found = Page(text)
    assert "Not finished (the same command resumes): rl, evaluate." in found.text
    assert "Simulator" in found.text and "Real success" not in found.text


def test_no_dream_no_films(tmp_path):
    """LOOP in the real simulator: a learning curve of its rollouts, and nothing about a dream."""
    run = finished_run(tmp_path / "run", rl_env="real")
    for name in ("explore", "filtered_bc", "simulator", "reflector"):
        del run.stages[name]
    for name in ("probes", "films"):
        del run.stages["rl"][name]
    text = report.write_report(run).read_text()
    assert "Not finished" not in text and "learning.png" in text and "Films" not in text


def test_without_a_film_the_page_says_who_makes_one(tmp_path):
    run = finished_run(tmp_path / "run")
    assert "cli.py trust" in report.write_report(run).read_text()  # a success only, no lie
    run.stages["rl"]["films"]["lie"] = "handle-press, start 9: success in the dream only"
    pictures = run.folder / "pictures"
    shutil.copy(pictures / "film_success.gif", pictures / "film_lie.gif")
    text = report.write_report(run).read_text()
    assert "cli.py trust" not in text and "The worst lie. handle-press, start 9" in text


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    """Reports are written when all of them is made."""
    run = finished_run(tmp_path / "run")
    report.write_report(run)
    before = tree(tmp_path)
    run.stages["evaluate"]["results"] = results(better=9)

    def broken(*_):
        raise BadRun("no page")

    monkeypatch.setattr(report, "html_page", broken)
    with pytest.raises(BadRun):
        report.write_report(run)
    assert {n: h for n, h in tree(tmp_path).items() if "report." in n} == {
        n: h for n, h in before.items() if "report." in n
    }


# --- several runs --------------------------------------------------------------------------------


def test_several_runs_in_one_page(tmp_path):
    """A row per run, below it the mean over seeds; the runs' own folders stay as they are."""
    for seed, better in ((0, 2), (1, 4), (2, 7)):
        finished_run(tmp_path / "runs" / f"seed{seed}", better, seed=seed)
    finished_run(tmp_path / "runs" / "other", 5, exploration=3)
    names = ["seed0", "seed1", "seed2", "other"]
    before = tree(tmp_path)
    result = in_process("report", *(tmp_path / "runs" / name for name in names))
    out = tmp_path / "runs" / "comparison.html"
    assert result.exit_code == 0 and result.stdout.split() == [str(out)], result.output
    after = tree(tmp_path)
    assert after.pop("runs/comparison.html") and after == before
    assert_needs_nothing_else(out.read_text())
    rows = Page(out.read_text()).rows
    about = [row for row in rows if row[0] in names and row[2:3] == ["finished"]]
    assert about == [[n, s, "finished", e] for n, s, e in zip(names, "0120", "2223", strict=True)]
    oracle = rows[rows.index(["run", "seed", "state", "exploration"]) + 5 :][1:6]
    assert [row[0] for row in oracle] == [*names, "mean of seeds 0, 1, 2"]
    low, high = wilson(24, 40)
    assert oracle[0][4] == f"60.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert [row[5] for row in oracle[:4]] == ["+10.0", "+20.0", "+35.0", "+25.0"]
    mean, low, high = mean_interval([10.0, 20.0, 35.0])
    assert oracle[4][5] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    costs = [["run", "minutes", "CPU seconds", "peak memory, GiB"], ["run", *overview.LEDGER]]
    machine, ledger = (rows[rows.index(header) + 1 :][:5] for header in costs)
    assert machine[0][:3] == ["seed0", "45.0", "10"]
    for row, name in zip(ledger, names, strict=False):  # calibration and gauge 20 + 35
        assert row == [name, "4", "1,234", "55", "0", "1,293", "400", "5,300"]
    assert ledger[4][:3] == ["mean of seeds 0, 1, 2", "4 [4, 4]", "1,234 [1,234, 1,234]"]
    (agreement,) = [row for row in rows if row[0] == "seed0" and len(row) == 9]
    assert agreement[1].startswith("75.0 [") and agreement[2].startswith("25.0 [")


def test_unfinished_runs_and_runs_of_another_kind_are_compared_too(tmp_path):
    """What a run does not have is a dash, and its state says which stages are missing."""
    finished_run(tmp_path / "a")
    real = finished_run(tmp_path / "b", rl_env="real")
    for name in ("probes", "films"):
        del real.stages["rl"][name]
    new = Run.create(tmp_path / "c", DEBUG)
    text = overview.overview({"a": Run.open(tmp_path / "a"), "b": real, "<c>": new})
    assert_needs_nothing_else(text)
    rows = [row for row in Page(text).rows if row[0] == "<c>"]
    assert rows[0][2].startswith("not finished: demos, sft, ")
    assert all(set(row[1:]) <= {"-", "0"} for row in rows[1:])


def test_rollouts_are_drawn_where_they_were_played(monkeypatch):
    """Without a gauge: imagined success is no real one."""
    monkeypatch.setattr(charts, "png", lambda figure: figure)
    history = [{"success": 0.25}, {"success": 0.5}]
    for where, expected in (("real", [2, 0]), ("dream", [0, 2])):
        figure = charts.curves_chart({"run": (history, [], where)})
        drawn = [sum(len(line.get_xdata()) for line in axes.lines) for axes in figure.axes]
        assert drawn == expected


def test_short_episodes_are_told_once():
    """A picture after three decisions is not one after five."""
    short = random_episode(0, 3, 16, "reach", "reach")
    curves = {"real": np.zeros(3), "dream": np.zeros(3)}
    told = report.imagine_numbers(short, short.image, curves, 0.5)
    assert "after 1," in told and "after 3 (last)" in told and "after 5" not in told


def test_names_are_as_short_as_they_can_be(tmp_path):
    """Runs of `compare` are all called dream; what tells them apart is shown."""
    places = [tmp_path / "seed0" / "dream", tmp_path / "seed1" / "dream"]
    assert overview.short_names(places) == ["seed0/dream", "seed1/dream"]
    assert overview.short_names([tmp_path / "a", tmp_path / "a" / "b"]) == ["a", "a/b"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("run missing", ["missing", "not a run folder", "cli.py train"]),
        ("missing run", ["missing", "not a run folder"]),
        ("run run", ["named twice", "leave one out"]),
        ("run other/../run", ["named twice"]),
        ("run --out x.html", ["--out", "one run", "several"]),
        ("run other --out page.txt", ["--out", "page.txt", ".html"]),
        ("run other --out run", ["--out", "run", ".html"]),
        ("run other --out run/config.json/x.html", ["config.json", "is a file"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run")
    finished_run(tmp_path / "other", seed=1)
    before = tree(tmp_path)
    assert_one_line(in_process("report", *arguments.split()), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("names", [["run"], ["run", "other"]])
def test_a_record_that_lacks_a_key_is_one_line(tmp_path, monkeypatch, names):
    """A stages.json of another version, or edited by hand."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(names):
        run = finished_run(tmp_path / name, seed=seed)
    for result in run.stages["evaluate"]["results"].values():
        for of_termination in result.values():
            del of_termination["low"]
    (run.folder / "stages.json").write_text(json.dumps(run.stages))
    before = tree(tmp_path)
    assert_one_line(in_process("report", *names), names[-1], "no 'low'", "train again")
    with pytest.raises(BadRun, match="no 'low'"):  # as at the end of `train`
        report.write_report(run)
    assert tree(tmp_path) == before


# --- a browser -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_does_not_scroll_sideways(tmp_path, width):
    """On a phone and on a desk the page is as wide as the window; wide tables scroll in a box."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    finished_run(tmp_path / "a")
    finished_run(tmp_path / "b", seed=1)
    in_process("report", tmp_path / "a")
    in_process("report", tmp_path / "a", tmp_path / "b")
    measure = "document.body.ariaLabel = this.contentDocument.documentElement.scrollWidth"
    for path in (tmp_path / "a" / "report.html", tmp_path / "comparison.html"):
        probe = tmp_path / "probe.html"
        # In a frame of that width: a window may be no narrower than 500 pixels.
        probe.write_text(
            f'<body><iframe style="width: {width}px; border: 0" onload="{measure}" '
            f'srcdoc="{escape(path.read_text())}"></iframe></body>'
        )
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
        answer = subprocess.run(
            [*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        (seen,) = re.findall(r'<body aria-label="(\d+)"', answer.stdout)
        assert width - 20 <= int(seen) <= width, path.name
