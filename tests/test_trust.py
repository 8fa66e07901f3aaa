"""How often the dream lies: every instrument against answers that are known beforehand.

Reality and dream are scripted here, both by a WorldEnv: x, the state's first number, follows
x <- x / 2 + sum of dx (so that the order of actions matters), and a frame is 100 + 20 x bright.
"""

import json
import math
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cli
import demos
import films
import runs
import trust
from camera import Camera
from checkpoints import save_part
from demos import Episode
from evaluate import test_starts, wilson
from policy import Policy
from ppo import LoopConfig
from reflector import Reflector, false_stops, right_verdicts
from simulator import Simulator
from tasks import EnvConfig, Start
from vecenv import VecRealEnv
from worldenv import NoReflector, WorldEnv

SIZE, CHUNK, HORIZON = 16, 2, 6
CONFIG = EnvConfig(size=SIZE, chunk=CHUNK, horizon=HORIZON)
TASKS = ("reach", "push", "drawer-open")
PROBES = [  # of the gauge: imagined 0, 1/3, 2/3 and real 1/3, 0, 1
    {"iteration": 0, "imagined": [0, 0, 0], "real": [0, 0, 1]},
    {"iteration": 5, "imagined": [0, 0, 1], "real": [0, 0, 0]},
    {"iteration": 10, "imagined": [0, 1, 1], "real": [1, 1, 1]},
]
HISTORY = [  # the second of an earlier version: nobody counted mixed outcomes
    {"groups_with_spread": 1.0, "success": 0.5, "clip_fraction": 0.1, "mixed": 0.5},
    {"groups_with_spread": 1.0, "success": 0.5, "clip_fraction": 0.6},
    {"groups_with_spread": 1.0, "success": 1.0, "clip_fraction": 0.1, "mixed": 0.0},
    {"groups_with_spread": 1.0, "success": 0.9, "clip_fraction": 0.1, "mixed": 0.04},
]


class Faithful:
    """The simulator that is reality."""

    def first_look(self, first):
        return (first[:, :1, :1, 0],)

    def next_state(self, state, motion, action):
        following = state.clone()
        following[:, 0] = state[:, 0] / 2 + action[:, :, 0].sum(1)
        return following

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        brightness = (100 + 20 * next_state[:, 0]).clamp(0, 255).round().to(torch.uint8)
        return brightness[:, None, None, None].expand(-1, SIZE, SIZE, 3)


class Deaf(Faithful):
    """Ignores actions: nothing ever changes in its pictures."""

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        return memory[:, 0]


class Always(NoReflector):
    """A reflector that is sure of one answer."""

    def __init__(self, answer: float):
        self.answer = answer
        self.threshold = self.dream_threshold = torch.tensor(0.5)

    def reward(self, frames, tokens, state, landmarks=None):
        return torch.full((len(frames),), self.answer)


class Bright(Always):
    """Success is x above 1: a frame brighter than 120."""

    def __init__(self):
        super().__init__(0.9)

    def reward(self, frames, tokens, state, landmarks=None):
        return torch.where(frames[:, 2].float().mean((1, 2, 3)) > 120, 0.9, 0.1)


class Reality(WorldEnv):
    """A WorldEnv that plays the real environment: any start, and an expert (different actions at
    every decision, from a seed of their own)."""

    def __init__(self, judge, num_envs: int = 2):
        super().__init__(Faithful(), judge, {}, num_envs, CONFIG)
        self.closed, self.decision = False, 0
        self.real_resets = self.real_steps = 0

    def reset(self, *, seed=None, options=None):
        first = (np.full((SIZE, SIZE, 3), 100, np.uint8), np.zeros(4, np.float32))
        self.starts = {start: first for start in options["starts"]}
        self.decision, self.stop = 0, options.get("stop_on_success", True)
        self.real_resets += len(self.starts)
        return super().reset(seed=seed, options=options)

    def get_states(self, slots):
        states = zip(slots, super().get_states(slots), strict=True)
        return [((self._texts[i], state, self.stop),) for i, state in states]

    def set_states(self, states):
        self.real_resets += len(states)
        return super().set_states([state for ((_, state, _),) in states])

    def step(self, actions):
        self.real_steps += CHUNK * int((~self.done).sum())
        return super().step(actions)

    def expert_step(self):
        self.decision += 1
        rng = np.random.default_rng(self.decision)
        chunks = rng.uniform(-1, 1, self.action_space.shape).astype(np.float32)
        return chunks, *self.step(chunks)

    def close_extras(self, **kwargs):
        self.closed = True


class Push(torch.nn.Module):
    """A policy that pushes x by `dx` in every step; its scale is 0.2."""

    action_shape = (CHUNK, 4)

    def __init__(self, dx: float):
        super().__init__()
        self.dx, self.anywhere = dx, torch.nn.Parameter(torch.zeros(()))

    def distribution(self, image, state, tokens):
        mean = torch.zeros(len(image), CHUNK, 4)
        mean[..., 0] = self.dx
        return mean, torch.full_like(mean, 0.2).log()

    in_blocks = distribution

    def act(self, observation, running):
        chunks = np.zeros((len(running), CHUNK, 4), np.float32)
        chunks[running, :, 0] = self.dx
        return chunks


def starts(count: int = 4) -> list[Start]:
    return [Start(TASKS[i % len(TASKS)], 9_000_000 + i) for i in range(count)]


def episode(success: list[int], brightness: list[int] | None = None, task="reach") -> Episode:
    """An episode with the given labels, one more than decisions."""
    values = np.array(brightness or [0] * len(success), np.uint8)
    shape = (len(success), SIZE, SIZE, 3)
    return Episode(
        image=np.broadcast_to(values[:, None, None, None], shape).copy(),
        state=np.zeros((len(success), 4), np.float32),
        action=np.zeros((len(success) - 1, CHUNK, 4), np.float32),
        success=np.array(success, np.uint8),
        task=task,
        instruction="reach the goal",
        seed=7,
        source="exploration",
    )


# --------------------------------------------------------------------------------------- agreement


def test_agreement_by_hand():
    """3 both, 2 hallucinated, 1 missed, 4 neither: p_o = 0.7, p_e = 0.5 x 0.4 + 0.5 x 0.6 = 0.5,
    so kappa = 0.2 / 0.5."""
    imagined = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    real = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    report = trust.agreement(imagined, real, ["reach"] * 5 + ["push"] * 5)
    assert report["table"] == {"both": 3, "hallucinated": 2, "missed": 1, "neither": 4}
    for name, count in (("agreement", 7), ("hallucinated", 2), ("missed", 1)):
        low, high = wilson(count, 10)
        assert report[name] == {"share": count / 10, "low": low, "high": high}
    assert report["kappa"] == pytest.approx(0.4) and report["n"] == 10
    reach, push = report["tasks"]["reach"], report["tasks"]["push"]
    assert (reach["imagined"]["share"], reach["real"]["share"]) == (1.0, 0.6)
    assert (push["imagined"]["share"], push["real"]["share"]) == (0.0, 0.2)
    assert (reach["agreement"]["share"], push["agreement"]["share"], push["n"]) == (0.6, 0.8, 5)


def test_perfect_agreement_is_kappa_one():
    """And chance agreement is kappa 0, however high it is."""
    real = np.array([1, 0, 1, 0], bool)
    assert trust.agreement(real, real, ["reach"] * 4)["kappa"] == pytest.approx(1)
    yes = np.ones(4, bool)
    report = trust.agreement(yes, np.array([1, 1, 1, 0], bool), ["reach"] * 4)
    assert report["agreement"]["share"] == 0.75 and report["kappa"] == pytest.approx(0)


def test_kappa_of_one_word_is_undefined(recwarn):
    """Both always say success: nothing tells agreement from chance."""
    yes = np.ones(3, bool)
    report = trust.agreement(yes, yes, list(TASKS))
    assert report["agreement"]["share"] == 1 and report["kappa"] is None
    assert report["rank_over_tasks"] is None and not recwarn.list


def test_rank_over_tasks_and_checkpoints(recwarn):
    """Task rates 0, 1/2, 1 imagined against 0, 1/2, 1 and 1, 1/2, 0 real."""
    tasks = [task for task in TASKS for _ in range(2)]
    rising = np.array([0, 0, 0, 1, 1, 1], bool)
    assert trust.agreement(rising, rising, tasks)["rank_over_tasks"] == pytest.approx(1)
    assert trust.agreement(rising, ~rising, tasks)["rank_over_tasks"] == pytest.approx(-1)
    certain = trust.agreement(rising, rising, tasks)["rank_interval"]
    assert certain is not None and -1 <= certain[0] <= certain[1] == pytest.approx(1)
    tasks = [task for task in TASKS for _ in range(100)]
    clear = np.concatenate([np.arange(100) < count for count in (10, 50, 90)])
    assert trust.agreement(clear, clear, tasks)["rank_interval"] == pytest.approx([1, 1])
    turned = trust.agreement(clear, clear[::-1], tasks)["rank_interval"]
    assert turned == pytest.approx([-1, -1])
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 x (1 + 1) / (4 x 15).
    rank = trust.rank_over_checkpoints([0.1, 0.2, 0.3, 0.9], [0.2, 0.5, 0.4, 0.6])
    assert rank == pytest.approx(0.8)
    assert trust.rank_over_checkpoints([0.1, 0.2], [0.2, 0.5]) is None
    assert trust.rank_over_checkpoints([0.1, 0.2, 0.3], [0.4, 0.4, 0.4]) is None
    assert not recwarn.list


@pytest.mark.parametrize("imagined, real, tasks", [([], [], []), ([1], [1, 0], ["reach"])])
def test_agreement_refuses_other_numbers_of_starts(imagined, real, tasks):
    with pytest.raises(ValueError, match="expected one of each for every start"):
        trust.agreement(np.array(imagined, bool), np.array(real, bool), tasks)


@pytest.mark.parametrize("count", [1, 5])
def test_a_dream_that_always_succeeds_hallucinates_every_real_failure(count):
    """Reality never succeeds: 100 % hallucination. Where it always does: none."""
    for reality, table in ((0.0, "hallucinated"), (1.0, "both")):
        env = Reality(Always(reality))
        real, dreams = trust.play_both(
            Faithful(), Always(1.0), Push(0.0), env, starts(count), CONFIG
        )
        assert [len(e) for e in real] == [2 if reality else HORIZON] * count
        assert [len(e) for e in dreams] == [2] * count  # the second R above eta stops
        report = trust.agreement(
            [e.succeeded for e in dreams], [e.succeeded for e in real], [e.task for e in real]
        )
        assert report["table"][table] == count
        assert report["hallucinated"]["share"] == 1 - reality


def test_a_faithful_dream_agrees_in_every_start():
    """Same simulator, same judge: the dream begins at the very frames of reality and ends alike."""
    for dx in (0.3, 0.6):  # x converges to 4 dx: success needs more than 1
        env = Reality(Bright())
        real, dreams = trust.play_both(Faithful(), Bright(), Push(dx / 2), env, starts(), CONFIG)
        assert [e.succeeded for e in dreams] == [e.succeeded for e in real] == [dx > 0.5] * 4
        for a, b in zip(real, dreams, strict=True):
            assert (a.image == b.image).all() and (a.task, a.seed) == (b.task, b.seed)


# ------------------------------------------------------------------------------------------- films


def brightness_reflector():
    """R is the brightness of the current frame over 100."""
    judge = Always(0.0)
    judge.reward = lambda frames, *_: frames[:, 2].float().mean((1, 2, 3)) / 100
    return judge


def test_worst_film_has_the_worst_on_top():
    """Hallucinations by falling R, then misses by rising max R, three of each, others left out."""
    rewards = (60, 90, 70, 80)
    hallucinated = [(episode([0, 0, 0]), episode([0, 1], [0, r])) for r in rewards]
    missed = [(episode([0, 1]), episode([0, 0], [0, r])) for r in (20, 10)]
    agreed = [(episode([0, 1]), episode([0, 1], [0, 99]))]
    film = films.worst_film(brightness_reflector(), missed + agreed + hallucinated)
    side = SIZE + 4  # with the frame of two pixels
    assert film.shape == (3, 5 * side, 2 * side, 3) and film.dtype == np.uint8
    last = film[-1].reshape(5, side, 2, side, 3)
    assert last[:, side // 2, 1, side // 2, 0].tolist() == [90, 80, 70, 10, 20]
    assert (last[:, side // 2, 0, side // 2] == 0).all()  # reality, left
    assert (last[:3, 0, :, 0] == films.HALLUCINATED).all()
    assert (last[3:, 0, :, 0] == films.MISSED).all()
    assert films.worst_film(brightness_reflector(), agreed) is None
    assert films.worst_film(brightness_reflector(), []) is None


def test_telling_films_are_a_success_and_the_worst_lie():
    """The first success of both, the hallucination with the highest R, else the lowest miss."""
    judge = brightness_reflector()
    both = [(episode([0, 1], [0, 50]), episode([0, 1], [0, r])) for r in (40, 99)]
    hallucinated = [(episode([0, 0]), episode([0, 1], [0, r])) for r in (60, 90, 70)]
    missed = [(episode([0, 1], [0, 50]), episode([0, 0], [0, r])) for r in (20, 10)]
    for pairs, lie, words in (
        (missed + hallucinated + both, [0, 90], "success in the dream only"),
        (both + missed, [50, 10], "success in reality only"),
    ):
        found = films.telling_films(judge, *zip(*pairs, strict=True))
        assert found["success"][0] == "reach, start 7: success in both"
        assert found["lie"][0] == f"reach, start 7: {words}"
        for name, expected in (("success", [50, 40]), ("lie", lie)):
            film = found[name][1]
            assert film.shape == (2, SIZE, 2 * SIZE, 3)
            assert film[-1, 0, ::SIZE, 0].tolist() == expected
    assert films.telling_films(judge, *zip(*both, strict=True)).keys() == {"success"}
    nothing = [(episode([0, 0]), episode([0, 0]))]
    assert films.telling_films(judge, *zip(*nothing, strict=True)) == {}


def test_grid_pads_with_the_last_frame():
    """Rows of films of other lengths: the shorter ones rest."""
    short, long = episode([0, 0], [1, 2]).image, episode([0, 0, 0], [3, 4, 5]).image
    film = films.grid([[short, long], [long, short], [short, short]])
    assert film.shape == (3, 3 * SIZE, 2 * SIZE, 3)
    corners = film[:, ::SIZE, ::SIZE, 0]
    assert corners[0].tolist() == [[1, 3], [3, 1], [1, 1]]
    assert corners[2].tolist() == [[2, 5], [5, 2], [2, 2]]


# --------------------------------------------------------------------------------------- reflector


def test_a_calibrated_reflector_has_no_ece():
    """Labels drawn from Bernoulli(score).

    By Hoeffding, |mean y - mean R| in a bin of n_b frames exceeds e with probability below
    2 exp(-2 n_b e^2). With e = 2.9 / sqrt(n_b), which is 5.8 binomial standard errors at their
    largest (0.5 / sqrt(n_b)), that is 2 exp(-16.82) < 1e-7: below 1e-6 for any of ten bins. So with
    a false-alarm probability below 1e-6, ECE <= sum_b n_b / n x 2.9 / sqrt(n_b), here about 0.013.
    """
    rng = np.random.default_rng(0)
    scores = rng.random(500_000)
    result = trust.reliability(scores, rng.random(500_000) < scores)
    sizes = np.array([row["n"] for row in result["bins"]])
    assert len(sizes) == 10 and sizes.sum() == result["n"] == 500_000
    tolerance = float((sizes / sizes.sum() * 2.9 / np.sqrt(sizes)).sum())
    assert result["ece"] <= tolerance < 0.014
    # E (R - y)^2 = E R (1 - R) = 1/6; terms lie in [0, 1]: 2 exp(-2 n 0.004^2) < 1e-6.
    assert result["brier"] == pytest.approx(1 / 6, abs=0.004)


def test_an_overconfident_reflector_has_a_known_ece():
    """It says 0.9 and 0.1, and half succeed in either case: ECE 0.4, Brier (0.81 + 0.01) / 2."""
    result = trust.reliability(np.array([0.9, 0.9, 0.1, 0.1]), np.array([1, 0, 1, 0]))
    assert result["ece"] == pytest.approx(0.4) and result["brier"] == pytest.approx(0.41)
    assert result["auroc"] == pytest.approx(0.5)
    assert [(row["low"], row["n"], row["rate"]) for row in result["bins"]] == [
        (0.1, 2, 0.5),
        (0.9, 2, 0.5),
    ]


def test_bins_hold_both_ends():
    """0 and 1 are scores like others; one class alone has no AUROC."""
    result = trust.reliability(np.array([0.0, 1.0, 1.0]), np.ones(3), bins=2)
    assert [row["n"] for row in result["bins"]] == [1, 2] and result["auroc"] is None
    assert result["ece"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "scores, labels", [([], []), ([0.5], [0, 1]), ([1.5], [1]), ([math.nan], [1]), ([0.5], [2])]
)
def test_reliability_refuses_what_is_no_probability(scores, labels):
    with pytest.raises(ValueError, match="expected"):
        trust.reliability(np.array(scores), np.array(labels))


# Four episodes of three decisions, and R of their frames after the first.
EPISODES = [
    episode([0, 0, 1, 1]),
    episode([0, 0, 1, 1]),
    episode([0, 0, 0, 1]),
    episode([0, 0, 0, 0]),
]
CURVES = [np.array(c) for c in ([0.1, 0.6, 0.9], [0.6, 0.7, 0.8], [0.0, 0.3, 0.4], [0.2, 0.2, 0.7])]


def test_sweep_by_hand():
    """eta 0.15: caught, caught, caught, at a failure. 0.25: three caught. 0.5: two caught, one
    missed. 0.65: one caught. 0.95: nobody is stopped."""
    rows = trust.sweep(CURVES, EPISODES, (0.15, 0.25, 0.5, 0.65, 0.95))
    assert [row["eta"] for row in rows] == [0.15, 0.25, 0.5, 0.65, 0.95]
    assert [row["recall"] for row in rows] == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    assert [row["false_stops"] for row in rows] == pytest.approx([1 / 4, 0, 0, 0, 0])
    assert [row["right"] for row in rows] == pytest.approx([3 / 4, 1, 3 / 4, 2 / 4, 1 / 4])
    for row in rows:
        assert row["false_stops"] == false_stops(CURVES, EPISODES, row["eta"])
        assert row["right"] == right_verdicts(CURVES, EPISODES, row["eta"])
    assert trust.sweep(CURVES[3:], EPISODES[3:], (0.5,))[0]["recall"] is None


def test_the_card_judges_each_task_by_its_own_eta():
    """Of two dreams with the same R, .4 at failures, the one of the stricter task is not stopped.
    In the sweep one eta is that of all."""
    judge = Always(0.4)
    dreams = [episode([0, 0, 0], [0, 0, 0], task) for task in TASKS[:2]]
    card = trust.reflector_report(judge, dreams, [0.3, 0.5])
    assert card["false_stops"]["share"] == 1 / 2
    assert card["false_stops_by_decision"] == [0, 1 / 2]
    assert card["etas"] == {TASKS[0]: 0.3, TASKS[1]: 0.5}
    assert {row["false_stops"] for row in card["sweep"] if row["eta"] < 0.4} == {1}
    assert {row["false_stops"] for row in card["sweep"] if row["eta"] > 0.4} == {0}


def test_false_stops_by_decision_by_hand():
    """eta 0.15: episode 3 at decision 2, the second above it. eta 0.5: none twice at a failure."""
    assert trust.false_stops_by_decision(CURVES, EPISODES, 0.15) == [0, 0.25, 0.25]
    assert trust.false_stops_by_decision(CURVES, EPISODES, 0.5) == [0, 0, 0]


def test_false_stops_by_decision_rise_to_false_stops():
    """Random curves and labels, episodes of any length."""
    rng = np.random.default_rng(1)
    episodes = [episode([0, *rng.integers(0, 2, n).tolist()]) for n in rng.integers(1, 9, 50)]
    curves = [rng.random(len(e)) for e in episodes]
    for eta in (0.0, 0.3, 0.7, 1.0):
        shares = trust.false_stops_by_decision(curves, episodes, eta)
        assert len(shares) == max(len(e) for e in episodes) and (np.diff(shares) >= 0).all()
        assert shares[-1] == pytest.approx(false_stops(curves, episodes, eta))


# ---------------------------------------------------------------------------------- counterfactual


def test_variants_by_hand():
    """Motion, order and side change; the gripper only moves with its decision."""
    actions = np.arange(6 * CHUNK * 4, dtype=np.float32).reshape(6, CHUNK, 4)
    rng = np.random.default_rng(0)
    assert (trust.alter(actions, "expert", rng) == actions).all()
    shuffled = trust.alter(actions, "shuffled", rng)
    assert (shuffled != actions).any()
    assert sorted(shuffled[:, 0, 0]) == sorted(actions[:, 0, 0])  # whole decisions, each once
    assert (shuffled - shuffled[:, :1, :1] == actions - actions[:, :1, :1]).all()
    zero = trust.alter(actions, "zero", rng)
    assert (zero[..., :3] == 0).all() and (zero[..., 3] == actions[..., 3]).all()
    mirrored = trust.alter(actions, "mirrored", rng)
    assert (mirrored[..., :2] == -actions[..., :2]).all()
    assert (mirrored[..., 2:] == actions[..., 2:]).all()
    libero = np.arange(1, 8, dtype=np.float32)[None, None]  # dx, dy, dz, a turn, gripper
    assert trust.alter(libero, "zero", rng).ravel().tolist() == [0, 0, 0, 0, 0, 0, 7]
    assert trust.alter(libero, "mirrored", rng).ravel().tolist() == [-1, -2, 3, -4, -5, 6, 7]


@pytest.mark.parametrize("simulator, share", [(Faithful(), 1.0), (Deaf(), 0.25)])
def test_action_following_of_known_worlds(simulator, share):
    """A dream that copies reality follows every time; one that ignores actions always shows the
    start, which is where "zero" ends: right in one of four."""
    env = Reality(Always(0.0))
    world = WorldEnv(simulator, Always(0.0), {}, 3, CONFIG)
    real, dreams = trust.counterfactual(world, env, starts(5))
    assert {len(e) for v in trust.VARIANTS for e in real[v] + dreams[v]} == {HORIZON}
    following = trust.action_following(real, dreams)
    assert following["action_following"]["share"] == share and following["n"] == 20
    shares = {name: row["share"] for name, row in following["variants"].items()}
    assert shares == {"expert": share > 0.5, "shuffled": share > 0.5, "zero": 1.0,
                      "mirrored": share > 0.5}  # fmt: skip
    film = trust.counterfactual_film(real, dreams, start=4)
    assert film.shape == (HORIZON + 1, 2 * SIZE, 4 * SIZE, 3)
    mirrored = film[:, :SIZE, 3 * SIZE :]
    assert (mirrored == real["mirrored"][4].image).all()


def test_ties_count_against():
    """Where all variants end alike nobody can say which one was followed."""
    same = {v: [episode([0, 0], [3, 4])] for v in trust.VARIANTS}
    assert trust.action_following(same, same)["action_following"]["share"] == 0
    with pytest.raises(ValueError, match="as many of every variant"):
        trust.action_following(same, {v: [] for v in trust.VARIANTS})


def test_replays_end_with_their_actions():
    """Sequences of other lengths side by side, more of them than slots; success does not stop."""
    env = Reality(Always(0.0))
    lengths = (1, HORIZON, 3)
    sequences = [np.full((n, CHUNK, 4), 0.5, np.float32) for n in lengths]
    played = trust.replay(env, starts(3), sequences)
    assert tuple(len(e) for e in played) == lengths
    for one, sequence in zip(played, sequences, strict=True):
        assert (one.action == sequence).all()


# ---------------------------------------------------------------------------------------- together


def scripted_run(folder, judge) -> SimpleNamespace:
    """What `trust` asks of a run, with scripted parts: the dream's simulator is deaf."""
    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, SIZE)
    kept = [episode([0, 0, 1, 1], [0, 100, 130, 130], task) for task in TASKS * 3]
    demos.save(folder / "episodes", kept, CONFIG, camera)
    return SimpleNamespace(
        folder=folder,
        episodes_folder=folder / "episodes",
        config=SimpleNamespace(
            tasks=TASKS,
            slots=4,
            env=CONFIG,
            seed=0,
            exploration=3,
            loop=LoopConfig(rollouts=4),
            rl_env="dream",
            rounds=1,
            extra_data=True,
        ),
        stages={"rl": {"probes": PROBES, "kept": 10, "history": HISTORY}},
        ledger=lambda: {"exploration_episodes": 9, "gauge_episodes": 9, "imagined_frames": 1234},
        checkpoint=lambda name: folder / f"{name}.safetensors",
        policy=lambda name: Push({"sft": 0.1, "dream_bc": 0.1, "policy": 0.4}[name]),
        reflector=lambda: judge,
        simulator=lambda camera: Deaf(),
    )


def test_what_loop_begins_with_in_the_last_round(tmp_path):
    """Branches are of its dream BC, not of the first round's."""
    config = SimpleNamespace(rl_env="dream", rounds=2)
    run = SimpleNamespace(
        config=config, checkpoint=lambda name: tmp_path / f"{name}.safetensors", policy=str.upper
    )
    for name in ("dream_bc", "dream_bc_2", "policy"):
        save_part(run.checkpoint(name), torch.nn.Linear(2, 2), {})
    policies, begins = trust._policies(run)
    assert begins == "DREAM_BC_2"
    assert policies == {"sft": "SFT", "dream_bc": "DREAM_BC_2", "policy": "POLICY"}


def test_trust_writes_all_of_it(tmp_path, monkeypatch):
    """A dream in which nothing moves misses every success of the better policy."""
    realities = []

    def open_reality(slots, config):
        realities.append(Reality(Bright(), slots))
        return realities[-1]

    monkeypatch.setattr(trust, "VecRealEnv", open_reality)
    run, lines = scripted_run(tmp_path, Bright()), []
    for name in ("dream_bc", "policy"):  # each with weights of its own
        save_part(run.checkpoint(name), torch.nn.Linear(2, 2), {})
    result = trust.trust(run, 2, lines.append)
    assert sorted(path.name for path in (tmp_path / "trust").iterdir()) == sorted(trust.FILES)
    saved = json.loads((tmp_path / "trust" / "trust.json").read_text())
    assert saved == result and result["words"] == lines and len(lines) == 11
    assert result["agreement"]["sft"]["table"]["neither"] == 6
    assert result["agreement"]["policy"]["table"]["missed"] == 6
    assert result["rank_over_checkpoints"] == pytest.approx(0.5)  # ranks 1, 2, 3 and 2, 1, 3
    assert result["reflector"]["real"]["recall"] == 1  # frames brighter than 120 are successes
    assert result["reflector"]["generated"]["recall"] == 0  # and the deaf dream shows none
    assert result["counterfactual"]["n"] == 24
    assert (result["branches"]["groups"], result["branches"]["rollouts"]) == (6, 4)
    # Of three explored episodes a task the first policy played two; all push from the first on.
    assert result["pushes"]["pushes"] == 6
    assert lines[2] == (
        "policy: the dream and reality agree in 0 % of 6 starts (0 to 39; kappa 0.00); "
        "it hallucinates success in 0 %, misses it in 100 %"
    )
    assert all(env.closed for env in realities)
    assert result["ledger"]["run"]["exploration_episodes"] == 9
    # Three policies and the expert from 6 starts, four variants of the actions, 6 moments with four
    # branches each: as the real environment has counted them.
    own = result["ledger"]["trust"]
    assert own["real_episodes"] == realities[0].real_resets == 3 * 6 + 6 + 4 * 6 + 6 + 6 * 4
    # The deaf dream never succeeds: each runs to the horizon, or as long as the real one.
    least = 3 * 6 * HORIZON + 9 * 3 + 4 * 6 * HORIZON
    assert own["real_steps"] == realities[0].real_steps and own["imagined_frames"] > least
    assert lines[-1] == (
        "ledger: the run has spent 9 exploration episodes, 9 gauge episodes, 1,234 imagined "
        f"frames; trust itself played 78 real episodes and dreamt {own['imagined_frames']:,} frames"
    )

    # LOOP kept what it began with: that is played once.
    shutil.copy(run.checkpoint("policy"), run.checkpoint("dream_bc"))
    assert list(trust.trust(run, 1, lines.append)["agreement"]) == ["sft", "policy"]
    assert (tmp_path / "trust" / "worst.gif").exists()

    # With SFT alone, which agrees: the film of disagreements must not stay behind.
    run.checkpoint("policy").unlink(), run.checkpoint("dream_bc").unlink()
    assert list(trust.trust(run, 2, lines.append)["agreement"]) == ["sft"]
    assert not (tmp_path / "trust" / "worst.gif").exists()


def test_what_the_run_has_stored(tmp_path):
    """Of the gauge's three looks the last has shown a gain in reality; there is no novelty."""
    run, lines = scripted_run(tmp_path, Bright()), []
    known = trust.stored(run)
    gauge = known["gauge"]
    assert [look["iteration"] for look in gauge["looks"]] == [0, 5, 10]
    assert [look["imagined"] for look in gauge["looks"]] == pytest.approx([0, 1 / 3, 2 / 3])
    assert [look["real"] for look in gauge["looks"]] == pytest.approx([1 / 3, 0, 1])
    assert [look["agreement"] for look in gauge["looks"]] == pytest.approx([2 / 3] * 3)
    assert (gauge["starts"], gauge["real_keeps"], gauge["novelty_keeps"]) == (3, 10, None)
    assert known["signal"]["iterations"] == 4 and known["signal"]["warned"] == 3
    large, always = known["signal"]["warnings"]
    assert large["iterations"] == [2] and large["sentence"].startswith("steps too large")
    assert always["iterations"] == [3, 4] and "mixed in 0% of groups" in always["sentence"]
    known["ledger"]["trust"] = {"real_episodes": 1, "imagined_frames": 2}
    trust._tell_stored(run, known, tmp_path, lines.append)
    assert (tmp_path / "gauge.png").stat().st_size > 10_000
    assert lines[0] == (
        "gauge, 3 starts after 0 to 10 iterations: imagined success 0 % -> 67 %, real success "
        "33 % -> 100 %, agreement 67 % -> 67 %, hallucinated 0 % -> 0 %, missed 33 % -> 33 %; "
        "by real episodes the policy after 10 is to be kept; novelty was not recorded; the run "
        "kept that after 10"
    )
    assert lines[1].endswith("(n = 3): 0.50")
    assert lines[2].startswith("signal: in 1 of 4 iterations (first in 2): steps too large")
    assert "; in 2 of 4 iterations (first in 3): always stopped" in lines[2]


@pytest.mark.parametrize(
    "stages, gauge, rank, signal",
    [
        (  # --until dream_bc
            {}, "it never looked, as LOOP has not run", "(n = 0): undefined", "LOOP has not run",
        ),
        (  # no probes
            {"rl": {"history": HISTORY[:1], "kept": 1}},
            "it never looked", "(n = 0): undefined", "none of 1 iterations of LOOP had a warning",
        ),
        (  # --stop-rule novelty: the second probe has strayed
            {"rl": {"history": HISTORY[:1], "kept": 0, "probes": [
                {"iteration": 0, "imagined": [0, 1], "novel": [0.0, 0.1]},
                {"iteration": 4, "imagined": [1, 1], "novel": [0.5, 0.5]},
            ]}},
            "imagined success 50 % -> 100 %, novel decisions 5 % -> 50 %; no real episode was "
            "played, so nobody knows what came true; by novelty alone the one after 0; the run "
            "kept that after 0",
            "(n = 0): undefined", "none of 1",
        ),
    ],
)  # fmt: skip
def test_a_run_without_a_gauge_is_told_in_words(tmp_path, stages, gauge, rank, signal):
    """And its chart is drawn from what there is."""
    run, lines = scripted_run(tmp_path, Bright()), []
    run.stages = stages
    known = trust.stored(run)
    json.dumps(known, allow_nan=False)
    assert known["rank_over_checkpoints"] is None
    known["ledger"]["trust"] = {"real_episodes": 1, "imagined_frames": 2}
    trust._tell_stored(run, known, tmp_path, lines.append)
    for words, line in zip((gauge, rank, signal), lines, strict=False):
        assert words in line
    assert (tmp_path / "gauge.png").is_file() == bool(stages)


def test_a_run_without_a_dream_and_one_that_lacks_a_record_are_one_line(tmp_path):
    """Nothing is played before."""
    run = scripted_run(tmp_path, Bright())
    del run.stages["rl"]["kept"]
    with pytest.raises(runs.BadRun, match="a stages.json has no 'kept'"):
        trust.trust(run, 1, print)
    run.stages, run.config.rl_env = {}, "real"
    with pytest.raises(runs.BadRun, match="LOOP ran in the real simulator"):
        trust.trust(run, 1, print)
    assert not (tmp_path / "trust").exists()


def test_trust_that_fails_leaves_earlier_files_alone(tmp_path, monkeypatch):
    """The real environment dies in the middle: no new file, the old one as it was."""
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "trust.json").write_text("earlier")
    env = Reality(Always(0.0), 4)
    monkeypatch.setattr(trust, "VecRealEnv", lambda slots, config: env)
    monkeypatch.setattr(env, "expert_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trust.trust(scripted_run(tmp_path, Always(1.0)), 1, lambda line: None)
    assert [path.name for path in (tmp_path / "trust").iterdir()] == ["trust.json"]
    assert (tmp_path / "trust" / "trust.json").read_text() == "earlier"
    assert not list(tmp_path.glob(".worldenv-*")) and env.closed


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("trust", ["folder", "trust --help"]),
        ("trust missing", ["missing", "not a run folder", "cli.py train"]),
        ("trust run --starts 0", ["--starts", "got 0", "1 or more"]),
        ("trust run --starts -5", ["--starts", "got -5", "1 or more"]),
        ("trust run --starts 999999", ["999999", "100000"]),
        ("trust run --split train", ["--split", "'train'", "dev, test"]),
        ("trust run", ["sft.safetensors", "no such checkpoint", "train it first"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, words):
    """Exit code 2, nothing on stdout, nothing written."""
    monkeypatch.chdir(tmp_path)
    runs.Run.create(tmp_path / "run", runs.preset("debug"))
    result = CliRunner().invoke(cli.app, arguments.split())
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and result.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "run"]


def test_json_is_all_of_stdout(tmp_path, monkeypatch):
    """--json prints the result and no line in words; without it, the lines and the files."""
    monkeypatch.chdir(tmp_path)
    runs.Run.create(tmp_path / "run", runs.preset("debug"))
    (tmp_path / "run" / "trust").mkdir()
    (tmp_path / "run" / "trust" / "trust.json").write_text("{}")

    def measured(run, starts, say, split):
        say("the dream lies")
        return {"starts_per_task": starts, "split": split}

    monkeypatch.setattr(trust, "trust", measured)
    arguments = ["trust", "run", "--starts", "3", "--split", "test"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert json.loads(result.stdout) == {"starts_per_task": 3, "split": "test"}
    result = CliRunner().invoke(cli.app, arguments)
    assert result.stdout.split("\n")[:2] == ["the dream lies", "run/trust/trust.json"]


@pytest.mark.slow
def test_trust_of_a_real_run(tmp_path):
    """The command on the real environment and real networks, untrained: all of it fits together."""
    run = runs.Run.create(tmp_path / "run", runs.preset("debug"))
    config = run.config
    env = VecRealEnv(2, config.env)
    try:
        plan = test_starts(config.tasks, 1, "explore")
        kept = demos.play(env, plan, None, "exploration", after_success=2)
        demos.save(run.episodes_folder, kept, config.env, env.camera)
        simulator, reflector = Simulator(config.simulator, env.camera), Reflector(config.reflector)
    finally:
        env.close()
    reflector.threshold.fill_(0.01)  # an untrained R is above it: the dream succeeds at once
    save_part(run.checkpoint("sft"), Policy(config.policy), asdict(config.policy))
    save_part(run.checkpoint("simulator"), simulator, simulator.description())
    save_part(run.checkpoint("reflector"), reflector, reflector.description())
    result = CliRunner().invoke(cli.app, ["trust", str(run.folder), "--starts", "2", "--json"])
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    assert measured == json.loads((run.folder / "trust" / "trust.json").read_text())
    sft = measured["agreement"]["sft"]
    assert sft["n"] == 4 and sft["table"]["missed"] == sft["table"]["neither"] == 0
    assert measured["reflector"]["generated"]["false_stops"]["share"] == 1
    assert measured["counterfactual"]["n"] == 16
    assert (measured["branches"]["groups"], measured["branches"]["rollouts"]) == (4, 4)
    assert measured["pushes"]["pushes"] == 2  # the expert's actions, against an untrained policy
    for path in run.folder.rglob("*.png"):
        assert path.stat().st_size > 10_000, path
