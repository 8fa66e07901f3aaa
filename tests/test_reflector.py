"""The instant reflector: what it reads, that it learns, and when it would say stop."""

import numpy as np
import pytest
import torch

import reflector as reflector_module
from demos import Episode
from fit import FitConfig, bf16_autocast, fit
from instructions import INSTRUCTIONS
from reflector import (
    LANDMARKS,
    Reflector,
    ReflectorConfig,
    calibrate,
    calibrate_probabilities,
    eta_of_each_task,
    false_stops,
    frame_batches,
    judge_episodes,
    reflector_frames,
    right_outcomes,
    right_verdicts,
    stack_frames,
    stop_at,
)
from vlm import TOKENS, tokenize, without_padding
from worldenv import NoReflector

SIZE = 32


def small_reflector(seed: int = 0) -> Reflector:
    """A vision-language model of some ten thousand weights."""
    torch.manual_seed(seed)
    return Reflector(ReflectorConfig(size=SIZE, width=32))


def scripted_episode(success: list[int], task: str = "drawer-open", offset: int = 0) -> Episode:
    """An episode with the given labels, whose frame t is uniformly of brightness offset + t."""
    length = len(success) - 1
    count = np.arange(length + 1) + offset
    return Episode(
        image=np.broadcast_to(count[:, None, None, None], (length + 1, SIZE, SIZE, 3)).astype(
            np.uint8
        ),
        state=np.zeros((length + 1, 4), np.float32),
        action=np.zeros((length, 4, 4), np.float32),
        success=np.array(success, np.uint8),
        task=task,
        instruction=INSTRUCTIONS[task][0],
        seed=0,
        source="exploration",
    )


class Brightness(NoReflector):
    """A scripted reflector: R is the brightness of the current frame over 100."""

    def __init__(self):
        self.threshold, self.dream_threshold = torch.tensor(0.5), torch.tensor(0.5)

    def reward(self, frames, tokens, state, landmarks=None) -> torch.Tensor:
        assert frames.shape[1:] == (3, SIZE, SIZE, 3)
        assert tokens.shape == (len(frames), without_padding(tokens).shape[1])
        return frames[:, 2].float().mean((1, 2, 3)) / 100


def hands(rows: int) -> torch.Tensor:
    """(rows, S): states as Meta-World has them, all different."""
    return torch.tensor([0.0, 0.6, 0.2, 1.0]) + 0.05 * torch.arange(rows)[:, None]


def random_frames(rows: int) -> torch.Tensor:
    """(rows, 3, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, 3, SIZE, SIZE, 3), generator=generator).to(torch.uint8)


# ---------------------------------------------------------------------------------------- the model


def test_rewards_are_probabilities():
    """(B,) in [0, 1], the sigmoid of the logits, and different rows differ."""
    reflector, frames = small_reflector().eval(), random_frames(3)
    tokens = tokenize([INSTRUCTIONS[t][0] for t in ("drawer-open", "handle-press", "reach")])
    reward = reflector.reward(frames, tokens, hands(len(frames)))
    assert reward.shape == (3,) and reward.min() >= 0 and reward.max() <= 1
    with bf16_autocast(torch.device("cpu")):  # as `reward` does
        logits = reflector.logits(stack_frames(frames), tokens, hands(len(frames)))
    assert torch.allclose(reward, torch.sigmoid(logits.float()))
    assert len(set(reward.tolist())) == 3


def test_more_padding_does_not_change_the_reward():
    """The same instruction in a longer padded row is the same instruction."""
    reflector, frames = small_reflector().eval(), random_frames(3)
    tokens = tokenize(["open the drawer", "press the handle down", "reach the goal"])
    longer = torch.cat([tokens, torch.zeros(3, 8, dtype=torch.int64)], dim=1)
    reward, again = (
        reflector.reward(frames, tokens, hands(len(frames))),
        reflector.reward(frames, longer, hands(3)),
    )
    assert torch.allclose(reward, again, atol=1e-5)


def test_padding_of_all_rows_is_left_out():
    """As many columns as the longest row has words, one at least; so in the reflector's batches."""
    tokens = tokenize(["open the drawer", "press the button from above"])
    assert tokens.shape == (2, TOKENS)
    assert without_padding(tokens).tolist() == tokens[:, :5].tolist()
    assert without_padding(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 1)
    batch = frame_batches([scripted_episode([0, 0, 1])], batch=64, seed=0)(0)
    longest = max(len(text.split()) for text in INSTRUCTIONS["drawer-open"])
    assert batch["tokens"].shape == (64, longest)


def test_a_row_is_judged_alone():
    """Neighbours in the batch, with shorter or longer instructions, do not change a reward."""
    reflector, frames = small_reflector().eval(), random_frames(3)
    tokens = tokenize(
        ["open the drawer", "reach over the wall and press down the button", "lock it"]
    )
    together = reflector.reward(frames, tokens, hands(len(frames)))
    alone = torch.cat(
        [
            reflector.reward(frames[i : i + 1], tokens[i : i + 1], hands(3)[i : i + 1])
            for i in range(3)
        ]
    )
    assert torch.allclose(together, alone, atol=1e-5)


def test_landmarks_that_are_known_give_the_same_reward():
    """A dream looks at its first frame once; the rewards are those of looking each time."""
    reflector, frames = small_reflector().eval(), random_frames(3)
    tokens = tokenize(["open the drawer", "press the handle down", "reach the goal"])
    known = reflector.first_look(frames[:, 0], tokens)
    assert known.shape == (3, 2 * LANDMARKS)
    reward = reflector.reward(frames, tokens, hands(3), known)
    assert torch.allclose(reward, reflector.reward(frames, tokens, hands(3)), atol=1e-6)
    other = reflector.reward(frames, tokens, hands(3), known.roll(1, 0))
    assert (other - reward).abs().max() > 1e-5


def test_every_frame_and_the_words_are_read():
    """Each of the three frames, the words and the hand's state change the logit."""
    reflector, frames = small_reflector().eval(), random_frames(1)
    tokens = tokenize(["open the drawer"])
    plain = reflector.logits(stack_frames(frames), tokens, hands(len(frames))).item()
    for which in range(3):
        changed = frames.clone()
        changed[:, which] = 255 - changed[:, which]
        assert (
            abs(reflector.logits(stack_frames(changed), tokens, hands(1)).item() - plain) > 1e-5
        ), which
    for words in ("close the drawer", "drawer the open"):
        other = reflector.logits(stack_frames(frames), tokenize([words]), hands(1)).item()
        assert abs(other - plain) > 1e-5, words
    moved = reflector.logits(stack_frames(frames), tokens, hands(1) + 0.02).item()
    assert abs(moved - plain) > 1e-5


@torch.no_grad()
def test_landmarks_go_with_the_picture_not_with_the_hand():
    """A dot that is moved by 8 of 64 pixels moves the landmarks by as much (up to the border's
    influence) wherever the hand is; what later frames show is not asked."""
    torch.manual_seed(0)
    reflector = Reflector(ReflectorConfig()).eval()
    reflector.landmarks.log_sharpness.fill_(5.0)  # an untrained softmax looks everywhere at once
    text = torch.zeros(1, reflector.config.width)
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[0, 0, 28:32, 28:32] = pictures[1, 0, 36:40, 28:32] = 0.5
    before, after = reflector.landmarks(pictures, text.expand(2, -1)).view(2, 2, LANDMARKS)
    moved = after - before  # (rows and columns, landmarks)
    seen = before.abs().amax(0) < 0.6  # a feature of the empty picture has its place at the border
    assert seen.sum() >= 4
    assert torch.allclose(moved[0, seen].median(), torch.tensor(16 / 64), atol=0.06)
    assert moved[1, seen].abs().median() < 0.06


def test_overfits_one_batch():
    """Accuracy 1 where two wordings decide alone and under a third one the place of a spot does."""
    frames = torch.zeros(6, 3, SIZE, SIZE, 3, dtype=torch.uint8)
    frames[::2, 2, 12:20, 2:14] = 255
    frames[1::2, 2, 12:20, 18:30] = 255
    texts = ["open the drawer"] * 2 + ["close the drawer"] * 2 + ["press the button"] * 2
    label = torch.tensor([1.0, 0, 0, 0, 1, 1])
    batch = {"frames": frames, "tokens": tokenize(texts), "state": hands(6), "label": label}
    reflector = small_reflector()
    fit(reflector, lambda step: batch, FitConfig(steps=200, learning_rate=2e-3, warmup=20))
    loss, metrics = reflector(batch)
    assert metrics["accuracy"] == 1.0 and loss.item() < 0.1
    reward = reflector.reward(frames, batch["tokens"], batch["state"])
    assert ((reward > 0.5) == (label > 0.5)).all()


def test_loss_is_the_cross_entropy_of_the_labels():
    """A naive loop over -(y log R + (1 - y) log(1 - R))."""
    tokens, frames = tokenize(["open the drawer"] * 4), random_frames(4)
    label = torch.tensor([1.0, 0.0, 1.0, 0.0])
    reflector = small_reflector().eval()
    total = 0.0
    for y, r in zip(
        label.tolist(), reflector.reward(frames, tokens, hands(len(frames))).tolist(), strict=True
    ):
        total -= y * np.log(r) + (1 - y) * np.log(1 - r)
    with bf16_autocast(torch.device("cpu")):  # as `reward` does
        loss, _ = reflector({"frames": frames, "tokens": tokens, "state": hands(4), "label": label})
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)


def test_impossible_threshold_is_refused():
    """eta lies strictly between 0 and 1."""
    with pytest.raises(ValueError, match="got 1.0, expected"):
        ReflectorConfig(threshold=1.0)


# ------------------------------------------------------------------------------------------- frames


def test_three_frames_are_read():
    """First, previous and current; the first frame has no previous one and stands in for it."""
    images = scripted_episode([0] * 6).image
    assert reflector_frames(images, 4)[:, 0, 0, 0].tolist() == [0, 3, 4]
    assert reflector_frames(images, 1)[:, 0, 0, 0].tolist() == [0, 0, 1]
    assert reflector_frames(images, 0)[:, 0, 0, 0].tolist() == [0, 0, 0]


def test_stacked_frames_keep_their_channels():
    """Channels 0-2 are the first frame's RGB, 3-5 the previous one's, 6-8 the current one's."""
    frames = random_frames(2)
    stacked = stack_frames(frames)
    assert stacked.shape == (2, 9, SIZE, SIZE)
    for n in range(3):
        for c in range(3):
            expected = frames[:, n, :, :, c].float() / 255 - 0.5
            assert torch.allclose(stacked[:, 3 * n + c], expected)


def test_batches_hold_half_successes_of_the_right_task():
    """Frames, words and label of one moment; half are successes wherever a task has any."""
    episodes = [
        scripted_episode([0, 0, 0, 1, 1]),
        scripted_episode([0, 0, 1], offset=50),
        scripted_episode([0, 0, 0], "handle-press", offset=100),  # never succeeds
    ]
    batch = frame_batches(episodes, batch=400, seed=0)(0)
    now = batch["frames"][:, 2, 0, 0, 0].long()
    label = {3: 1.0, 4: 1.0, 52: 1.0}
    assert batch["label"].tolist() == [label.get(n, 0.0) for n in now.tolist()]
    drawer = now < 100
    both = tokenize(INSTRUCTIONS["drawer-open"] + INSTRUCTIONS["handle-press"])
    length = batch["tokens"].shape[1]  # shorter: padding of all rows is left out
    assert not both[:, length:].any()
    words = {tuple(w) for w in both[:, :length].tolist()}
    drawer_words = {tuple(w) for w in tokenize(INSTRUCTIONS["drawer-open"])[:, :length].tolist()}
    for tokens, of_drawer in zip(batch["tokens"].tolist(), drawer.tolist(), strict=True):
        assert tuple(tokens) in words and (tuple(tokens) in drawer_words) == of_drawer
    assert set(now.tolist()) == {0, 1, 2, 3, 4, 50, 51, 52, 100, 101, 102}
    # fair draws, 5 standard deviations each: false-alarm probability 1e-6 (and seeded)
    assert abs(drawer.sum().item() - 200) < 5 * np.sqrt(100)
    positive = batch["label"][drawer].mean().item()
    assert abs(positive - 0.5) < 5 * 0.5 / np.sqrt(drawer.sum().item())


# ----------------------------------------------------------------------------------------- the stop


def test_curves_begin_after_the_first_decision():
    """R of frames 1 to T: before any decision there is nothing to stop."""
    episodes = [scripted_episode([0, 0, 0, 1]), scripted_episode([0, 1], offset=50)]
    curves = judge_episodes(Brightness(), episodes)
    assert [len(curve) for curve in curves] == [3, 1]
    assert np.allclose(curves[0], [0.01, 0.02, 0.03]) and np.allclose(curves[1], [0.51])


def test_false_stops_of_scripted_curves():
    """The *first* two frames in a row above the threshold stop: falsely where the second is no
    success."""
    labels = [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    curves = [
        [0.1, 0.9, 0.9],  # stops in time
        [0.6, 0.9, 0.9],  # stops one frame too early
        [0.9, 0.2, 0.9],  # never stops
        [0.1, 0.7, 0.7],  # stops at a failure
        [0.9, 0.9, 0.1],  # stops after success was lost again
    ]
    episodes = [scripted_episode(label) for label in labels]
    curves = [np.array(curve, np.float32) for curve in curves]
    assert [stop_at(curve, 0.5) for curve in curves] == [3, 2, None, 3, 2]
    assert [stop_at(curve, 0.65) for curve in curves] == [3, 3, None, 3, 2]
    assert stop_at(np.array([0.9]), 0.5) is None and stop_at(np.array([]), 0.5) is None
    assert false_stops(curves, episodes, 0.5) == pytest.approx(3 / 5)
    assert false_stops(curves, episodes, 0.65) == pytest.approx(2 / 5)
    assert false_stops(curves, episodes, 0.8) == pytest.approx(1 / 5)
    assert false_stops(curves, episodes, 0.95) == 0
    assert false_stops([], [], 0.5) == 0
    assert right_outcomes(curves, episodes, 0.5) == pytest.approx(4 / 5)  # when does not count
    assert right_outcomes(curves, episodes, 0.95) == pytest.approx(2 / 5)
    assert right_outcomes([], [], 0.5) == 0


def calibrated(monkeypatch, real: dict, dreams: dict | None = None) -> tuple[float, float]:
    """The thresholds chosen for scripted {R of the frames after the first: labels of all frames}
    of real episodes and of dreams (by default the same)."""
    sides = [
        (list(side), [scripted_episode(x) for x in side.values()])
        for side in (real, dreams or real)
    ]
    answers = iter([[np.array(curve, np.float32) for curve in curves] for curves, _ in sides])
    monkeypatch.setattr(reflector_module, "judge_episodes", lambda *_: next(answers))
    judge = Brightness()
    etas = calibrate(judge, sides[0][1], sides[1][1])
    assert etas == pytest.approx((float(judge.threshold), float(judge.dream_threshold)))
    return etas


def test_calibration_separates_what_can_be_separated(monkeypatch):
    """The middle of the thresholds that stop the success and not the failure."""
    labels = [0, 1, 1], [0, 0, 0]
    assert calibrated(monkeypatch, {(0.82, 0.82): labels[0], (0.4, 0.4): labels[1]})[
        0
    ] == pytest.approx(0.6)
    assert calibrated(monkeypatch, {(0.97, 0.97): labels[0], (0.9, 0.9): labels[1]})[
        0
    ] == pytest.approx(0.94)


def test_calibration_prefers_not_to_stop_at_the_wrong_frame(monkeypatch):
    """On real frames a stop before the success is as wrong as one without any: above 0.72 nothing
    is wrong. In a dream it is no error, as long as the episode succeeds."""
    curves = {(0.72, 0.72, 0.9, 0.9): [0, 0, 0, 0, 1], (0.2, 0.1, 0.1, 0.1): [0, 0, 0, 0, 0]}
    real, dream = calibrated(monkeypatch, curves)
    assert real == pytest.approx(0.8)  # of 0.72 ... 0.88 the middle
    assert dream == pytest.approx(0.5)  # of 0.10 ... 0.88


def test_calibration_allows_few_false_stops(monkeypatch):
    """Forty successes at 0.45 are worth more than one false stop among forty-one episodes, not
    more than two among forty-two; in dreams all errors count alike."""
    success = {(0.45, 0.45 + i / 1e4): [0, 1, 1] for i in range(40)}
    one = {(0.45, 0.46): [0, 0, 0]}
    assert calibrated(monkeypatch, success | one)[0] < 0.45
    two = one | {(0.45, 0.47): [0, 0, 0]}
    real, dream = calibrated(monkeypatch, success | two)
    assert real > 0.45 > dream  # real: stops nothing


def test_each_task_has_the_eta_at_which_most_dreams_end_as_reality():
    """One task whose dreams promise too much, one whose promise too little, one on which any eta
    is right: of equals one at three quarters."""
    real = [scripted_episode(x, task) for task in INSTRUCTIONS for x in ([0, 0, 1], [0, 0, 0])][:6]
    tasks = [real[i].task for i in (0, 2, 4)]
    seen = [(0.9, 0.9), (0.7, 0.7), (0.3, 0.3), (0.1, 0.1), (0.99, 0.99), (0.99, 0.01)]
    etas = eta_of_each_task([np.array(curve) for curve in seen], real)
    assert etas == pytest.approx(dict(zip(tasks, (0.84, 0.24, 0.74), strict=True)))
    wrong = [(0.2, 0.2), (0.6, 0.6)]  # the one that fails promises more: 1 of 2 is right at most
    (eta,) = eta_of_each_task([np.array(curve) for curve in wrong], real[:2]).values()
    assert eta > 0.6  # no stop at all rather than a false one


def test_platt_scaling_recovers_the_true_probabilities():
    """Logits that are twice too large and shifted by 1: R becomes the share of successes.

    The reflector's raw R is a function of the frame's brightness alone, labels are drawn with the
    true probability. 4,000 frames: by the Fisher information at these logits the standard error of
    the fitted R is at most 0.012 (in the middle); 0.05 is four of them, and the draw is seeded.
    """
    rng = np.random.default_rng(0)
    episodes, truth = [], []
    for _ in range(20):
        logit = rng.uniform(-3, 3, 201)
        probability = 1 / (1 + np.exp(-logit))
        episode = scripted_episode((rng.random(201) < probability).astype(int).tolist())
        episode.image[:] = np.round(20 * (logit + 3) + 60)[:, None, None, None]
        episodes.append(episode)
        truth.append(1 / (1 + np.exp(-(np.round(20 * (logit + 3) + 60) / 20 - 6))))

    class Overconfident(Reflector):
        def logits(self, frames, tokens, state, landmarks=None):
            brightness = 255 * (frames[:, 6:].mean((1, 2, 3)) + 0.5)
            return 2 * (brightness / 20 - 6) + 1

    reflector = Overconfident(small_reflector().config)
    calibrate_probabilities(reflector, episodes)
    fitted = np.concatenate(judge_episodes(reflector, episodes))
    expected = np.concatenate([p[1:] for p in truth])
    assert np.abs(fitted - expected).max() < 0.05
    assert reflector.platt.tolist() == pytest.approx([0.5, -0.5], abs=0.15)


def test_platt_scaling_leaves_what_it_cannot_fit():
    """No success among the frames, or a judge that is worse than chance: R stays as it was."""
    reflector = small_reflector().eval()
    calibrate_probabilities(reflector, [scripted_episode([0, 0, 0])])
    assert reflector.platt.tolist() == [1.0, 0.0]


def test_right_verdicts_on_scripted_curves():
    """Stopped at a success, stopped too early, missed, rightly left alone: two are right."""
    success = [[0, 0, 1], [0, 0, 0, 1], [0, 0, 1], [0, 0, 0]]
    curves = [np.array(c) for c in ([0.9, 0.9], [0.9, 0.9, 0.9], [0.1, 0.9], [0.9, 0.1])]
    assert right_verdicts(curves, [scripted_episode(s) for s in success], 0.5) == 0.5
