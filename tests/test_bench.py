"""The timing itself against a clock that is scripted, counts against sums done by hand, and the
whole command at debug size: what it writes must agree with itself."""

import copy
import json
import math
import time
from dataclasses import asdict, replace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from scripted import random_episode
from torch import nn
from typer.testing import CliRunner

import bench
import bench_report
import cli
import runs
import summary
from camera import Camera
from checkpoints import save_part
from demos import Episode
from instructions import INSTRUCTIONS
from reflector import Reflector

CAMERA = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, 64)
CONFIG = runs.preset("debug")


def recorded(seed: int, length: int = 6) -> Episode:
    """An episode of the debug preset's tasks in turn."""
    task = CONFIG.tasks[seed % len(CONFIG.tasks)]
    return random_episode(seed, length, 64, task, INSTRUCTIONS[task][0])


@pytest.fixture(scope="module")
def parts() -> bench.Parts:
    return bench.build(CONFIG, [recorded(seed) for seed in range(4)], CAMERA)


# --------------------------------------------------------------------------------------- the timing


def test_works_are_timed_in_turns():
    """Three turns a, b, a, b, a, b after the warm-up; rates are what the units count per second."""
    done = []

    def work(name: str, seconds: float, each: float, most: int = 1000) -> bench.Work:
        def do(units: int) -> float:
            done.append((name, units))
            return seconds * units

        return bench.Work(do, each, most)

    works = {"a": work("a", 0.5, 64), "b": work("b", 0.01, 3, most=20), "slow": work("slow", 7, 1)}
    rates = bench.alternate(works, repeats=3, seconds=1.0)
    warm = [("a", 1), ("a", 1), ("b", 1), ("b", 1), ("slow", 1)]  # the slow one is not done again
    assert done == warm + 3 * [("a", 2), ("b", 20), ("slow", 1)]
    assert rates["a"] == pytest.approx([128] * 3)
    assert rates["b"] == pytest.approx([300] * 3)
    assert rates["slow"] == pytest.approx([1 / 7] * 3)


def test_the_stopwatch_counts_each_second_once(monkeypatch):
    """Of a call that calls others only what these did not take is its own; methods come back."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Machine:
        def inner(self, seconds):
            now[0] += seconds
            return seconds

        def outer(self):
            now[0] += 1
            return self.inner(2) + self.inner(4)

    machine = Machine()
    with bench.watched({"in": (machine, "inner"), "out": (machine, "outer")}) as watch:
        assert machine.outer() == 6
        machine.inner(8)
    assert watch.seconds == {"in": 14.0, "out": 1.0}
    machine.outer()
    assert watch.seconds == {"in": 14.0, "out": 1.0} and vars(machine) == {}


def test_a_spread_is_the_median_with_its_ends():
    assert bench.spread([3.0, 1.0, 2.0, 10.0]) == {
        "value": 2.5, "low": 1.0, "high": 10.0, "n": 4, "each": [3.0, 1.0, 2.0, 10.0],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- counts


def test_flops_are_those_counted_by_hand():
    """A convolution and a linear layer: two for each multiplication and addition, at every output
    pixel; of two calls the sum."""
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    calls = [((torch.zeros(2, 3, 16, 10),), {}), ((torch.zeros(1, 3, 16, 10),), {})]
    assert bench.flops_of(conv, calls) == 3 * (2 * 3 * 3 * 3) * 8 * 16 * 10
    linear = nn.Linear(5, 7, bias=False)
    assert bench.flops_of(linear, [((), {"input": torch.zeros(4, 5)})]) == 2 * 4 * 5 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_matrix_products_are_as_large_as_they_say(dtype):
    """2 n^3 by the counter, for the product and for the convolution that is one."""
    works = bench.matrix_products(256, dtype)
    assert set(works) == {"product", "convolution"}
    for work in works.values():
        assert work.each == 2 * 256**3
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            assert work.do(3) > 0
        assert counter.get_total_flops() == 3 * work.each


def test_the_denoisers_calls_are_those_of_one_decision(parts):
    """All rows of a decision of 64 rollouts, in as many blocks as the world makes, and the U-Net is
    as it was."""
    calls = bench.denoiser_calls(parts)
    assert sum(len(arguments[0]) for arguments, _ in calls) == bench.BATCH
    assert "forward" not in vars(parts.simulator.unet)


# ------------------------------------------------------------------------------------ what is timed


def test_nothing_leaves_the_loop(parts, monkeypatch):
    """Every frame that is counted was imagined, and judged by the reflector; none stops the clock
    early; two denoising steps are two passes of the U-Net."""
    world, judged, passes = parts.world(5), [], []
    reward, unet = parts.reflector.reward, parts.simulator.unet.forward

    def judging(frames, tokens, state, landmarks):
        rewards = reward(frames, tokens, state, landmarks)
        judged.extend(rewards.tolist())
        return rewards

    def passing(*arguments, **keywords):
        passes.append(len(arguments[0]))
        return unet(*arguments, **keywords)

    monkeypatch.setattr(parts.reflector, "reward", judging)
    monkeypatch.setattr(parts.simulator.unet, "forward", passing)
    for denoising in (1, 2):
        work = bench.imagined(parts, world, denoising)
        assert work.do(3) > 0 and (work.each, work.most) == (5, CONFIG.env.horizon)
    assert world.imagined_frames == len(judged) == 2 * 3 * 5
    assert all(0 <= r <= 1 for r in judged) and not world.done.any()
    assert sum(passes) == 3 * 5 * (1 + 2)


def test_a_forest_as_large_as_a_runs():
    """As many episodes as the settings record; copies are a few millimetres away and share their
    frames, the episodes themselves stay."""
    config = replace(CONFIG, demos=3, exploration=4)
    episodes = [recorded(seed) for seed in range(4)]
    before = [episode.state.copy() for episode in episodes]
    many = bench.as_many_as_a_run(config, episodes)
    assert len(many) == 2 * (3 + 4)
    for i, episode in enumerate(many):
        assert episode.image is episodes[i % 4].image
        moved = np.abs(episode.state - before[i % 4]).max()
        assert (moved == 0) if i < 4 else (0 < moved < 0.01)


def test_untrained_parts_look_things_up_as_trained_ones_do(parts):
    """The forest has all moments, the album all pages that there are frames for."""
    decisions = sum(len(e) for e in bench.as_many_as_a_run(CONFIG, parts.episodes))
    assert int(parts.simulator.kinematics.recorded) == decisions
    assert int((parts.simulator.album.owners >= 0).sum()) == min(CONFIG.simulator.album, 56)


def test_a_finished_run_brings_its_own_weights(parts, tmp_path):
    """And its forest and album; only the stop is taken out, and only in memory."""
    run = runs.Run.create(tmp_path / "run", CONFIG)
    run.checkpoint("policy").parent.mkdir()
    reflector = Reflector(CONFIG.reflector)
    save_part(run.checkpoint("policy"), parts.policy, asdict(CONFIG.policy))
    save_part(run.checkpoint("simulator"), parts.simulator, parts.simulator.description())
    save_part(run.checkpoint("reflector"), reflector, reflector.description())
    run.finish_stage("calibrate", 1.0, 1.0, {"etas": {CONFIG.tasks[0]: 0.3}})
    finished = runs.Run.open(run.folder)
    built = bench.build(CONFIG, parts.episodes, CAMERA, finished)
    for mine, saved in ((built.policy, parts.policy), (built.simulator, parts.simulator)):
        state = saved.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in mine.state_dict().items())
        assert not mine.training
    assert float(built.reflector.dream_threshold) == math.inf
    text = INSTRUCTIONS[CONFIG.tasks[0]][0]
    assert built.reflector.dream_eta(text) == math.inf
    assert finished.reflector().dream_eta(text) == 0.3
    assert float(run.reflector().threshold) == pytest.approx(CONFIG.reflector.threshold)


def test_training_is_timed_on_copies(parts):
    """Every part really trains, and what imagines stays as it was."""
    whole = nn.ModuleList([parts.policy, parts.simulator, parts.reflector])
    before = {name: x.clone() for name, x in whole.state_dict().items()}
    works = {item: bench.training(parts, item) for item in bench.TRAINED}
    assert set(works) == {"policy", "kinematics", "simulator", "reflector", "loop update"}
    for work in works.values():
        assert work.do(1) > 0
    after = whole.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    loop = CONFIG.loop  # 2 groups of 4 rollouts, at most 30 decisions each: one minibatch
    assert loop.groups * loop.rollouts * CONFIG.env.horizon <= loop.minibatch
    assert works["loop update"].each == loop.epochs


# -------------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """`python cli.py bench --preset debug --quick`: its folder and the JSON."""
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    words = ["bench", "--preset", "debug", "--quick", "--out", str(out)]
    answer = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert answer.exit_code == 0 and out.with_suffix(".md").read_text() in answer.stdout
    return out.parent, json.loads(out.read_text())


def numbers(value) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [number for item in items for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_bench_writes_all_of_it(measured):
    folder, result = measured
    assert sorted(path.name for path in folder.iterdir()) == [
        "bench.json", "bench.md", "bench.png",
    ]  # fmt: skip
    assert result["command"] == "python cli.py bench --preset debug --quick"
    assert result["hardware"] and result["commit"] and result["threads"] >= 1
    growth, slopes = copy.deepcopy(result["growth"]), []
    for found in growth.values():
        slopes.append(found.pop("slope"))  # of rollouts this small it may be anything
    assert len(slopes) == 3 and all(math.isfinite(slope) for slope in slopes)
    assert all(math.isfinite(x) and x > 0 for x in numbers(result | {"growth": growth}))
    cells = {(cell["batch"], cell["denoising_steps"]) for cell in result["imagined_fps"]}
    assert cells == {(1, 1), (1, 2), (64, 1), (64, 2)}
    assert [entry["processes"] for entry in result["real_fps"]] == [1, 2]
    assert set(result["peak_gib"]) == set(bench.QUICK.memory)
    assert 0.1 < result["peak_gib"]["imagine 64"] < 8
    assert imageio.imread(folder / "bench.png").std() > 10


def test_figures_agree_with_what_they_are_made_of(measured):
    _, result = measured
    figures = result["figures"]
    cells = {(cell["batch"], cell["denoising_steps"]): cell for cell in result["imagined_fps"]}
    for key, batch in (("imagined_fps_batch1", 1), ("imagined_fps_batch64", 64)):
        assert figures[key]["each"] == cells[batch, 1]["each"]
    assert figures["real_fps"]["each"] == result["real_fps"][1]["each"]
    pairs = zip(figures["imagined_fps_batch64"]["each"], figures["real_fps"]["each"], strict=True)
    ratios = [dream / real for dream, real in pairs]
    assert figures["imagined_over_real_fps"]["each"] == pytest.approx(ratios, rel=1e-3)
    for figure in figures.values():
        assert figure["value"] == pytest.approx(np.median(figure["each"]), rel=1e-3)
        assert figure["low"] == min(figure["each"]) and figure["high"] == max(figure["each"])
        assert figure["n"] == bench.QUICK.repeats


def test_shares_and_slopes_agree_with_what_they_are_made_of(measured):
    _, result = measured
    denoiser = result["denoiser"]
    for name in {"fp32", "bf16"} & set(denoiser):
        entry = denoiser[name]
        share = np.array(entry["denoiser_gflops"]["each"]) / entry["matmul_peak_gflops"]
        assert entry["share"]["each"] == pytest.approx(share.tolist(), rel=1e-3)
    used = denoiser[denoiser["imagination"]]["share"]
    assert result["figures"]["denoiser_matmul_share"] == used
    for shares in result["profile"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    for entry in result["growth"].values():
        assert entry["size"][-1] == 16 * entry["size"][0]
        seconds = [s["value"] for s in entry["seconds"]]
        slope, _ = np.polyfit(np.log(entry["size"]), np.log(seconds), 1)
        assert entry["slope"] == pytest.approx(slope, abs=1e-3)


def test_the_table_is_that_of_the_json(measured):
    """Also after a round through the file; with the goals beside the figures."""
    folder, result = measured
    text = (folder / "bench.md").read_text()
    assert text == bench_report.markdown(result, "bench")
    shown = "| real frames/s, rendered in software, 2 processes | "
    shown += bench_report._cell(result["figures"]["real_fps"])
    assert shown in text and "| 1000 or more |" in text and "| 50 % or more |" in text


def test_the_summary_takes_the_five_figures(measured, tmp_path):
    """With value, ends, number of turns, command, commit and hardware, beside all that it had."""
    _, result = measured
    (tmp_path / "bench.json").write_text(json.dumps(result))
    found = summary.summarize_runs(tmp_path)
    assert set(found) == {
        "imagined_fps_batch1", "imagined_fps_batch64", "real_fps", "imagined_over_real_fps",
        "denoiser_matmul_share",
    }  # fmt: skip
    entry = found["real_fps"]
    assert set(entry) == {"value", "low", "high", "n", "command", "commit", "hardware"}
    assert entry["value"] == result["figures"]["real_fps"]["value"] and entry["n"] == 2
    assert entry["command"] == result["command"]
    assert json.loads((tmp_path / "summary.json").read_text()) == found


def test_cells_show_three_digits_that_count():
    entry = {"value": 0.51234, "low": 0.0, "high": 1234.5}
    assert bench_report._cell(entry) == "0.512 (0 to 1234)"
    assert bench_report._cell({"value": 0.5, "low": 0.25, "high": 0.75}, 100, " %") == (
        "50.0 % (25.0 % to 75.0 %)"
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words, told",
    [
        (["--out", "bench.txt"], ".json"),
        (["--run", "nowhere"], "not a run folder"),
        (["--preset", "huge"], "unknown preset"),
    ],
)
def test_mistakes_become_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(cli.app, ["bench", *words])
    (line,) = answer.stderr.strip().splitlines()
    assert answer.exit_code == 2 and line.startswith("error: ") and told in line
    assert not list(tmp_path.iterdir())
