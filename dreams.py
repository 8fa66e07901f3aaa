"""Dreams along real episodes: the same start and the same actions, imagined instead of played.

Used to measure the simulator (open loop, `evaluate.simulator_card`), to train it on what it sees in
a dream instead of on real frames only (`OwnRollouts`), to train the reflector on generated frames
with real labels, to teach the policy (`train.stage_dream_bc`), and by `imagine` and `trust`.

    real    o_0  o_1  o_2  o_3 ... o_T        frames, actions a_t and success labels of an Episode
                  |    |
    dream   o_0  o_1  d_2  d_3 ... d_T        begins at frame 1 here; same actions, same labels
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

import processes
from demos import Episode
from kinematics import motion_before
from tasks import METAWORLD, Robot
from worldenv import WorldEnv


def dream_along(
    world: WorldEnv, episodes: list[Episode], begins: list[int] | None = None
) -> list[Episode]:
    """Open-loop dreams: the episodes' own actions from frame `begins[i]` on (default 0).

    Returns one Episode per episode whose frames and states up to `begins[i]` are the real ones and
    afterwards imagined; actions and success labels stay those of reality. The reflector's stop is
    ignored: the dream goes on as long as the real episode did. `world` needs no known starts.
    Several processes share the episodes, and all of them get every dream.
    """
    begins = processes.share(begins or [0] * len(episodes))
    own, dreams = processes.share(episodes), []
    for first in range(0, len(own), world.num_envs):
        some = slice(first, first + world.num_envs)
        dreams += _dream_batch(world, own[some], np.array(begins[some]))
    return processes.gather(dreams)


def moment(episode: Episode, t: int, robot: Robot = METAWORLD) -> tuple:
    """The real state before decision t of an episode, as `WorldEnv.set_states` continues it
    (the last entry: no frame of it has been judged)."""
    motion = motion_before(episode, t, robot)
    return episode.image[: t + 1], episode.state[t], motion, episode.instruction, 0.0


def _dream_batch(world: WorldEnv, episodes: list[Episode], begins: np.ndarray) -> list[Episode]:
    count = len(episodes)
    lengths = np.array([len(episode) for episode in episodes])
    images = [episode.image.copy() for episode in episodes]
    states = [episode.state.copy() for episode in episodes]
    robot = world.config.robot
    world.set_states([moment(e, int(t), robot) for e, t in zip(episodes, begins, strict=True)])
    for step in range(int((lengths - begins).max())):
        time = begins + step
        running = time < lengths
        world.done[:count] = ~running
        actions = np.zeros(world.action_space.shape, np.float32)
        for i in np.flatnonzero(running):
            actions[i] = episodes[i].action[time[i]]
        observation, *_ = world.step(actions)
        for i in np.flatnonzero(running):
            images[i][time[i] + 1] = observation["image"][i]
            states[i][time[i] + 1] = observation["state"][i]
    return [
        replace(episode, image=image, state=state)
        for episode, image, state in zip(episodes, images, states, strict=True)
    ]


class OwnRollouts:
    """A pool of (dream, real, begin) by the simulator as it is now, renewed while it trains.

    A simulator that has only ever continued real frames goes wrong where its own small errors
    begin: an object that lagged behind the hand once stays behind for good. Here it is shown such
    frames and asked for the real next one.
    """

    def __init__(
        self, world: WorldEnv, episodes: list[Episode], after: int, every: int = 50, seed: int = 0
    ):
        """after: steps before the first dreams (an untrained simulator dreams only noise);
        every: steps between two renewals; each adds world.num_envs dreams, the last 4 x that stay.
        """
        self.world, self.after, self.every = world, after, every
        self.episodes = episodes
        self.tasks = sorted({episode.task for episode in episodes})
        self.by_task = {t: [e for e in episodes if e.task == t] for t in self.tasks}
        self.seed = seed
        self.pool: list[tuple[Episode, Episode, int]] = []

    def __call__(self, step: int) -> list[tuple[Episode, Episode, int]]:
        """The pool at this training step; half of the dreams begin at the start of their episode,
        half anywhere."""
        if step >= self.after and (step - self.after) % self.every == 0:
            count = self.world.num_envs
            rng = np.random.default_rng([self.seed, step])  # so that no generator's state is kept
            self.world.generator.manual_seed(int(rng.integers(2**31)) + processes.rank())
            names = [self.tasks[i % len(self.tasks)] for i in range(count)]
            real = [self.by_task[t][rng.integers(len(self.by_task[t]))] for t in names]
            begins = [int(rng.integers(len(e))) * int(rng.integers(2)) for e in real]
            dreams = dream_along(self.world, real, begins)
            self.pool = (self.pool + list(zip(dreams, real, begins, strict=True)))[-4 * count :]
        return self.pool

    def state(self) -> dict:
        """The pool and the count of frames for resume.py; of a real episode its number."""
        number = {(e.task, e.seed): i for i, e in enumerate(self.episodes)}
        picks = [[number[real.task, real.seed], begin] for _, real, begin in self.pool]
        frames = processes.total(self.world.imagined_frames)
        state: dict = {"picks": picks, "imagined_frames": frames}
        for i, (dream, _, _) in enumerate(self.pool):
            state[f"image{i}"] = torch.from_numpy(dream.image)
            state[f"state{i}"] = torch.from_numpy(dream.state)
        return state

    def set_state(self, state: dict) -> None:
        """Put back what `state` gave."""
        self.world.imagined_frames = state["imagined_frames"] if processes.is_main() else 0
        self.pool = []
        for i, (number, begin) in enumerate(state["picks"]):
            real = self.episodes[number]
            image, hand = state[f"image{i}"].numpy(), state[f"state{i}"].numpy()
            self.pool.append((replace(real, image=image, state=hand), real, begin))
