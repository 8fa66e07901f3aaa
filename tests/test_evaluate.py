"""Measuring: intervals against scipy and by hand, terminations and cards on scripted episodes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

import evaluate as evaluate_module
from demos import Episode
from dreams import dream_along
from evaluate import (
    TERMINATIONS,
    evaluate,
    evaluate_all,
    judge_terminations,
    mean_interval,
    psnr,
    reflector_card,
    reliability,
    simulator_card,
    summarize,
    test_starts,
    wilson,
)
from tasks import ACTION_DIM, EnvConfig, Start, split_of
from worldenv import NoReflector, WorldEnv, start_frames

SIZE, CHUNK = 16, 2


def scripted_episode(
    success: list[int], brightness: list[int] | None = None, task: str = "reach", seed: int = 0
) -> Episode:
    """An episode with the given labels, whose frame t is uniformly of brightness[t]."""
    length = len(success) - 1
    values = np.array(brightness or [0] * (length + 1), np.uint8)
    return Episode(
        image=np.broadcast_to(values[:, None, None, None], (length + 1, SIZE, SIZE, 3)).copy(),
        state=np.zeros((length + 1, 4), np.float32),
        action=np.zeros((length, CHUNK, ACTION_DIM), np.float32),
        success=np.array(success, np.uint8),
        task=task,
        instruction="reach the goal",
        seed=seed,
        source="evaluation",
        oracle_stop=success.index(1) if 1 in success else None,
    )


class Brightness(NoReflector):
    """A scripted reflector: R is the brightness of the current frame over 100; eta is 0.5."""

    threshold = dream_threshold = torch.tensor(0.5)

    def reward(self, frames, tokens, state, landmarks=None) -> torch.Tensor:
        return frames[:, 2].float().mean((1, 2, 3)) / 100


# ---------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("successes, trials", [(0, 5), (5, 5), (1, 2), (37, 100), (199, 200)])
def test_wilson_against_scipy(successes, trials):
    """scipy's own Wilson interval; it uses z = 1.95996 where we use 1.96."""
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    low, high = wilson(successes, trials)
    assert low == pytest.approx(expected.low, abs=1e-4)
    assert high == pytest.approx(expected.high, abs=1e-4)
    assert 0 <= low <= successes / trials <= high <= 1


def test_wilson_of_nothing_is_everything():
    """Without a trial any rate is possible."""
    assert wilson(0, 0) == (0.0, 1.0)


def test_mean_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), Student's t of 2 degrees of freedom 4.3027."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)


def test_one_seed_has_no_interval():
    """A single run says nothing about the spread."""
    assert mean_interval([0.4]) == (0.4, -math.inf, math.inf)


# ------------------------------------------------------------------------------------- terminations


def test_terminations_of_scripted_episodes():
    """None: success at the horizon. Reflector: at its first stop, at the horizon without one."""
    episodes = [
        scripted_episode([0, 1, 1, 0], [0, 60, 90, 90]),  # stopped in time; undone afterwards
        scripted_episode([0, 0, 0, 1], [0, 60, 90, 90], seed=1),  # stopped one frame too early
        scripted_episode(
            [0, 0, 0, 1], [0, 10, 20, 30], seed=2
        ),  # never stopped; success at the end
        scripted_episode([0, 1, 0, 0], [99, 60, 20, 60], seed=3),  # frame 0 is not judged; no stop
    ]
    results = judge_terminations(episodes, Brightness())
    assert results["none"]["mean"] == pytest.approx(2 / 4)
    assert results["reflector"]["mean"] == pytest.approx(2 / 4)
    single = [judge_terminations([e], Brightness()) for e in episodes]
    assert [r["none"]["mean"] for r in single] == [0, 1, 1, 0]
    assert [r["reflector"]["mean"] for r in single] == [1, 0, 1, 0]
    assert [r["reflector"]["false_stops"] for r in single] == [0, 1, 0, 0]
    assert results["reflector"]["false_stops"] == pytest.approx(1 / 4)
    assert [r["reflector"]["termination"] for r in single] == ["reflector"] * 4
    assert [r["oracle"]["mean"] for r in single] == [1, 1, 1, 1]  # at any moment
    assert [r["reflector"]["decisions"] for r in single] == [2, 2, 3, 3]
    assert set(judge_terminations(episodes, None)) == {"oracle", "none"}


def test_summary_counts_by_task():
    """Mean over all starts and per task, each with its own Wilson interval."""
    tasks = ("reach", "reach", "push", "push", "push")
    episodes = [scripted_episode([0] * (2 + i), task=task) for i, task in enumerate(tasks)]
    summary = summarize(episodes, [True, False, True, True, True], "oracle")
    early = summarize(episodes, [True] * 5, "oracle", [1, 1, None, None, 1])
    assert early["decisions"] == pytest.approx((1 + 1 + 3 + 4 + 1) / 5)
    assert summary["mean"] == pytest.approx(4 / 5) and summary["n"] == 5
    assert (summary["low"], summary["high"]) == wilson(4, 5)
    assert summary["decisions"] == pytest.approx(3.0)
    assert summary["tasks"]["reach"] == {
        "success": 0.5,
        "low": wilson(1, 2)[0],
        "high": wilson(1, 2)[1],
        "n": 2,
    }
    assert summary["tasks"]["push"]["success"] == 1.0 and summary["tasks"]["push"]["n"] == 3


def test_oracle_counts_success_at_any_moment(monkeypatch):
    """The oracle stops the episode; the other terminations let it run to the horizon."""
    asked = []
    played = [scripted_episode([0, 1, 0]), scripted_episode([0, 0, 0], seed=1)]

    def play(env, starts, act, source, after_success):
        asked.append(after_success)
        return played

    monkeypatch.setattr(evaluate_module, "play", play)
    policy = type("Policy", (), {"act": None})
    assert evaluate(policy, None, [], "oracle")["mean"] == pytest.approx(1 / 2)
    assert evaluate(policy, None, [], "none")["mean"] == 0
    assert evaluate(policy, None, [], "reflector", Brightness())["mean"] == 0
    assert asked == [0, None, None]


def test_unknown_termination_is_refused():
    """With the ones that there are, before anything is played."""
    with pytest.raises(ValueError, match="got 'never', expected one of oracle, reflector, none"):
        evaluate(None, None, [], "never")


def test_test_starts_are_the_same_for_every_run():
    """The first seeds of the test split, for every task."""
    starts = test_starts(("reach", "push"), 3)
    assert starts == test_starts(("reach", "push"), 3)
    assert [s.task for s in starts] == ["reach"] * 3 + ["push"] * 3
    assert {split_of(s.seed) for s in starts} == {"test"} and len(set(starts)) == 6
    assert {split_of(s.seed) for s in test_starts(("reach",), 3, "dev")} == {"dev"}


# ---------------------------------------------------------------------------------------- simulator


def test_psnr_by_hand():
    """A uniform error of 5 grey levels is 20 log10(255 / 5) dB; equal pictures stay finite."""
    a = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(a, a + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(a + 5, a) == psnr(a, a + 5)  # unsigned numbers do not wrap around
    half = a.copy()
    half[:2] += 10
    assert psnr(a, half) == pytest.approx(10 * math.log10(255**2 / 50))
    assert psnr(a, a) > 70


class Brightening:
    """Every decision makes the frame brighter by 10 x the chunk's first action."""

    def first_look(self, first):
        return (first[:, :1, :1, 0],)

    def next_state(self, state, motion, action):
        return state

    def next_frame(self, memory, state, next_state, action, look=None, generator=None):
        brighter = 10 * action[:, 0, 0].round().to(torch.uint8)
        return memory[:, 0] + brighter[:, None, None, None]


class AlwaysStop(Brightness):
    """Would end every dream at once."""

    def reward(self, frames, tokens, state, landmarks=None):
        return torch.ones(len(frames))


def brightening_episodes() -> list[Episode]:
    """Real episodes of 1, 3 and 7 decisions, each brighter by 10 (truly by 11) in every frame."""
    episodes = []
    for seed, length in enumerate((1, 3, 7)):
        truth = [20 + 11 * t for t in range(length + 1)]
        one = scripted_episode([0] * (length + 1), truth, seed=seed)
        one.action[:, 0, 0] = 1.0
        episodes.append(one)
    return episodes


def scripted_world(episodes: list[Episode], num_envs: int) -> WorldEnv:
    """A world of scripted parts that knows the starts of the episodes."""
    config = EnvConfig(size=SIZE, chunk=CHUNK, horizon=8)
    return WorldEnv(Brightening(), AlwaysStop(), start_frames(episodes), num_envs, config)


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_dreams_follow_the_real_actions_to_the_end(num_envs):
    """As long as the real episode, whatever the reflector says and however many slots there are."""
    episodes = brightening_episodes()
    dreams = dream_along(scripted_world(episodes, num_envs), episodes)
    assert len(dreams) == 3
    for dream, episode in zip(dreams, episodes, strict=True):
        assert dream.image.shape == episode.image.shape
        expected = [20 + 10 * t for t in range(len(episode) + 1)]
        assert dream.image[:, 0, 0, 0].tolist() == expected


def test_simulator_card_against_a_loop():
    """PSNR at decision 1, 5 (or the last before it) and last, beside repeating the first frame."""
    episodes = brightening_episodes()
    card = simulator_card(scripted_world(episodes, 2), episodes)
    lengths = (1, 3, 7)
    depths = {"1": (1, 1, 1), "5": (1, 3, 5), "last": lengths}
    for name, at in depths.items():
        dreamt = np.mean([20 * math.log10(255 / t) for t in at])  # off by 1 grey level a decision
        copied = np.mean([20 * math.log10(255 / (11 * t)) for t in at])
        assert card[f"sim_psnr_{name}"] == pytest.approx(dreamt, abs=1e-6)
        assert card[f"copy_psnr_{name}"] == pytest.approx(copied, abs=1e-6)
    assert card["episodes"] == 3


# ---------------------------------------------------------------------------------------- reflector


def test_reflector_card_against_loops():
    """AUROC over judged frames, false stops by episode, recall among successful episodes."""
    episodes = [
        scripted_episode([0, 0, 1, 1], [0, 10, 60, 90]),  # caught
        scripted_episode([0, 0, 0, 1], [0, 60, 70, 80], seed=1),  # stopped too early
        scripted_episode([0, 0, 0, 1], [0, 5, 15, 20], seed=2),  # missed
        scripted_episode([0, 0, 0, 0], [0, 25, 55, 35], seed=3),  # rightly left alone
    ]
    card = reflector_card(Brightness(), episodes, 0.5)
    labels = np.concatenate([e.success[1:] for e in episodes])
    scores = np.concatenate([e.image[1:, 0, 0, 0] for e in episodes])
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    by_pairs = np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])
    assert by_pairs == pytest.approx(roc_auc_score(labels, scores))
    assert card["reflector_auroc"] == pytest.approx(by_pairs)
    assert card["reflector_false_stops"] == pytest.approx(1 / 4)
    assert (card["false_stops_low"], card["false_stops_high"]) == wilson(1, 4)
    assert card["recall_at_success"] == pytest.approx(1 / 3)
    assert card["brier"] == pytest.approx(np.mean((scores / 100 - labels) ** 2))
    rewards = scores.astype(np.float32) / np.float32(100)  # as the judge gives them
    assert card["ece"] == pytest.approx(reliability(rewards, labels)["ece"], abs=1e-6)
    assert card["frames"] == 12 and card["episodes"] == 4 and card["threshold"] == 0.5


def test_reflector_card_without_any_success():
    """No positive frame: AUROC and recall are not numbers, and nothing fails."""
    card = reflector_card(Brightness(), [scripted_episode([0, 0, 0], [0, 60, 60])], 0.5)
    assert math.isnan(card["reflector_auroc"]) and math.isnan(card["recall_at_success"])
    assert card["reflector_false_stops"] == 1.0


def test_reflector_termination_needs_a_reflector():
    """One line that says what is missing, before anything is played."""
    with pytest.raises(ValueError, match="without a reflector"):
        evaluate(None, None, [], "reflector", None)


@pytest.mark.parametrize("num_envs", [2, 6])
def test_one_run_to_the_horizon_tells_all_terminations(num_envs):
    """Playing once gives what playing anew for every termination gives."""
    env = Playground(num_envs)
    every = [Start("reach", 9_100_000 + i) for i in range(6)]
    results = evaluate_all(env.policy, env, every, Brightness())
    assert env.started == 6 and results["oracle"]["mean"] == pytest.approx(3 / 6)
    for termination in TERMINATIONS:
        alone = evaluate(env.policy, Playground(num_envs), every, termination, Brightness())
        assert results[termination] == alone
    means = [results[t]["mean"] for t in ("reflector", "none")]
    assert means == [pytest.approx(2 / 6), pytest.approx(1 / 6)]
    nobody = [start for start in every if start.seed % 2]
    assert evaluate_all(env.policy, env, nobody, None)["oracle"]["mean"] == 0


class Playground:
    """Five decisions. Starts of even seed are successes after the third (0), the third and fourth
    (2), and the second to fifth (4); Brightness stops after the fourth."""

    policy = SimpleNamespace(act=lambda observation, running: np.zeros((len(running), 1, 4)))
    WHEN = {0: (3, 3), 2: (3, 4), 4: (2, 5)}

    def __init__(self, num_envs: int):
        self.num_envs, self.started = num_envs, 0

    def reset(self, options):
        self.seeds = [start.seed - 9_100_000 for start in options["starts"]]
        self.stop, self.time = options["stop_on_success"], 0
        self.done = np.arange(self.num_envs) >= len(self.seeds)
        self.started += len(self.seeds)
        return self._observation(), {"success": np.zeros(self.num_envs, bool)}

    def _observation(self):
        image = np.full((self.num_envs, 8, 8, 3), 20 * self.time, np.uint8)
        return {
            "image": image,
            "state": np.zeros((self.num_envs, 4), np.float32),
            "instruction": ("reach the goal",) * self.num_envs,
        }

    def step(self, chunks):
        self.time += 1
        success = np.zeros(self.num_envs, bool)
        for slot, seed in enumerate(self.seeds):
            first, last = self.WHEN.get(seed, (9, 9))
            success[slot] = first <= self.time <= last
        if self.stop:
            self.done |= success
        if self.time == 5:
            self.done[:] = True
        return self._observation(), None, None, None, {"success": success}
