"""The instant reflector: a vision-language model that reads frames and instruction,
gives the reward and says stop.

Paper's section: "Instant reflector": R(o_{1:t}, g) = sigmoid(head(h_t)) in [0, 1], trained with
binary cross-entropy on per-frame success labels y_t; the episode stops when R > eta = 0.5, and R at
the stop is the return of the rollout.

    first frame, frame t-1, frame t --> vision encoder --.
    first frame --> landmarks, seen from the hand at t --+--> image tokens --.
    hand's position and gripper at t --------------------'                   |
    instruction --> text tokens ---------------------------------------------+--> language model
                                                                                        |
                                                   R <-- head <-- h_t <-----------------'

Landmarks are where things were before the hand covered them: a goal that the hand has reached is
hidden behind it, in a dream it is smeared as well.

# DEVIATION: the paper freezes a pretrained LLaVA and trains the head; the small preset trains all
#   of a small vision-language model (`vlm.KeypointVLM`: convolutions, projector, transformers'
#   Llama); because no checkpoint fits on a laptop's CPU, and CLIP's vision encoder with untrained
#   weights learns three times slower from so few frames, and where things are least of all. The
#   three frames are 9 channels of one picture, so that the same place can be compared at three
#   times. With `ReflectorConfig.pretrained` the model is frozen, as in the paper, and reads
#   three pictures.
# DEVIATION: the paper's reflector reads all frames up to now; here the first, the previous and the
#   current one (`reflector_frames`); because a frame costs the same whenever it was taken, and a
#   success shows in how things are now, beside how they were.
# DEVIATION: the paper's reflector sees frames only; here it also reads the proprioceptive state;
#   because one camera does not show depth, and a task such as reach-wall ends at a point in space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import processes
from fit import bf16_autocast, device_of
from instructions import INSTRUCTIONS
from policy import random_shift
from pretrained import FrozenReader, PretrainedConfig
from tasks import Robot
from view import HandInView, from_the_hand
from vlm import VOCABULARY, Keypoints, KeypointVLM, mean_word, tokenize, without_padding

LANDMARKS = 32  # of the first frame
ETAS = (np.arange(1, 50) / 50).tolist()  # 0.02, 0.04 ... 0.98: what calibration chooses from
FALSE_STOPS = 0.03  # at most, of episodes, on real frames


@dataclass(frozen=True)
class ReflectorConfig:
    """Architecture (the defaults are the small preset's), and the stop."""

    size: int = 64  # pixels
    width: int = 128  # hidden size of the language model; the vision encoder has half as many
    narrow: bool = False  # the middle of the vision encoder has a quarter: see `PolicyConfig`
    threshold: float = 0.5  # eta [paper]; `calibrate` replaces it by the run's own
    robot: Robot = field(default_factory=Robot)
    vocabulary: int = VOCABULARY  # tokens that it knows
    # A frozen model in the place of the small one, if a checkpoint is named.
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)

    def __post_init__(self) -> None:
        if self.pretrained.lora_rank:
            raise ValueError(
                f"ReflectorConfig.pretrained.lora_rank: got {self.pretrained.lora_rank}, "
                "expected 0: only the reflector's head is trained"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"ReflectorConfig.threshold: got {self.threshold}, expected a value between 0 and 1"
            )


class Reflector(nn.Module):
    """R(o_{1:t}, g). `loss, metrics = reflector(batch)` trains it; `reward` judges."""

    vlm: Any  # FrozenReader or KeypointVLM
    middle: torch.Tensor
    spread: torch.Tensor
    threshold: torch.Tensor  # eta on real frames
    dream_threshold: torch.Tensor  # eta in dreams
    platt: torch.Tensor

    def __init__(self, config: ReflectorConfig):
        super().__init__()
        self.config = config
        self.frozen, state_dim = bool(config.pretrained.checkpoint), config.robot.state_dim
        if self.frozen:
            self.vlm = FrozenReader(config.pretrained)
            self.head = nn.Linear(self.vlm.features + state_dim, 1)
        else:
            self.landmarks = Keypoints(3, LANDMARKS, config.width, config.narrow)
            numbers = state_dim + 2 * LANDMARKS
            sizes = config.width, numbers, config.vocabulary
            self.vlm = KeypointVLM(9, *sizes, config.narrow)
            self.head = nn.Linear(config.width, 1)
        self.hand = HandInView()
        self.register_buffer("middle", torch.tensor(config.robot.middle))
        self.register_buffer("spread", torch.tensor(config.robot.spread))
        self.register_buffer("threshold", torch.tensor(config.threshold))
        self.register_buffer("dream_threshold", torch.tensor(config.threshold))
        self.register_buffer("platt", torch.tensor([1.0, 0.0]))  # slope and offset of the logits
        # eta in dreams of single tasks, by instruction: see `eta_of_each_task`; in no checkpoint
        self.dream_etas: dict[str, float] = {}

    def logits(
        self,
        frames: torch.Tensor,
        tokens: torch.Tensor,
        state: torch.Tensor,
        moved: torch.Tensor | float = 0.0,
        landmarks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, 9, H, W) float in [-0.5, 0.5] (first, previous, current), (B, L) and (B, S) now
        -> (B,) logits of success. moved: by how much the frames were shifted, see
        `policy.random_shift`; landmarks: of the first frames, if they are known already."""
        numbers = (state - self.middle) / self.spread
        if self.frozen:  # three pictures in one prompt
            return self._judged(torch.cat([self.vlm(frames, tokens), numbers], dim=1))
        first, previous, current = frames.split(3, dim=1)
        # What changed is the question, so changes are what the encoder sees beside the frame.
        picture = torch.cat([current, current - first, current - previous], dim=1)
        hand = self.hand(state) + moved
        if landmarks is None:
            landmarks = self.landmarks(first, mean_word(self.vlm.words, tokens))
        numbers = torch.cat([numbers, from_the_hand(landmarks, hand)], dim=1)
        return self._judged(self.vlm(picture, tokens, numbers, hand))

    def _judged(self, features: torch.Tensor) -> torch.Tensor:
        """The head, in full: in bfloat16 R would have some hundred values, and rollouts ties."""
        with bf16_autocast(features.device, wanted=False):
            return self.head(features.float()).squeeze(-1)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Binary cross-entropy on {"frames" (B, 3, H, W, 3) uint8, "tokens" (B, L),
        "state" (B, S), "label" (B,) float}.

            loss = -( y log R + (1 - y) log(1 - R) )

        The batches hold half positives and half negatives (`frame_batches`): that is how the
        imbalance (one frame in ten is a success) is handled.
        """
        frames = stack_frames(batch["frames"])
        moved: torch.Tensor | float = 0.0
        if self.training and not self.frozen:  # of frozen parts each frame is to be read only once
            frames, moved = _augment(frames)
        logits = self.logits(frames, batch["tokens"], batch["state"], moved)
        loss = F.binary_cross_entropy_with_logits(logits, batch["label"])
        accuracy = ((logits > 0) == (batch["label"] > 0.5)).float().mean().item()
        return loss, {"accuracy": accuracy}

    @torch.no_grad()
    def first_look(self, first: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """First frames (B, H, W, 3) uint8 and tokens (B, L) -> their landmarks (B, 2 LANDMARKS),
        which stay the same during an episode: half of the work of `reward`. None for a frozen VLM,
        which remembers its features itself."""
        if self.frozen:
            return None
        device = device_of(self)
        picture = stack_frames(first.to(device)[:, None])
        with bf16_autocast(device):  # as it is trained
            return self.landmarks(picture, mean_word(self.vlm.words, tokens.to(device)))

    @torch.no_grad()
    def reward(
        self,
        frames: torch.Tensor,
        tokens: torch.Tensor,
        state: torch.Tensor,
        landmarks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """R in [0, 1], (B,) float32, for (B, 3, H, W, 3) uint8 frames (first, previous, current),
        tokens (B, L) and the current state (B, S), on any device; landmarks: from `first_look`, if
        they are known already.

        R = sigmoid(a z + b), z the logits, (a, b) from `calibrate_probabilities` (1 and 0 before).
        """
        device = device_of(self)
        frames, tokens, state = (x.to(device) for x in (frames, tokens, state))
        with bf16_autocast(device, not self.frozen):  # a frozen VLM has a setting of its own
            logits = self.logits(stack_frames(frames), tokens, state, landmarks=landmarks)
        return torch.sigmoid(self.platt[0] * logits + self.platt[1])

    def dream_eta(self, instruction: str) -> float:
        """Above which R a dream of this instruction stops: the task's own eta, or that of all."""
        return self.dream_etas.get(instruction, float(self.dream_threshold))

    def description(self) -> dict:
        """What a checkpoint needs to build this again."""
        return {"config": asdict(self.config)}


def stack_frames(frames: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W, 3) uint8 -> (B, 9, H, W) float32 in [-0.5, 0.5]."""
    b, n, h, w, c = frames.shape
    # Rearranged while a number is one byte and not four.
    return frames.permute(0, 1, 4, 2, 3).reshape(b, n * c, h, w).float().div_(255).sub_(0.5)


def _augment(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a dream gets wrong: slight shifts, brightness and an amount of noise, the same for the
    three frames of a row; the grain itself is drawn for each.

    The reflector is trained on real frames but judges imagined ones; these are the artefacts of the
    small simulator.
    """
    frames, moved = random_shift(frames, 3)
    rows = len(frames) * processes.world()  # drawn for those of all processes
    noise, light = map(processes.share, torch.rand(2, rows, 1, 1, 1, device=frames.device))
    grain = processes.share(processes.all_rows_like(frames).normal_())
    return torch.addcmul(frames + 0.1 * (light - 0.5), 0.04 * noise, grain), moved


def reflector_frames(images: np.ndarray, t: int) -> np.ndarray:
    """The frames that the reflector reads at time t of an episode's images (T+1, H, W, 3):
    first, previous, current."""
    return images[[0, max(t - 1, 0), t]]


def frame_batches(episodes, batch: int, seed: int):
    """A `sample(step)` for fit.fit: frames of all episodes, tasks drawn evenly,
    half of each batch successful frames.

    Of the others the later of two draws is taken: it is near the end of an episode, by the goal,
    that success is hard to tell; at the start nothing has happened yet.

    # DEVIATION: the paper's BCE is over the frames as they are recorded; here half of them are
    #   successes, the others rather late ones, and dreams of the episodes are among them
    #   (`train.stage_reflector`); because few frames are successes, and R has to judge dreams.
    """
    tasks = sorted({episode.task for episode in episodes})
    pools = {
        (task, label): [
            (e, t)
            for e in episodes
            if e.task == task
            for t in range(len(e) + 1)
            if bool(e.success[t]) == label
        ]
        for task in tasks
        for label in (False, True)
    }
    wordings = {task: tokenize(INSTRUCTIONS[task]) for task in tasks}

    def sample(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, step])
        frames, tokens, states, labels = [], [], [], []
        for i in range(batch):
            task = tasks[rng.integers(len(tasks))]
            pool = pools[task, i % 2 == 1] or pools[task, False]
            draws = [pool[k] for k in rng.integers(len(pool), size=2)]
            episode, t = draws[0] if i % 2 else max(draws, key=lambda drawn: drawn[1])
            frames.append(reflector_frames(episode.image, t))
            tokens.append(wordings[task][rng.integers(len(wordings[task]))])
            states.append(episode.state[t])
            labels.append(float(episode.success[t]))
        return {
            "frames": torch.from_numpy(np.stack(frames)),
            "tokens": without_padding(torch.stack(tokens)),
            "state": torch.from_numpy(np.stack(states)),
            "label": torch.tensor(labels),
        }

    return sample


def judge_episodes(reflector: Reflector, episodes) -> list[np.ndarray]:
    """R of every frame after the first of every episode: arrays (T,) float32
    (a stop is only possible after a decision)."""
    curves = []
    for episode in processes.share(episodes):
        frames = torch.from_numpy(
            np.stack([reflector_frames(episode.image, t) for t in range(1, len(episode) + 1)])
        )
        tokens = without_padding(tokenize([episode.instruction]))
        known = reflector.first_look(frames[:1, 0], tokens)  # the first frame is that of all
        landmarks = None if known is None else known.expand(len(frames), -1)
        tokens, state = tokens.expand(len(frames), -1), torch.from_numpy(episode.state[1:])
        curves.append(reflector.reward(frames, tokens, state, landmarks).cpu().numpy())
    return processes.gather(curves)


def calibrate_probabilities(reflector: Reflector, episodes) -> None:
    """Platt scaling on episodes held out from the reflector, real or dreamt (where there are such:
    `train.stage_reflector`): R becomes the share of frames like this one that are successes.

    (a, b) = argmin sum BCE(sigmoid(a z + b), y) + a^2 / 2000

    It undoes the balanced batches (half of their frames are successes, of an episode's few are) and
    the overconfidence that comes of training on few episodes. Nothing changes where it cannot be
    fitted: no success among the frames, no failure, or a slope that would turn the order around.
    """
    from sklearn.linear_model import LogisticRegression

    reflector.platt.copy_(torch.tensor([1.0, 0.0]))
    rewards = np.concatenate(judge_episodes(reflector, episodes)).astype(np.float64)
    labels = np.concatenate([episode.success[1:] for episode in episodes])
    if labels.min() == labels.max():
        return
    logits = torch.from_numpy(rewards).logit(eps=1e-7).numpy()[:, None]
    fitted = LogisticRegression(C=1e3).fit(logits, labels)
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope > 0:
        reflector.platt.copy_(torch.tensor([slope, offset]))


def calibrate(reflector: Reflector, episodes, dreams) -> tuple[float, float]:
    """Set both thresholds from episodes that the reflector was not trained on (where there are
    such: `train.stage_reflector`), though the simulator was, and dreams of them (which keep the
    real labels), each to one of ETAS. Of equally good ones the middle is taken: it is farthest from
    both ends, where verdicts get worse. Returns (on real frames, in dreams):

        eta       = argmax right_verdicts(episodes)  where  false_stops(episodes) <= FALSE_STOPS
        eta_dream = argmax right_outcomes(dreams)

    A real stop says "done" to a person, and one that is false cannot be taken back; in a dream both
    errors cost the same, and what counts is how the rollout ends. Where every eta stops
    more falsely than FALSE_STOPS, the largest is taken.

    # DEVIATION: the paper has eta = 0.5 and takes R as it is; here R is scaled on held-out frames,
    #   eta is chosen on them, and in dreams for each task by further real episodes
    #   (`eta_of_each_task`), so that a stop may pay as little as eta; because a small reflector,
    #   trained on balanced batches, is sure too early [measured here].
    """
    curves, dreamt = (judge_episodes(reflector, some) for some in (episodes, dreams))
    fit = [eta for eta in ETAS if false_stops(curves, episodes, eta) <= FALSE_STOPS] or [ETAS[-1]]
    real = _of_the_best(fit, [right_verdicts(curves, episodes, eta) for eta in fit], 0.5)
    dream = _of_the_best(ETAS, [right_outcomes(dreamt, dreams, eta) for eta in ETAS], 0.5)
    reflector.threshold.fill_(real)
    reflector.dream_threshold.fill_(dream)
    return real, dream


def eta_of_each_task(curves: list[np.ndarray], episodes) -> dict[str, float]:
    """eta in dreams, task by task: {task: one of ETAS}. curves: R along dreams of a policy that
    nothing stopped; episodes: the same policy's, from the same starts, in reality:

        eta_task = argmax right_outcomes(curves of the task, its real episodes)

    of several equals one nearer the upper end: LOOP may learn to please a dream that promises too
    much, from one that promises too little it merely learns less.

    In a dream along recorded actions the hand gives away what happened; a policy that dreams acts
    on what it sees, and where contact is lost in reality the dream goes on. How often, differs from
    task to task, and only a comparison with the policy's own real outcomes can tell.
    """
    etas = {}
    for task in dict.fromkeys(episode.task for episode in episodes):
        of_task = [i for i, episode in enumerate(episodes) if episode.task == task]
        seen, true = [curves[i] for i in of_task], [episodes[i] for i in of_task]
        shares = [right_outcomes(seen, true, eta) for eta in ETAS]
        etas[task] = _of_the_best(ETAS, shares, 0.75)
    return etas


def _of_the_best(etas: list[float], shares: list[float], place: float) -> float:
    """Of the etas (in order) with the largest share the one at `place`: 0 the first, 0.5 the
    middle."""
    best = [eta for eta, share in zip(etas, shares, strict=True) if share == max(shares)]
    return best[int(place * len(best))]


def stop_at(curve: np.ndarray, eta: float) -> int | None:
    """After which decision, 1 to T, R (T,) stops an episode, None where it never does: the first t
    with

        R_{t-1} > eta  and  R_t > eta

    # DEVIATION: the paper stops at the first R > eta; here at the second in a row; because what
    #   looks like success for a moment is often a near miss, and success lasts [measured here:
    #   results/attempts.md].
    """
    above = curve > eta
    twice = np.flatnonzero(above[1:] & above[:-1])
    return int(twice[0]) + 2 if len(twice) else None


def stops_at(curves: list[np.ndarray], eta: float | list[float]) -> list[int | None]:
    """`stop_at` of every curve. eta: one for all, or one for each."""
    etas = np.broadcast_to(eta, len(curves)).tolist()
    return [stop_at(curve, own) for curve, own in zip(curves, etas, strict=True)]


def right_verdicts(curves: list[np.ndarray], episodes, eta: float) -> float:
    """Share of episodes that the reflector stops at a successful frame,
    or lets run on where there is no success to stop at."""
    right = 0
    for curve, episode in zip(curves, episodes, strict=True):
        end = stop_at(curve, eta)
        right += bool(episode.success[end]) if end else not episode.succeeded
    return right / max(1, len(episodes))


def right_outcomes(curves: list[np.ndarray], episodes, eta: float) -> float:
    """Share of episodes that the reflector stops, whenever it does, where they succeed at some
    time, or lets run on where they never do."""
    stopped = [end is not None for end in stops_at(curves, eta)]
    same = [stop == e.succeeded for stop, e in zip(stopped, episodes, strict=True)]
    return sum(same) / max(1, len(same))


def false_stops(curves: list[np.ndarray], episodes, eta: float | list[float]) -> float:
    """Share of episodes that the reflector would stop at a frame that is not a success."""
    wrong = 0
    for end, episode in zip(stops_at(curves, eta), episodes, strict=True):
        wrong += end is not None and not episode.success[end]
    return wrong / max(1, len(episodes))


def recall(curves: list[np.ndarray], episodes, eta: float | list[float]) -> float | None:
    """Among episodes that succeed the share that the reflector stops at a successful frame;
    None where none succeeds."""
    caught = []
    for end, episode in zip(stops_at(curves, eta), episodes, strict=True):
        if episode.succeeded:
            caught.append(end is not None and bool(episode.success[end]))
    return float(np.mean(caught)) if caught else None
