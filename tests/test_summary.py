"""The summary of finished runs: its sums are tested by the README's; here what it does with files
that are spoiled."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pair_runs
import pytest
from test_report import assert_one_line, in_process
from trees import tree

import summary
from runs import Run, config_from_json, preset

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


@pytest.fixture
def results(tmp_path) -> Path:
    """A copy of the committed results."""
    (tmp_path / "results").mkdir()
    shutil.copytree(RESULTS / "runs", tmp_path / "results" / "runs")
    for name in ("bench.json", "kills.json", "fuzz.json", "summary.json"):
        shutil.copy(RESULTS / name, tmp_path / "results" / name)
    return tmp_path / "results"


def finished(folder: Path, **other) -> Run:
    """A run folder with what a committed run measured, as if of a seed that none of them has."""
    record = json.loads((RESULTS / "runs" / "dream-0.json").read_text())
    config = config_from_json(json.dumps(record["config"]))
    Run.create(folder, replace(config, **{"seed": 6, **other}))
    (folder / "stages.json").write_text(json.dumps(record["stages"]))
    return Run.open(folder)


def test_a_run_that_is_added_is_summed_up(results, tmp_path):
    before = json.loads((results / "summary.json").read_text())
    folder = finished(tmp_path / "new").folder
    assert in_process("summary", folder, "--out", results).exit_code == 0
    after = json.loads((results / "summary.json").read_text())
    assert after["dream_success"]["n"] == before["dream_success"]["n"] + 1
    assert after["fuzz_cases"] == before["fuzz_cases"]


@pytest.mark.parametrize(
    "other, told",
    [
        ({"tasks": ("coffee-push", "dial-turn")}, ("not of the preset cpu (tasks: ", "report")),
        ({"rounds": 2}, ("(rounds: saved 2, expected 1)", "report")),
        (
            {"reflector": preset("cpu").reflector},
            ("narrow: saved True, expected False", "--out of their"),
        ),
        ({"seed": 0}, ("its seed 0 is among the reported runs", "dream-0.json", "delete")),
    ],
)
def test_a_run_that_is_not_like_the_reported_ones_is_not_added(results, tmp_path, other, told):
    """A mean over runs of several kinds, or of one seed twice, would be no mean over seeds."""
    folder = finished(tmp_path / "new", **other).folder
    before = tree(tmp_path)
    assert_one_line(in_process("summary", folder, "--out", results), *told)
    assert tree(tmp_path) == before


def test_runs_of_one_name_do_not_replace_each_other(results, tmp_path):
    first = finished(tmp_path / "a" / "run", seed=6).folder
    second = finished(tmp_path / "b" / "run", seed=7).folder
    before = tree(tmp_path)
    told = in_process("summary", first, second, "--out", results)
    assert_one_line(told, "run.json is of another run", "another name")
    assert tree(tmp_path) == before
    assert in_process("summary", first, "--out", results).exit_code == 0
    told = in_process("summary", second, "--out", results)
    assert_one_line(told, "run.json is of another run", "another name")


def test_the_command_of_a_run_makes_it_again():
    """That of the reported runs, and whatever was asked for otherwise."""
    record = json.loads((RESULTS / "runs" / "dream-0.json").read_text())
    config = config_from_json(json.dumps(record["config"]))
    told = summary._command(SimpleNamespace(config=config))
    assert told == record["command"]
    other = replace(config, tasks=config.tasks[:2], rounds=2, demonstrations="data/mine")
    told = summary._command(SimpleNamespace(config=other))
    assert f"--tasks {','.join(config.tasks[:2])} --from data/mine --rounds 2" in told
    libero = replace(preset("libero"), test_starts=50)
    assert "--preset libero --starts 50" in summary._command(SimpleNamespace(config=libero))


def test_equal_rollouts_come_from_the_comparison(results):
    """What summary.json says of LOOP with the dream's rollouts is a row of results/compare."""
    (results / "compare").mkdir()
    shutil.copy(RESULTS / "compare" / "compare.json", results / "compare")
    assert in_process("summary", "--out", results).exit_code == 0
    found = json.loads((results / "summary.json").read_text())
    compared = json.loads((RESULTS / "compare" / "compare.json").read_text())
    (row,) = [row for row in compared["rows"] if row["method"] == "real_equal_rollouts"]
    success = found["simulator_loop_equal_rollouts_success"]
    assert [success[k] for k in ("value", "low", "high", "n")] == list(row["oracle"].values())
    assert success["commit"] == compared["commits"]["real_equal_rollouts"] == "e7e64d1, 29b996c"
    assert found["simulator_loop_equal_rollouts_real_episodes"]["value"] == row["real_episodes"]


def test_a_figure_that_is_no_number_is_not_summed_up(results, tmp_path):
    record = json.loads((results / "runs" / "dream-0.json").read_text())
    record["stages"]["evaluate"]["results"]["policy"]["oracle"]["mean"] = float("nan")
    (results / "runs" / "dream-0.json").write_text(json.dumps(record))
    before = tree(tmp_path)
    told = in_process("summary", "--out", results)
    assert_one_line(told, "dream-0.json", "not readable", "delete")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["fuzz.json", "kills.json", "bench.json", "runs/dream-0.json", "runs/new.json"]
)
@pytest.mark.parametrize(
    "text", ["{}", "null", '{"readers": 5}', '{"stages": []}', "[" * 10**5, b"\xff"]
)
def test_spoiled_results(results, tmp_path, name, text):
    """Told in one line before anything is written; also where the run is to be added."""
    folder = finished(tmp_path / "new").folder
    (results / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(tmp_path)
    assert_one_line(in_process("summary", folder, "--out", results), name, "not readable", "delete")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stage", ["simulator", "evaluate", "reflector"])
def test_a_run_that_cannot_be_summed_up_is_not_added(results, tmp_path, stage):
    run = finished(tmp_path / "new")
    numbers = {name: run.stages[stage][name] for name in ("seconds", "peak_gib", "ledger")}
    (run.folder / "stages.json").write_text(json.dumps(run.stages | {stage: numbers}))
    before = tree(tmp_path)
    told = in_process("summary", run.folder, "--out", results)
    assert_one_line(told, "stages.json: not readable", "train again")
    assert tree(tmp_path) == before


def test_spoiled_screening_and_experts(tmp_path, monkeypatch):
    """The files that these commands add to."""
    monkeypatch.chdir(tmp_path)
    for text in ("[1]\n", "null\n", "x"):
        Path("screening.jsonl").write_text(text)
        assert_one_line(in_process("screen", "--out", "."), "screening.jsonl", "not readable")
        Path("expert.json").write_text(text)
        told = in_process("expert", "--tasks", "reach", "--out", "expert.json")
        assert_one_line(told, "expert.json", "not readable", "another --out")


def test_pairs_of_runs_are_those_of_the_committed_ones():
    """What the narrower networks cost: `tests/pair_runs.py` over both sets of runs."""
    stored = json.loads((RESULTS / "narrow_pairs.json").read_text())
    assert pair_runs.compare(RESULTS / "runs", RESULTS / "narrow" / "runs") == stored["figures"]
    assert {row["n"] for row in stored["figures"].values()} == {6}
    sft = stored["figures"]["sft_success"]
    assert sft["difference"] == pytest.approx(sum(sft["each"]) / 6, abs=1e-3)
    assert sft["low"] < sft["difference"] < sft["high"]
