"""The comparison: what each method changes, what it shares, what it costs, and the table.

The runs themselves are scripted here; one slow test plays a small comparison for real, kills it and
resumes it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from trees import tree
from typer.testing import CliRunner

import cli
import compare
import order
import pipeline
import runs
import train
from checkpoints import save_part
from demos import Episode
from evaluate import TERMINATIONS
from gauge import probe_starts
from instructions import INSTRUCTIONS
from policy import Policy
from ppo import LoopConfig
from reflector import Reflector
from runs import BadRun, Run, RunConfig
from tasks import SPLITS
from vlm import tokenize

CLI = str(Path(cli.__file__).resolve())
DEBUG = runs.preset("debug")


def flat(settings: dict, prefix: str = "") -> dict:
    """{"loop": {"groups": 2}} -> {"loop.groups": 2}"""
    found = {}
    for name, value in settings.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {f"{prefix}{name}": value} if inner is None else inner
    return found


def changed(before: RunConfig, after: RunConfig) -> dict:
    """Every setting that differs, with its new value."""
    old, new = flat(asdict(before)), flat(asdict(after))
    return {name: new[name] for name in new if new[name] != old[name]}


def finished(config: RunConfig = DEBUG, exploration=0, gauge=0, iterations=10, **more):
    """All that `variant` and the budget read of a finished run in the dream."""
    ledgers = {
        "demos": {"demonstrations": 4},
        "sft": {},
        "explore": {"exploration_episodes": exploration},
        "rl": {"gauge_episodes": gauge, **more},
        "evaluate": {"evaluation_episodes": 1000},
    }
    stages = {name: {"ledger": ledger | {"cpu_seconds": 1}} for name, ledger in ledgers.items()}
    stages["rl"]["history"] = [{}] * iterations
    return SimpleNamespace(config=config, stages=stages)


# --- what each method changes --------------------------------------------------------------------

UNTRAINED = {"reflector_fit.steps": 1, "reflector_fit.learning_rate": 1e-9}


SMALL_LOOP = LoopConfig(iterations=4, groups=16)


@pytest.mark.parametrize(
    "method, expected",
    [
        ("dream", {}),
        # 400 + 150 real episodes; an iteration of 10 groups costs 10 x (8 + 1) = 90, six fit
        (
            "real_equal_budget",
            {"rl_env": "real", "real_loop.groups": 10, "real_loop.iterations": 6},
        ),
        # as many rollouts as the dream's 4 x 16 x 8
        (
            "real_equal_rollouts",
            {"rl_env": "real", "real_loop.groups": 16, "real_loop.iterations": 4},
        ),
        # the second collects 20 and has 20 probes for calibration and each of its two looks
        ("rounds", {"rounds": 2, "exploration": 200 - 20 - 3 * 20}),
        ("filtered_bc_equal_budget", {"exploration": 550 // 5}),
        ("dream_no_extra_data", {"extra_data": False}),
        ("dream_untrained_reflector", UNTRAINED),
        ("dream_neither", {"extra_data": False} | UNTRAINED),
    ],
)
def test_a_method_changes_what_its_name_says(method, expected):
    config = RunConfig(seed=3, loop=SMALL_LOOP)
    base = finished(config, exploration=400, gauge=150, iterations=config.loop.iterations)
    assert changed(config, compare.variant(config, method, base)) == expected


def test_help_names_every_method():
    text = CliRunner().invoke(cli.app, ["compare", "--help"], env={"COLUMNS": "200"}).output
    named = text.split("Methods:")[1].split(".")[0].replace("\u2502", " ")
    assert [name.strip() for name in named.split(",")] == list(compare.METHODS)


def test_every_run_has_a_variant_and_shares_stages_in_order():
    config = RunConfig()
    for method, shared in compare.RUNS.items():
        settings = compare.variant(config, method, finished(config, exploration=400))
        assert order.stages_of(settings)[: len(shared)] == shared  # nothing in between is missing


def costs_of_rounds(config: RunConfig) -> tuple[int, int]:
    """Real episodes a task of one round and of two, where the gauge ends nothing early."""
    twice = compare.variant(config, "rounds", finished(config))
    looks = 1 + math.ceil(config.loop.iterations / config.probe_every)
    probed = config.probes * (1 + looks)  # one of them calibrates
    cost = twice.exploration + twice.round_exploration + 2 * probed
    return config.exploration + probed, cost


@pytest.mark.parametrize("preset", ["cpu", "example"])
def test_two_rounds_cost_what_one_does(preset):
    one, two = costs_of_rounds(runs.preset(preset))
    assert two == one


def test_two_rounds_explore_at_least_once():
    """Debug's few episodes leave no room for two rounds at the cost of one."""
    assert compare.variant(DEBUG, "rounds", finished(DEBUG)).exploration == 1
    one, two = costs_of_rounds(DEBUG)
    assert two > one


def test_filtered_bc_has_what_the_dream_has_cost():
    base = finished(RunConfig(), exploration=1000, gauge=300, calibration_episodes=100)
    settings = compare.variant(RunConfig(), "filtered_bc_equal_budget", base)
    assert settings.exploration * len(settings.tasks) == 1400


def test_equal_rollouts_when_the_gauge_ended_the_dream_early():
    config = RunConfig(loop=SMALL_LOOP)
    settings = compare.variant(config, "real_equal_rollouts", finished(config, iterations=3))
    assert changed(config, settings) == {
        "rl_env": "real", "real_loop.iterations": 3, "real_loop.groups": config.loop.groups
    }  # fmt: skip


@pytest.mark.parametrize("branch", [0, 3])
@pytest.mark.parametrize("preset", ["cpu", "debug"])
def test_equal_budget_is_never_exceeded(preset, branch):
    """Every budget from that of one group on: kept, and less than one iteration of it is left."""
    config = runs.preset(preset)
    config = replace(config, real_loop=replace(config.real_loop, branch=branch))
    a_group = config.real_loop.rollouts + (branch > 0)
    for budget in range(a_group, 1500):
        loop = compare.variant(config, "real_equal_budget", finished(config, budget)).rl
        cost = loop.iterations * loop.groups * a_group
        assert cost <= budget < cost + loop.groups * a_group
        assert loop.groups * loop.rollouts <= config.slots
    loop = compare.variant(config, "real_equal_budget", finished(config, 1)).rl
    assert (loop.groups, loop.iterations) == (1, 1)  # the least there is


# --- what a method costs -------------------------------------------------------------------------


def test_real_budget():
    """Exploration, calibration, gauge and RL in the real simulator; not demonstrations, not
    evaluation."""
    assert compare.real_budget(finished(exploration=80, gauge=30)) == 110
    assert compare.real_budget(finished(gauge=30, calibration_episodes=20)) == 50
    assert compare.real_budget(finished(rl_episodes=72)) == 72
    run = finished(exploration=60, gauge=30)
    run.stages |= {"explore_2": {"ledger": {"exploration_episodes": 20}}}
    run.stages |= {"rl_2": {"ledger": {"gauge_episodes": 30}}}
    assert compare.real_budget(run) == 140
    config = replace(DEBUG, extra_data=False)  # its exploration teaches the policy
    assert compare.real_budget(finished(config, exploration=80, gauge=30)) == 110


def test_training_ledger_is_a_sum_over_stages():
    ledger = compare.training_ledger(finished(exploration=8, gauge=3, imagined_frames=7))
    expected = {"demonstrations": 4, "exploration_episodes": 8, "gauge_episodes": 3}
    assert ledger == expected | {"imagined_frames": 7, "cpu_seconds": 4}  # not evaluate's


# --- the table -----------------------------------------------------------------------------------


def record(method: str, seed: int, oracle: float, reflector: float | None = None, **ledger) -> dict:
    results = {"oracle": {"mean": oracle}, "none": {"mean": oracle / 2}}
    results |= {} if reflector is None else {"reflector": {"mean": reflector}}
    return {"method": method, "seed": seed, "results": results, "ledger": ledger}


RECORDS = [
    record("sft", 0, 0.5, 0.3, cpu_seconds=3600, demonstrations=4, demonstration_steps=90),
    record("sft", 1, 0.6, 0.3, cpu_seconds=7200, imagined_frames=3000),
    record("sft", 2, 0.7, 0.3, cpu_seconds=7200, imagined_frames=6000),
    record("real_equal_budget", 0, 0.9, rl_episodes=90, demonstration_steps=90, rl_steps=910),
    record("real_equal_budget", 1, 0.7, rl_episodes=180, evaluation_episodes=500),
    record("filtered_bc", 2, 0.3, 0.2, exploration_episodes=80),
    record("filtered_bc", 1, 0.5, 0.2, exploration_episodes=80),
    record("filtered_bc", 0, 0.4, 0.2, exploration_episodes=80, gauge_episodes=2),
]


def test_table_by_hand():
    """Student's quantile is 4.302653 for three seeds, 12.706205 for two."""
    rows = {row["method"]: row for row in compare.table(RECORDS)}
    assert list(rows) == ["sft", "real_equal_budget", "filtered_bc"]
    sft = rows["sft"]
    # .5 .6 .7: mean .6, standard deviation .1, half an interval 4.302653 * .1 / sqrt(3)
    assert sft["oracle"] == pytest.approx({"mean": 0.6, "low": 0.351586, "high": 0.848414, "n": 3})
    assert sft["reflector"] == pytest.approx({"mean": 0.3, "low": 0.3, "high": 0.3, "n": 3})
    assert sft["none"]["mean"] == pytest.approx(0.3)
    # paired by seed: .5-.4 .6-.5 .7-.3 = .1 .1 .4: mean .2, standard deviation sqrt(.03)
    paired = {"mean": 0.2, "low": -0.2302653, "high": 0.6302653, "n": 3}
    assert sft["against_filtered_bc"] == pytest.approx(paired)
    real = rows["real_equal_budget"]
    assert real["reflector"] is None and real["oracle"]["n"] == 2
    # .9-.4 .7-.5 = .5 .2: mean .35, half an interval 12.706205 * .212132 / sqrt(2) = 1.905931
    paired = {"mean": 0.35, "low": -1.555931, "high": 2.255931, "n": 2}
    assert real["against_filtered_bc"] == pytest.approx(paired, abs=1e-6)
    assert rows["filtered_bc"]["against_filtered_bc"] is None
    costs = [row["real_episodes"] for row in rows.values()]
    assert costs == pytest.approx([0, 135, 242 / 3])
    assert [row["real_steps"] for row in rows.values()] == pytest.approx([30, 500, 0])
    assert sft["demonstrations"] == pytest.approx(4 / 3)
    assert all(row["dream_minus"] is None for row in rows.values())


def test_the_method_is_paired_with_each_other_one():
    """By seed: .8-.5 and .9-.6; of seed 2 there is no dream."""
    dreams = [record("dream", 0, 0.8), record("dream", 1, 0.9)]
    rows = {row["method"]: row for row in compare.table(RECORDS + dreams)}
    paired = {"mean": 0.3, "low": 0.3, "high": 0.3, "n": 2}
    assert rows["sft"]["dream_minus"] == pytest.approx(paired)
    assert rows["real_equal_budget"]["dream_minus"]["mean"] == pytest.approx((-0.1 + 0.2) / 2)
    assert rows["dream"]["dream_minus"] is None
    assert rows["dream"]["against_filtered_bc"]["mean"] == pytest.approx(0.4)


def test_the_dreams_of_the_methods_are_told():
    """Whether they are true, and in how many seeds the gauge kept what LOOP did."""
    dreams = [record("dream", seed, 0.8) | {"agreement": 0.9, "kept": 4 * seed} for seed in (0, 1)]
    sft, *_, dream = compare.table(RECORDS + dreams)
    assert sft["agreement"] is None and sft["loop_kept"] is None
    assert dream["agreement"] == pytest.approx({"mean": 0.9, "low": 0.9, "high": 0.9, "n": 2})
    assert dream["loop_kept"] == {"kept": 1, "n": 2}
    last = compare.markdown([sft, dream]).splitlines()[-1]
    assert last.endswith("| 90.0 (90.0 to 90.0, n = 2) | 1 of 2 |")


def test_one_seed_has_no_interval():
    rows = compare.table([record("sft", 4, 0.5), record("filtered_bc", 4, 0.25)])
    assert rows[0]["oracle"] == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert rows[0]["against_filtered_bc"] == {"mean": 0.25, "low": None, "high": None, "n": 1}


def test_without_filtered_bc_there_is_no_difference():
    (row,) = compare.table([record("sft", 0, 0.5)])
    assert row["against_filtered_bc"] is None


def test_markdown():
    lines = compare.markdown(compare.table(RECORDS)).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| sft | 1 | 0 | 30 | 3,000 | 1.7 | 60.0 (35.2 to 84.8, n = 3) "
        "| 30.0 (30.0 to 30.0, n = 3) | 30.0 (17.6 to 42.4, n = 3) "
        "| +20.0 (-23.0 to +63.0, n = 3) | - | - | - |"
    )
    assert lines[3].startswith("| real_equal_budget | 0 | 135 | 500 | 0 | 0.0 | 80.0 (")
    assert " | - | " in lines[3]
    assert "(0.0 to 100.0, n = 2)" in lines[3]  # Student's is -47.1 to 207.1
    assert lines[4].endswith("| - | - | - | - |")
    one = compare.markdown(compare.table([record("sft", 0, 0.5)]))
    assert "| sft | 0 | 0 | 0 | 0 | 0.0 | 50.0 (n = 1) | - | 25.0 (n = 1) | - | - | - | - |" in one


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], RECORDS[3:4]])
def test_chart_is_a_picture(records):
    picture = imageio.imread(compare.chart(compare.table(records)))
    assert picture.ndim == 3 and picture.shape[1] == 1200
    assert picture[..., :3].std() > 5  # something is drawn


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1]])
def test_files_and_clean_json(tmp_path, records, monkeypatch):
    """Strict JSON also with one seed: no Infinity, no NaN."""
    monkeypatch.setattr(compare, "current_commit", lambda: "abc")
    compare.write(tmp_path, records, "the command", "the machine")

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "compare.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content["records"] == records and content["rows"] == compare.table(records)
    assert (content["command"], content["hardware"]) == ("the command", "the machine")
    assert content["commit"] == "abc"
    assert "`the command`, commit abc; the machine" in (tmp_path / "compare.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.json", "compare.md", "compare.png",
    }  # fmt: skip


def test_numbers_that_are_none_are_not_written(tmp_path):
    with pytest.raises(ValueError):
        compare.write(tmp_path, [record("sft", 0, float("nan"))], "", "")
    assert list(tmp_path.iterdir()) == []


# --- sharing -------------------------------------------------------------------------------------


def script_stage(run: Run, name: str) -> None:
    """Leave what a stage would leave: files that only their names make what they are."""
    config, ledger = run.config, {}
    (run.folder / "pictures").mkdir(exist_ok=True)
    run.episodes_folder.mkdir(exist_ok=True)
    stage = order.round_of(name)[0]
    if stage in ("demos", "explore"):
        count = len(config.tasks) * (config.demos if stage == "demos" else config.exploration)
        first = len(list(run.episodes_folder.glob("episode_*")))
        for number in range(first, first + count):
            path = run.episodes_folder / f"episode_{number:05d}.safetensors"
            path.write_text(f"{stage} {number}")
        (run.episodes_folder / "dataset.json").write_text("{}")
        ledger = {"demonstrations" if stage == "demos" else "exploration_episodes": count}
    if stage == "demos":
        (run.folder / "pictures" / "demonstrations.png").write_text("a contact sheet")
    if stage == "simulator":
        (run.folder / "pictures" / "dream_reach.gif").write_text("a film")
    if stage in ("sft", "filtered_bc", "simulator", "reflector", "dream_bc", "rl"):
        path = run.checkpoint("policy" if stage == "rl" else stage)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"weights of {stage}")
    result = {"ledger": ledger, "line": name}
    if stage == "rl":
        who = "rl" if config.rl_env == "real" else "gauge"
        result = {"ledger": {f"{who}_episodes": 6}, "history": [{}] * config.rl.iterations}
    if stage == "evaluate":
        means = {"sft": 0.25, "policy": 0.5 if config.rl_env == "real" else 0.75}
        if "filtered_bc" in run.stages:
            means |= {"filtered_bc": 0.375, "dream_bc": 0.5}
        result["results"] = {k: {"oracle": {"mean": m}} for k, m in means.items()}
        result["ledger"] = {"evaluation_episodes": 8}
    run.finish_stage(name, 1.0, 1.0, result)


@pytest.fixture
def played(monkeypatch) -> list[tuple[str, str]]:
    """Stages are scripted; the list tells which were played, as ("seed0/dream", "sft")."""
    done: list[tuple[str, str]] = []

    def scripted(run, say, progress, until=None, beside=False):
        for name in order.stages_of(run.config):
            if name not in run.stages:
                if (run.folder.name, name) == KILL.get("at"):
                    raise KeyboardInterrupt
                script_stage(run, name)
                done.append((f"{run.folder.parent.name}/{run.folder.name}", name))
            if name == until:
                break

    monkeypatch.setattr(pipeline, "train", scripted)
    KILL.clear()
    return done


KILL: dict[str, tuple[str, str]] = {}  # {"at": (method, stage)}: where the scripted run is ended


def base_run(folder: Path) -> Run:
    run = Run.create(folder, DEBUG)
    for name in order.STAGES:
        script_stage(run, name)
    return run


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", [name for name in compare.RUNS if name != "dream"])
def test_share_copies_exactly_the_shared_stages(tmp_path, method):
    base = base_run(tmp_path / "dream")
    before = tree(tmp_path / "dream")
    settings, shared = compare.variant(DEBUG, method, base), compare.RUNS[method]
    compare._share(base, tmp_path / method, settings, shared)
    expected = {"config.json", "stages.json", "pictures/demonstrations.png"}
    expected |= {"episodes/dataset.json", "checkpoints/sft.safetensors"}
    episodes = 4 + (4 if "explore" in shared else 0)  # two demonstrations of two tasks, and so on
    expected |= {f"episodes/episode_{i:05d}.safetensors" for i in range(episodes)}
    if "filtered_bc" in shared:
        expected |= {"checkpoints/filtered_bc.safetensors"}
    if settings.rl_env == "real":  # trains none, and is stopped by the dream's in the evaluation
        expected |= {"checkpoints/reflector.safetensors"}
    if "simulator" in shared:
        expected |= {"checkpoints/simulator.safetensors", "pictures/dream_reach.gif"}
    assert contents(tmp_path / method) == expected
    run = Run.create(tmp_path / method, settings)  # the settings are those of the method
    assert run.stages == {name: base.stages[name] for name in shared}
    for name in expected - {"config.json", "stages.json"}:
        assert tree(tmp_path / method)[name] == before[name]
    assert tree(tmp_path / "dream") == before
    assert {path.name for path in tmp_path.iterdir()} == {"dream", method}


def test_a_copy_that_was_killed_begins_anew(tmp_path, monkeypatch):
    base = base_run(tmp_path / "dream")
    target = tmp_path / "dream_no_extra_data"
    arguments = (base, target, replace(DEBUG, extra_data=False), ("demos", "sft"))
    copied = []

    def copy_some(source, destination):
        if len(copied) == 3:
            raise KeyboardInterrupt
        copied.append(destination.write_bytes(source.read_bytes() + b"spoilt"))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compare.shutil, "copy", copy_some)
        compare._share(*arguments)
    assert not target.exists()  # what is half copied does not look like a run
    (left,) = tmp_path.glob(".dream_no_extra_data*")
    (left / "episodes" / "episode_99999.safetensors").write_text("spoilt")  # of an earlier base
    compare._share(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"dream", "dream_no_extra_data"}
    assert not any(b"spoilt" in path.read_bytes() for path in target.rglob("*") if path.is_file())


def test_share_leaves_what_is_there(tmp_path):
    """A run that was begun goes on; a folder of something else is refused, not deleted."""
    base = base_run(tmp_path / "dream")
    settings = compare.variant(DEBUG, "rounds", base)
    compare._share(base, tmp_path / "rounds", settings, ("demos", "sft"))
    script_stage(Run.create(tmp_path / "rounds", settings), "explore")
    begun = tree(tmp_path / "rounds")
    compare._share(base, tmp_path / "rounds", settings, ("demos", "sft"))
    assert tree(tmp_path / "rounds") == begun
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("It was a dark and stormy night.")
    compare._share(base, tmp_path / "mine", settings, ("demos", "sft"))
    assert contents(tmp_path / "mine") == {"thesis.txt"}
    with pytest.raises(BadRun, match="not a run folder"):
        Run.create(tmp_path / "mine", settings)


# --- the whole comparison, scripted --------------------------------------------------------------


def compare_quietly(out: Path, seeds, methods) -> list[dict]:
    return compare.compare(out, DEBUG, seeds, methods, lambda text: None, lambda *_: None)


def test_shared_stages_are_played_once(tmp_path, played):
    alone = ("more_sft", "filtered_bc_equal_budget")
    methods = [name for name in compare.METHODS if name not in alone]
    records = compare_quietly(tmp_path, [0, 1], methods)
    assert [(r["seed"], r["method"]) for r in records] == [(s, m) for s in (0, 1) for m in methods]
    assert max(Counter(played).values()) == 1
    of = {name: [s for run, s in played if run == f"seed1/{name}"] for name in compare.RUNS}
    assert of["dream"] == list(order.STAGES)
    assert of["real_equal_budget"] == of["real_equal_rollouts"] == ["rl", "evaluate"]
    assert of["dream_no_extra_data"] == of["dream_neither"] == list(order.STAGES[4:])
    assert of["dream_untrained_reflector"] == list(order.STAGES[5:])
    assert of["rounds"] == list(order.stages_of(replace(DEBUG, rounds=2))[2:])


def test_records(tmp_path, played):
    """Whatever the order and however often a method is named."""
    names = ["real_equal_budget", "sft", "dream", "dream_no_extra_data", "sft", "dream"]
    records = compare_quietly(tmp_path, [2, 2], names)
    assert [r["method"] for r in records] == names[:4]
    means = {r["method"]: r["results"]["oracle"]["mean"] for r in records}
    assert means == dict(zip(names, (0.5, 0.25, 0.75, 0.75)))
    costs = {row["method"]: row["real_episodes"] for row in compare.table(records)}
    # exploration 4, probes 6; without extra data the exploration teaches the policy alone
    assert costs == {"real_equal_budget": 6, "sft": 0, "dream": 10, "dream_no_extra_data": 10}
    assert records[1]["ledger"] == {"demonstrations": 4, "cpu_seconds": 2}
    assert all("evaluation_episodes" not in r["ledger"] for r in records)
    again = compare_quietly(tmp_path, [2], names)
    assert again == records and max(Counter(played).values()) == 1


@pytest.mark.parametrize(
    "method, stage",
    [("dream", "demos"), ("dream", "rl"), ("rounds", "explore"), ("rounds", "rl_2")],
)
def test_a_killed_comparison_goes_on(tmp_path, played, method, stage):
    KILL["at"] = (method, stage)
    with pytest.raises(KeyboardInterrupt):
        compare_quietly(tmp_path, [0], ["rounds"])
    KILL.clear()
    compare_quietly(tmp_path, [0], ["rounds"])
    assert max(Counter(played).values()) == 1
    both = [*order.STAGES, *order.stages_of(replace(DEBUG, rounds=2))[2:]]
    assert [name for _, name in played] == both


def test_other_settings_are_refused(tmp_path, played):
    compare_quietly(tmp_path, [0], ["sft"])
    before = tree(tmp_path)
    other = replace(DEBUG, test_starts=7)
    with pytest.raises(BadRun, match="test_starts: saved 2, expected 7.*choose another --out"):
        compare.compare(tmp_path, other, [0], ["sft"], print, print)
    assert tree(tmp_path) == before
    with pytest.raises(BadRun, match="seed0"):  # before seed 1, whose turn would be first, begins
        compare.compare(tmp_path, other, [1, 0], ["sft"], print, print)
    assert tree(tmp_path) == before


@pytest.fixture
def imitated(monkeypatch) -> list[dict]:
    """Imitation without data and machine: the list tells what each fit was given."""
    fits: list[dict] = []
    demonstrations = [SimpleNamespace(name=f"demo {i}", succeeded=True) for i in range(4)]
    exploration = [SimpleNamespace(name=f"explored {i}", succeeded=i == 2) for i in range(4)]

    def scripted_fit(part, sample, settings, on_step):
        if KILL.get("at") == ("fit", len(fits)):
            raise KeyboardInterrupt
        fits.append({"episodes": sample, "settings": settings})

    def evaluated(policy, env, starts, reflector):
        assert reflector == "the dream's"  # so that there are three terminations
        return {"oracle": {"mean": 0.6}}

    real = SimpleNamespace(open=lambda: None)
    monkeypatch.setattr(train, "sources", lambda run: (demonstrations, exploration, None))
    monkeypatch.setattr(train, "RealWorkers", lambda config: nullcontext(real))
    monkeypatch.setattr(compare, "evaluate_all", evaluated)
    monkeypatch.setattr(Run, "policy", lambda run, name: Policy(run.config.policy))
    monkeypatch.setattr(Run, "reflector", lambda run: f"the {run.folder.name}'s")
    monkeypatch.setattr(compare, "fit", scripted_fit)
    monkeypatch.setattr(
        compare, "imitation_batches", lambda episodes, batch, seed: [e.name for e in episodes]
    )
    return fits


def test_imitations(tmp_path, played, imitated):
    """More SFT sees the demonstrations, as long and as fast as filtered BC, which is a stage of the
    dream's run; only the latter pays for exploration. Finished, neither is done again."""
    names = ["more_sft", "filtered_bc"]
    records = compare_quietly(tmp_path, [0], names)
    settings = {"episodes": [f"demo {i}" for i in range(4)], "settings": DEBUG.filtered_bc}
    assert imitated == [settings]
    assert [r["results"]["oracle"]["mean"] for r in records] == [0.6, 0.375]
    ledgers = [r["ledger"] for r in records]
    assert "exploration_episodes" not in ledgers[0] and ledgers[1]["exploration_episodes"] == 4
    assert [ledger["demonstrations"] for ledger in ledgers] == [4, 4]
    assert ledgers[0]["cpu_seconds"] >= 2 and ledgers[1]["cpu_seconds"] == 4
    before = tree(tmp_path)
    assert compare_quietly(tmp_path, [0], names) == records
    assert tree(tmp_path) == before and len(imitated) == 1


def test_filtered_bc_of_more_episodes(tmp_path, played, imitated):
    """A run up to filtered BC, on the dream's demonstrations and SFT; done once."""
    name = "filtered_bc_equal_budget"
    (record,) = compare_quietly(tmp_path, [0], [name])
    assert [s for run, s in played if run == f"seed0/{name}"] == ["explore", "filtered_bc"]
    base, run = (Run.open(tmp_path / "seed0" / folder) for folder in ("dream", name))
    assert changed(base.config, run.config) == {"exploration": compare.real_budget(base) // 2}
    assert record["results"] == {"oracle": {"mean": 0.6}}
    assert record["ledger"] == compare.training_ledger(run)
    before = tree(tmp_path)
    assert compare_quietly(tmp_path, [0], [name]) == [record] and tree(tmp_path) == before


def test_a_killed_imitation_begins_anew(tmp_path, played, imitated):
    KILL["at"] = ("fit", 0)
    with pytest.raises(KeyboardInterrupt):
        compare_quietly(tmp_path, [0], ["more_sft"])
    assert not (tmp_path / "seed0" / "more_sft.json").exists()
    KILL.clear()
    records = compare_quietly(tmp_path, [0], ["more_sft"])
    assert [len(fit["episodes"]) for fit in imitated] == [4] and len(records) == 1


def test_the_ledger_counts_what_an_iteration_really_costs():
    """A group of LOOP: the resets that the real environment counts, against `variant`'s price."""
    import numpy as np
    import torch

    import ppo

    class Counting:
        """Real only in what it counts: as vecenv.VecRealEnv, a reset or a branch is an episode."""

        num_envs, real_resets, config = 8, 0, SimpleNamespace(horizon=2)
        observation = {
            "image": np.zeros((8, 64, 64, 3), np.uint8),
            "state": np.zeros((8, 4), np.float32),
            "instruction": ("reach",) * 8,
        }

        def begin(self, count):
            self.real_resets += count
            self.done = np.arange(8) >= count
            return self.observation

        def reset(self, seed=None, options=None):
            return self.begin(len(options["starts"])), {}

        def set_states(self, states):
            return self.begin(len(states))

        def get_states(self, slots):
            return list(slots)

        def step(self, chunks):
            self.done[:] = True
            return self.observation, np.zeros(8), np.ones(8, bool), None, {}

    for branch, rollouts in ((3, ppo.branch_rollouts), (0, ppo.plain_rollouts)):
        config = replace(DEBUG, real_loop=LoopConfig(groups=2, rollouts=4, branch=branch))
        loop = compare.variant(config, "real_equal_budget", finished(config, 100)).rl
        env, generator = Counting(), torch.Generator().manual_seed(0)
        rollouts(env, Policy(config.policy), [None] * loop.groups, loop, generator)
        assert 100 // env.real_resets == loop.iterations == (10 if branch else 12)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ("--methods sft,magic", ["--methods", "'magic'", "expected one of", "filtered_bc"]),
        ("--methods ,", ["--methods", "expected one of"]),
        ("--seeds x", ["--seeds", "'x'", "0 to 99"]),
        ("--seeds 0,", ["--seeds", "'0,'", "0 to 99"]),
        ("--seeds 0,100", ["--seeds", "'0,100'", "0 to 99"]),
        ("--seeds -1", ["--seeds", "0 to 99"]),
        ("--seeds 1.5", ["--seeds", "0 to 99"]),
        ("--preset huge", ["'huge'", "cpu, debug, notebook, example, gpu, paper or libero"]),
        ("--starts 0", ["--starts", "got 0", "1 to 100000"]),
        ("--out file/new", ["is a file", "choose another --out"]),
        ("--out mine", ["mine/seed0/dream", "not a run folder", "choose another --out"]),
        ("--out old", ["old/seed0/dream", "other settings", "choose another --out"]),
        ("--nonsense", ["--nonsense", "compare --help"]),
    ],
)
def test_bad_options(tmp_path, monkeypatch, options, words):
    """One line that says what to do, exit code 2, every file as it was."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    Path("mine/seed0/dream").mkdir(parents=True)
    Path("mine/seed0/dream/thesis.txt").write_text("It was a dark and stormy night.")
    Run.create(Path("old/seed0/dream"), replace(DEBUG, demos=3))
    before = tree(tmp_path)
    given = ["compare", "--preset", "debug", "--out", "new", *options.split()]
    result = CliRunner().invoke(cli.app, given)  # of an option that comes twice the last one counts
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert (result.exit_code, result.stdout) == (2, "")
    assert tree(tmp_path) == before


def test_the_command_writes_what_it_was_told(tmp_path, monkeypatch, played):
    monkeypatch.chdir(tmp_path)
    options = "--preset debug --seeds 1,0,1 --methods dream,sft,dream --starts 3"
    result = CliRunner().invoke(cli.app, f"compare --out new {options}".split())
    assert result.exit_code == 0, result.output
    content = json.loads(Path("new/compare.json").read_text())
    assert content["command"] == f"python cli.py compare {options}"
    assert [(r["seed"], r["method"]) for r in content["records"]] == [
        (1, "dream"), (1, "sft"), (0, "dream"), (0, "sft"),
    ]  # fmt: skip
    assert Run.open(Path("new/seed1/dream")).config == replace(DEBUG, seed=1, test_starts=3)
    assert Path("new/compare.md").read_text() in result.stdout


# --- the whole comparison, for real --------------------------------------------------------------

PATIENCE = 1800  # seconds


def kill_when(command: list[str], record: Path, stage: str) -> dict:
    """The command, killed as soon as `record` (stages.json) has the stage: what was done then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + PATIENCE
    while not (record.is_file() and stage in json.loads(record.read_text())):
        assert process.poll() is None and time.time() < deadline, "it ended before it was killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads(record.read_text())
    assert stage in done and "evaluate" not in done
    return done


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """The real command with every method, killed in its base run and in the second round, then
    given again."""
    out = tmp_path / "compare"
    options = ["--preset", "debug", "--seeds", "0", "--methods", ",".join(compare.METHODS)]
    command = [sys.executable, CLI, "compare", *options, "--out", str(out)]
    record_of = {name: out / "seed0" / name / "stages.json" for name in compare.RUNS}
    begun = kill_when(command, record_of["dream"], "sft")
    rounds = kill_when(command, record_of["rounds"], "explore_2")
    assert not (out / "compare.json").exists()

    finish = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert finish.returncode == 0, finish.stderr
    stages = {name: json.loads(path.read_text()) for name, path in record_of.items()}
    base = stages["dream"]
    for name, done in (("dream", begun), ("rounds", rounds)):  # the very same seconds and figures
        assert {stage: stages[name][stage] for stage in done} == done
    for name, shared in compare.RUNS.items():
        assert {stage: stages[name][stage] for stage in shared} == {s: base[s] for s in shared}
        assert tuple(stages[name]) == order.stages_of(Run.open(out / "seed0" / name).config)
    assert stages["dream_untrained_reflector"]["reflector"] != base["reflector"]
    assert stages["dream_no_extra_data"]["simulator"] != base["simulator"]
    budget = compare.real_budget(Run.open(out / "seed0" / "dream"))
    assert 0 < stages["real_equal_budget"]["rl"]["ledger"]["rl_episodes"] <= budget

    content = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in content["rows"]] == list(compare.METHODS)
    for entry in content["records"]:
        assert set(entry["results"]) == set(TERMINATIONS)
        assert {result["n"] for result in entry["results"].values()} == {4}
    # The same SFT policy on the same starts, in every run.
    evaluated = [run["evaluate"]["results"]["sft"]["oracle"] for run in stages.values()]
    assert all(result == evaluated[0] for result in evaluated)
    assert (out / "compare.md").read_text() in finish.stdout
    assert imageio.imread(out / "compare.png").ndim == 3

    before = tree(out)
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0 and tree(out) == before
    assert again.stdout.count("done already") == sum(len(run) for run in stages.values())


@pytest.mark.parametrize("rl_env", ["real", "dream"])
def test_loop_takes_the_settings_of_where_it_plays(tmp_path, monkeypatch, rl_env):
    """Dream and reality explore with budgets of their own; nobody may mix them up."""
    loops = LoopConfig(groups=3, iterations=7)
    config = replace(DEBUG, rl_env=rl_env, probes=0, slots=24, loop=loops)
    run = runs.Run.create(tmp_path / "run", config)
    begin = "dream_bc" if rl_env == "dream" else "sft"
    save_part(run.checkpoint(begin), Policy(config.policy), asdict(config.policy))
    seen = []

    def loop(env, policy, draw, settings, seed, on_iteration, keeper):
        seen.append(settings)
        metrics = {"success": 0.0, "decisions": 1, "groups_with_spread": 0.0}
        on_iteration(0, metrics)
        return [metrics]

    nothing = {"real_episodes": 0, "real_steps": 0}
    real = SimpleNamespace(open=lambda: None, count=lambda: nothing)
    monkeypatch.setattr(train, "loop", loop)
    monkeypatch.setattr(train, "sources", lambda run: ([], [], None))
    monkeypatch.setattr(train, "WorldEnv", lambda *a: SimpleNamespace(imagined_frames=0))
    monkeypatch.setattr(runs.Run, "simulator", lambda self, camera: None)
    monkeypatch.setattr(runs.Run, "reflector", lambda self: None)
    steps = []
    train.stage_rl(run, real, lambda step, of, metrics: steps.append(of))
    assert seen == [config.loop if rl_env == "dream" else DEBUG.real_loop]
    assert steps == [seen[0].iterations]


@pytest.mark.parametrize("number, players", [(1, ["sft", "explorer"]), (2, ["policy", "policy"])])
def test_a_better_policy_explores_as_soon_as_there_is_one(tmp_path, monkeypatch, number, players):
    """SFT plays two fifths of the starts of each task, then a policy that has imitated what
    succeeded; not in later rounds; each start once."""
    config = replace(DEBUG, exploration=5, round_exploration=5)
    run = runs.Run.create(tmp_path / "run", config)
    played, taught = [], []

    def explored(env, policy, starts, noise, generator):
        played.append((policy, [(start.task, start.seed) for start in starts]))
        return [SimpleNamespace(name=s.seed, succeeded=s.seed % 2 == 0) for s in starts]

    def imitate(run, policy, name, sample, settings, progress):
        taught.append((policy, name, [e.name for e in sample], settings.steps))

    monkeypatch.setattr(train, "explored", explored)
    monkeypatch.setattr(train, "_imitate", imitate)
    monkeypatch.setattr(train, "imitation_batches", lambda episodes, batch, seed: episodes)
    demo = SimpleNamespace(name="demo", succeeded=True)
    monkeypatch.setattr(train, "sources", lambda run: ([demo], [], None))
    monkeypatch.setattr(runs.Run, "policy", lambda run, name: name)
    monkeypatch.setattr(train.demos, "save", lambda folder, episodes, *_: played.append(episodes))
    spent = {"real_episodes": 10, "real_steps": 100}
    env = SimpleNamespace(camera=None)
    real = SimpleNamespace(open=lambda: env, count=lambda: spent)
    result = train.stage_explore(run, real, None, number)
    begin = SPLITS["explore"].start + (5 if number == 2 else 0)
    parts = [[(t, begin + i) for t in config.tasks for i in some] for some in ((0, 1), (2, 3, 4))]
    assert played[:2] == list(zip(players, parts, strict=True))
    assert [e.name for e in played[2]] == [seed for part in parts for _, seed in part]
    assert result["ledger"] == {"exploration_episodes": 10, "exploration_steps": 100}
    good = [seed for _, seed in parts[0] if seed % 2 == 0]
    steps = DEBUG.filtered_bc.steps // 4
    expected = [("sft", "explorer", ["demo", *good], steps)] if "explorer" in players else []
    assert taught == expected


def test_filtered_bc_imitates_demonstrations_and_successes(tmp_path, monkeypatch):
    """From SFT, with settings of its own; failures teach it nothing; LOOP then begins there."""
    run = runs.Run.create(tmp_path / "run", DEBUG)
    sft = Policy(DEBUG.policy)
    save_part(run.checkpoint("sft"), sft, asdict(DEBUG.policy))
    demonstrations = [SimpleNamespace(name="demo", succeeded=True)]
    exploration = [SimpleNamespace(name=f"explored {i}", succeeded=i == 1) for i in range(3)]
    monkeypatch.setattr(train, "sources", lambda run: (demonstrations, exploration, None))
    monkeypatch.setattr(train, "imitation_batches", lambda episodes, batch, seed: episodes)
    seen = []

    def fit(part, episodes, settings, on_step, keeper):
        seen.append(([e.name for e in episodes], settings))
        assert torch.equal(part.mean_head.weight, sft.mean_head.weight)
        part.mean_head.weight.data += 1
        return {"l1": 0.1}

    monkeypatch.setattr(train, "fit", fit)
    result = train.stage_filtered_bc(run, None, lambda *_: None)
    assert seen == [(["demo", "explored 1"], DEBUG.filtered_bc)] and result["successes"] == 1
    assert torch.equal(run.policy("filtered_bc").mean_head.weight, sft.mean_head.weight + 1)
    assert torch.equal(run.policy("sft").mean_head.weight, sft.mean_head.weight)


def test_dream_bc_does_on_dreams_what_filtered_bc_does_on_real_frames(tmp_path, monkeypatch):
    """From filtered BC of the same round, half of its steps at half its rate; real episode and
    dream are both given filtered BC's own means on the real frames, not what was played."""
    run = runs.Run.create(tmp_path / "run", DEBUG)
    before = Policy(DEBUG.policy).eval()
    save_part(run.checkpoint("filtered_bc_2"), before, asdict(DEBUG.policy))

    def episode(grey: int, succeeded: bool) -> Episode:
        size, shape = DEBUG.env.size, (2, *before.action_shape)
        image, state = np.full((3, size, size, 3), grey, np.uint8), np.zeros((3, 4), np.float32)
        success = np.array([0, 0, succeeded], np.uint8)
        played, task = np.ones(shape, np.float32), DEBUG.tasks[0]
        words = INSTRUCTIONS[task][0]
        return Episode(image, state, played, success, task, words, grey, "exploration")

    exploration = [episode(20 + i, i == 1) for i in range(3)]
    monkeypatch.setattr(train, "sources", lambda run: ([episode(10, True)], exploration, "camera"))
    monkeypatch.setattr(train, "imitation_batches", lambda episodes, batch, seed: episodes)
    monkeypatch.setattr(runs.Run, "simulator", lambda run, camera: f"simulator, {camera}")
    world = SimpleNamespace(imagined_frames=0)
    monkeypatch.setattr(train, "open_loop", lambda run, simulator, slots: world)

    def dream_along(world, episodes):
        world.imagined_frames += 10 * len(episodes)
        assert all((e.action == 1).all() for e in episodes)  # the dream obeys what was played
        return [replace(e, image=e.image + 100) for e in episodes]

    seen = []

    def fit(part, episodes, settings, on_step, keeper):
        seen.append((episodes, settings))
        part.mean_head.weight.data += 1
        return {"l1": 0.1}

    monkeypatch.setattr(train, "dream_along", dream_along)
    monkeypatch.setattr(train, "fit", fit)
    result = train.stage_dream_bc(run, None, lambda *_: None, 2)
    full = DEBUG.filtered_bc
    ((taught, settings),) = seen
    assert settings == replace(
        full, steps=full.steps // 2, learning_rate=full.learning_rate / 2
    ) and result["ledger"] == {"imagined_frames": 20}
    assert [int(e.image.max()) for e in taught] == [10, 21, 110, 121]
    for real, dream in zip(taught[:2], taught[2:], strict=True):
        image = torch.from_numpy(real.image[:2]).movedim(-1, 1) / 255 - 0.5
        words = tokenize([real.instruction] * 2)
        with torch.no_grad():
            mean, _ = before.distribution(image, torch.zeros(2, 4), words)
        assert np.allclose(real.action, mean.clamp(-1, 1).numpy(), atol=1e-6)
        assert (dream.action == real.action).all() and not (real.action == 1).all()
    after = run.policy("dream_bc_2").mean_head.weight
    assert torch.equal(after, before.mean_head.weight + 1)


def test_calibrate_gives_each_task_the_eta_that_agrees_with_reality(tmp_path, monkeypatch):
    """Real starts that are neither the gauge's nor another round's; the policy that LOOP begins
    with; dreams that nothing stops; counted, and the run's reflector has them from then on."""
    config = replace(DEBUG, probes=4)
    run = runs.Run.create(tmp_path / "run", config)
    played = []

    def play(env, starts, act, source, after_success):
        played.append((env, list(starts), act, after_success))
        of_start = [SimpleNamespace(task=s.task, seed=s.seed, succeeded=i % 2 == 0)
                    for i, s in enumerate(starts)]  # fmt: skip
        return of_start

    spent = {"real_episodes": 8, "real_steps": 99}
    real = SimpleNamespace(open=lambda: "reality", count=lambda: spent)
    monkeypatch.setattr(train.demos, "play", play)
    monkeypatch.setattr(train.demos, "describe", lambda folder: SimpleNamespace(camera="camera"))
    monkeypatch.setattr(train, "start_frames", lambda episodes: {"of": len(episodes)})
    monkeypatch.setattr(runs.Run, "policy", lambda run, name: SimpleNamespace(act=f"{name} acts"))
    monkeypatch.setattr(runs.Run, "simulator", lambda run, camera: camera)
    monkeypatch.setattr(runs.Run, "reflector", lambda run: "reflector")
    world = SimpleNamespace(imagined_frames=7)
    monkeypatch.setattr(train, "open_loop", lambda run, simulator, slots, starts: world)
    # Where reality succeeds R stays above 0.6 (first task) or 0.3, where it fails above 0.4 or 0.1.
    high, low = ([[0.6] * 3, [0.4] * 3] * 2, [[0.3] * 3, [0.1] * 3] * 2)
    curves = [np.array(curve) for curve in high + low]
    monkeypatch.setattr(train, "judge_episodes", lambda reflector, dreams: curves)
    run.stages["dream_bc_2"] = {}
    result = train.stage_calibrate(run, real, lambda *_: None, 2)
    first, second = config.tasks
    assert 0.4 <= result["etas"][first] < 0.6 and 0.1 <= result["etas"][second] < 0.3
    assert result["ledger"] == {
        "calibration_episodes": 8, "calibration_steps": 99, "imagined_frames": 7,
    }  # fmt: skip
    (env, starts, act, after), (dream, again, _, dream_after) = played
    assert (env, act, after) == ("reality", "dream_bc_2 acts", 0)
    assert (dream, again, dream_after) == (world, starts, None) and len(starts) == 8
    others = probe_starts(config.tasks, 4, config.seed)
    others += probe_starts(config.tasks, 4, config.seed, skipped=4)
    assert not set(starts) & set(others)
    monkeypatch.undo()
    run.stages["calibrate"] = {"etas": {first: 0.5, second: 0.1}}
    run.stages["calibrate_2"] = result
    part = Reflector(config.reflector)
    save_part(run.checkpoint("reflector"), part, part.description())
    for task in config.tasks:
        assert run.reflector().dream_eta(INSTRUCTIONS[task][0]) == result["etas"][task]
    assert run.reflector().dream_eta("another task") == config.reflector.threshold


def test_calibrate_spends_no_real_episode_that_is_not_given(tmp_path):
    """Without probes, or under the stop rule that needs none."""
    for config in (replace(DEBUG, probes=0), replace(DEBUG, stop_rule="novelty")):
        run = SimpleNamespace(config=config)
        result = train.stage_calibrate(run, None, lambda *_: None)
        assert result["etas"] == {} and result["ledger"] == {}


def test_a_stage_name_tells_its_round():
    """Only a number at the end is one."""
    assert order.round_of("filtered_bc") == ("filtered_bc", 1)
    assert order.round_of("explore") == ("explore", 1) and order.round_of("rl_2") == ("rl", 2)


def test_a_round_repeats_all_from_exploration_on():
    """Imitation too, for it is what the round's LOOP begins with; and so without extra data, which
    is withheld from simulator and reflector only."""
    two = order.stages_of(replace(DEBUG, rounds=2))
    again = ("explore_2", "filtered_bc_2", "simulator_2", "reflector_2", "dream_bc_2",
             "calibrate_2", "rl_2")  # fmt: skip
    assert two == (*order.STAGES[:-1], *again, "evaluate")
    assert order.stages_of(replace(DEBUG, rounds=2, extra_data=False)) == two
    assert order.named("rl", 1) == "rl" and order.named("rl", 2) == "rl_2"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"results": {}}', '{"results": 1, "ledger": {}}', '{"results": {}, "ledger": {}}'],
)
def test_a_finished_method_that_is_damaged_is_told_in_a_line(tmp_path, text):
    path = tmp_path / "more_sft.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="more_sft.json: not readable .*; expected .*; delete it"):
        compare._read(path, DEBUG)


def test_a_method_of_other_settings_is_not_taken_for_this_one(tmp_path):
    """An entry of an earlier version, which does not tell its settings, is."""
    path = tmp_path / "more_sft.json"
    entry = {"results": {"oracle": {"mean": 0.5}}, "ledger": {}}
    for config in (DEBUG, None):
        own = {"config": json.loads(json.dumps(asdict(config)))} if config else {}
        path.write_text(json.dumps(entry | own))
        assert compare._read(path, DEBUG) == entry
    path.write_text(json.dumps(entry | {"config": asdict(replace(DEBUG, test_starts=99))}))
    with pytest.raises(ValueError, match=r"of other settings \(test_starts: saved 99.*delete it"):
        compare._read(path, DEBUG)
