"""Starts are held apart: every stage of `train` plays those of its own split, and no start serves
two purposes that docs/protocol.md holds apart. And what a run keeps once the gauge has parted.

The stages themselves run, with the preset debug made smaller still; only the simulator behind them
is scripted, and writes down from which starts it is asked to play.
"""

import shutil
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import order
import pipeline
import train
import vecenv
from camera import Camera
from fit import FitConfig
from gauge import PROBE_STARTS, probe_starts, real_starts, tasks_to_dream
from instructions import INSTRUCTIONS
from ppo import LoopConfig
from runs import Clock, Run, preset
from tasks import SPLITS, EnvConfig, Start, spaces, split_of
from vecenv import RealWorkers
from worldenv import WorldEnv

DEBUG, SIZE = preset("debug"), 32
TINY = replace(
    DEBUG,
    exploration=5,
    round_exploration=2,
    probes=2,
    env=EnvConfig(size=SIZE, horizon=4),
    policy=replace(DEBUG.policy, size=SIZE),
    simulator=replace(DEBUG.simulator, size=SIZE),
    reflector=replace(DEBUG.reflector, size=SIZE),
    sft=FitConfig(steps=2, batch=4),
    filtered_bc=FitConfig(steps=4, batch=4),
    simulator_fit=FitConfig(steps=2, batch=2),
    kinematics_fit=FitConfig(steps=2, batch=2),
    reflector_fit=FitConfig(steps=2, batch=4),
    loop=LoopConfig(iterations=1, groups=2, rollouts=4),
    real_loop=LoopConfig(iterations=1, groups=2, rollouts=4),
)
RUNS = {  # what is played: two seeds, two rounds, and LOOP in the real simulator
    "two rounds": replace(TINY, rounds=2),
    "another seed": replace(TINY, seed=1),
    "real": replace(TINY, rl_env="real"),
}
SPLIT = {  # stage -> the split of its real starts; the other stages play nothing
    "demos": "demo",
    "explore": "explore",
    "calibrate": "rl",
    "rl": "rl",
    "evaluate": "test",
}


class ScriptedEnv:
    """The face of `vecenv.VecRealEnv` without a simulator: pictures are noise, the expert succeeds
    after two decisions, and so does a policy from an even start."""

    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, SIZE)

    def __init__(self, num_envs, config):
        self.num_envs, self.config = num_envs, config
        space = spaces(config)[1]
        self.action_space = gymnasium.vector.utils.batch_space(space, num_envs)
        self.real_resets = self.real_steps = 0

    def reset(self, options, seed=None):
        self.starts, self.stop = options["starts"], options.get("stop_on_success", True)
        self.real_resets += len(self.starts)
        self.time = np.zeros(self.num_envs, int)
        self.done = np.arange(self.num_envs) >= len(self.starts)
        return self._observe(), {"success": np.zeros(self.num_envs, bool)}

    def _observe(self):
        size = self.config.size
        image = np.zeros((self.num_envs, size, size, 3), np.uint8)
        state = np.tile(np.float32([0, 0.7, 0.2, 0.5]), (self.num_envs, 1))
        text = [""] * self.num_envs
        for slot, start in enumerate(self.starts):
            rng = np.random.default_rng([start.seed, self.time[slot]])
            image[slot] = rng.integers(0, 256, image[slot].shape)
            state[slot] += rng.normal(0, 0.02, 4)
            text[slot] = INSTRUCTIONS[start.task][0]
        return {"image": image, "state": state, "instruction": text}

    def step(self, actions, expert=False):
        self.time += ~self.done
        self.real_steps += int((~self.done).sum())
        able = [expert or start.seed % 2 == 0 for start in self.starts]
        success = np.pad(able, (0, self.num_envs - len(able))) & (self.time >= 2)
        ended = self.time >= self.config.horizon
        self.done = self.done | ended | (success & self.stop)
        infos = {"success": success, "passed": success, "steps": np.ones(self.num_envs, int)}
        return self._observe(), success.astype(np.float32), success & self.stop, ended, infos

    def expert_step(self):
        chunks = np.random.default_rng(0).uniform(-1, 1, self.action_space.shape)
        return chunks.astype(np.float32), *self.step(chunks, expert=True)

    def get_states(self, slots):
        return [(self.starts[i], self.time[i]) for i in slots]

    def set_states(self, states):
        self.starts, self.time[: len(states)] = zip(*states, strict=True)
        self.real_resets += len(states)
        self.done = np.arange(self.num_envs) >= len(states)
        return self._observe()

    def close(self):
        pass


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """run -> its folder and, by stage, the starts of its "real" episodes, of its "dream"s, and
    those that its "loop" draws from."""
    everything = {}
    dream_reset, loop = WorldEnv.reset, train.loop
    with pytest.MonkeyPatch.context() as patch:
        for name, config in RUNS.items():
            run = Run.create(tmp_path_factory.mktemp("splits") / "run", config)
            seen = SimpleNamespace(run=run, real={}, dream={}, loop={})
            for kind in ("real", "dream", "loop"):
                setattr(seen, kind, defaultdict(list))

            def stage(run=run, config=config):
                return order.stages_of(config)[len(run.stages)]

            def real_reset(env, seen=seen, stage=stage, reset=ScriptedEnv.reset, **options):
                seen.real[stage()] += options["options"]["starts"]
                return reset(env, **options)

            def reset(world, seen=seen, stage=stage, **options):
                seen.dream[stage()] += options["options"]["starts"]
                return dream_reset(world, **options)

            def drawn(env, policy, draw, *arguments, seen=seen, stage=stage):
                seen.loop[stage()] += draw(0, 500)
                return loop(env, policy, draw, *arguments)

            patch.setattr(vecenv, "VecRealEnv", type("Env", (ScriptedEnv,), {"reset": real_reset}))
            patch.setattr(WorldEnv, "reset", reset)
            patch.setattr(train, "loop", drawn)
            pipeline.train(run, lambda line: None, lambda *step: None)
            everything[name] = seen
    return everything


# --- where starts come from ----------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_each_stage_plays_starts_of_its_own_split(played, name):
    """Real episodes, and only these stages play any."""
    config, real = RUNS[name], played[name].real
    stages = [stage for stage in order.stages_of(config) if order.round_of(stage)[0] in SPLIT]
    assert list(real) == stages
    for stage in stages:
        splits = {split_of(start.seed) for start in real[stage]}
        assert splits == {SPLIT[order.round_of(stage)[0]]}, stage
        assert {start.task for start in real[stage]} == set(config.tasks), stage


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_plays_the_first_test_starts_whatever_the_seed(played, name):
    first = [SPLITS["test"].start + i for i in range(TINY.test_starts)]
    expected = {Start(task, seed) for task in TINY.tasks for seed in first}
    assert set(played[name].real["evaluate"]) == expected


def test_the_last_of_the_rl_split_are_the_gauge_s_and_calibration_s(played):
    """LOOP in the real simulator draws none of them, however often it draws."""
    border = SPLITS["rl"].stop - PROBE_STARTS
    for name in ("two rounds", "another seed"):
        for stage, starts in played[name].real.items():
            if order.round_of(stage)[0] in ("calibrate", "rl"):
                assert min(start.seed for start in starts) >= border, stage
    assert max(start.seed for start in played["real"].real["rl"]) < border
    assert max(start.seed for start in real_starts(TINY.tasks, 0)(0, 100_000)) < border


def test_no_start_serves_two_purposes(played):
    """Calibration against gauge, test against everything, rounds and seeds against each other. The
    gauge looks from the same starts in every round, and all evaluate on the same."""
    purposes = defaultdict(set)
    for name, seen in played.items():
        config = RUNS[name]
        for stage, starts in seen.real.items():
            purpose = stage, config.seed
            if order.round_of(stage)[0] == "rl":
                purpose = f"rl, {config.rl_env}", config.seed
            if stage == "evaluate":
                purpose = stage, None
            for start in starts:
                purposes[start].add(purpose)
    assert len(set().union(*purposes.values())) == 12  # 7 + 4 + 1, of the three runs
    shared = {start: of for start, of in purposes.items() if len(of) > 1}
    assert not shared


@pytest.mark.parametrize("name", ["two rounds", "another seed"])
def test_dreams_begin_at_starts_that_are_paid_for(played, name):
    """LOOP's at the run's own demonstrations and exploration episodes so far, and at all of them,
    but for tasks that the gauge has left out; what is compared with reality, at the very starts
    that were played."""
    seen, known, config = played[name], set(), RUNS[name]
    looked_at = [start.task for start in probe_starts(config.tasks, config.probes, 0)]
    for stage in order.stages_of(RUNS[name]):
        kind = order.round_of(stage)[0]
        if kind in ("demos", "explore"):
            known |= set(seen.real[stage])
        if kind in ("calibrate", "evaluate"):
            assert set(seen.dream[stage]) == set(seen.real[stage]), stage
        if kind == "rl":
            probes, dreamt = seen.run.stages[stage]["probes"], set(seen.loop[stage])
            first, last = (
                {s for s in known if s.task in (tasks_to_dream(some, looked_at) or config.tasks)}
                for some in (probes[:1], probes[:-1])  # what it began with, and what it ended with
            )
            assert last <= dreamt <= first, stage  # equal where no task was left out in between
            assert set(seen.real[stage]) <= set(seen.dream[stage]), stage  # the gauge's
            assert set(seen.dream[stage]) <= set(seen.real[stage]) | known, stage
    assert not {order.round_of(stage)[0] for stage in seen.dream} - {"calibrate", "rl", "evaluate"}


def test_a_hundred_seeds_and_nine_rounds_find_room():
    """The most that `train` can be asked for: a seed's thousand starts of each split are enough,
    and the gauge's and calibration's of all seeds lie in their part of the rl split."""
    for name in ("cpu", "debug", "notebook", "example", "gpu", "paper", "libero"):
        config = preset(name)
        assert config.exploration + 8 * config.round_exploration <= 1000, name
        seeds = [
            [start.seed for start in probe_starts(("reach",), 10 * config.probes, seed)]
            for seed in range(100)
        ]
        flat = [seed for some in seeds for seed in some]
        assert len(flat) == len(set(flat)) and min(flat) >= SPLITS["rl"].stop - PROBE_STARTS, name


# --- when the gauge has parted -------------------------------------------------------------------


class Parting:
    """A gauge that parts after two iterations, and puts back weights that nothing else makes."""

    def __init__(self):
        self.probes, self.imagined_frames = [], 0

    def look(self, policy, iteration, last=False):
        self.probes.append({"iteration": iteration, "real": [1], "imagined": [1]})
        return iteration == 2

    def restore(self, policy):
        with torch.no_grad():
            for weights in policy.parameters():
                weights.fill_(0.5)
        return 1

    def warning(self):
        return None

    def state(self):
        return {}


def test_training_ends_where_the_gauge_parts_and_keeps_what_it_put_back(
    played, tmp_path, monkeypatch
):
    shutil.copytree(played["another seed"].run.folder, tmp_path / "run")
    before = Run.open(tmp_path / "run")
    run = Run(before.folder, replace(before.config, loop=replace(TINY.loop, iterations=5)))
    run.stages, run.clock = before.stages, Clock()
    for stage in ("rl", "evaluate"):
        del run.stages[stage]
    gauge = Parting()
    monkeypatch.setattr(train, "_gauge", lambda *_: gauge)
    result = train.stage_rl(run, RealWorkers(run.config), lambda *_: None)
    assert [probe["iteration"] for probe in gauge.probes] == [0, 1, 2]
    assert len(result["history"]) == 2 and result["kept"] == 1
    saved = list(run.policy().parameters())
    assert saved and all((weights == 0.5).all() for weights in saved)
