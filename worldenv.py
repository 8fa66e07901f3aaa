"""World-Env: the learned world as a Gymnasium vector environment.
The idea of the paper in one file.

Paper's section: "The loop": the simulator gives o_{t+1}, forward kinematics gives s_{t+1}, the
reflector gives R and says when to stop. No real interaction happens here.

                 action chunk a_t
                        |
      s_t --kinematics--+--> s_{t+1} ---------------------.
                        |                                 v
      o_t, memory --simulator (diffusion)--> o_{t+1} --> observation for the policy
                                               |
                                     reflector (VLM) --> R, stop when R > eta twice in a row

Symbols: B slots (dreams side by side), K environment steps in a chunk, A action dimensions, S state
dimensions, H x W pixels, T decisions of an episode, R reward, eta the reflector's threshold.
State: the hand's x, y, z in metres, the gripper's opening in [0, 1] (LIBERO: then the hand's
orientation). Motion: the state before and the hand's target. A *look*: what simulator and reflector
work out once from the first frame.

It has the same face as vecenv.VecRealEnv (reset, step, get_states, set_states, done), so one
rollout function serves both.
"""

from __future__ import annotations

import ctypes

import gymnasium
import numpy as np
import torch

import processes
from instructions import INSTRUCTIONS
from kinematics import motion_at_rest, motion_dim, next_motion
from reflector import reflector_frames, stop_at
from simulator import memory_indices
from tasks import EnvConfig, Start, spaces
from vlm import tokenize, without_padding

BLOCK = 64  # slots imagined at a time: larger blocks leave the processor's cache [measured here]


class WorldEnv(gymnasium.vector.VectorEnv):
    """B imagined environments.

    simulator: has next_state(state, motion, action), next_frame(memory, state, next_state,
        action, look, generator) and first_look(first), as simulator.Simulator;
        reflector: has first_look(first, tokens), reward(frames, tokens, state, landmarks) and
        dream_eta(instruction), as reflector.Reflector.
    starts: {Start: (image (H, W, 3) uint8, state (S,) float32)}, the real start frames from which a
        dream may begin.

    reset(options={"starts": [Start, ...]}), step(actions (B, K, A) in [-1, 1]): as
        vecenv.VecRealEnv.
    The reward of a step is R at the stop or at the horizon, else 0; terminated where R > eta for
    the second time in a row (`reflector.stop_at`; eta is that of the task in dreams), truncated at
    the horizon. infos: "reflector" (B,) R of every running slot, "success" (B,) the reflector's
    verdict. Done slots rest.
    """

    action_space: gymnasium.spaces.Box

    def __init__(
        self, simulator, reflector, starts: dict, num_envs: int, config: EnvConfig, seed: int = 0
    ):
        keep_freed_memory()
        self.simulator, self.reflector = simulator, reflector
        self.config, self.num_envs = config, num_envs
        self.starts = starts
        self.single_observation_space, self.single_action_space = spaces(config)
        self.observation_space = gymnasium.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gymnasium.vector.utils.batch_space(  # type: ignore[assignment]  # a Box
            self.single_action_space, num_envs
        )
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
        # Should frames be drawn, each process has noise of its own.
        self.generator = torch.Generator().manual_seed(seed + 1000 * processes.rank())
        self.imagined_frames = 0  # the ledger
        # The history of every slot, (B, horizon+1, H, W, 3):
        # what memory and reflector look back into.
        self._history = np.zeros(
            (num_envs, config.horizon + 1, config.size, config.size, 3), np.uint8
        )
        self._states = np.zeros((num_envs, config.robot.state_dim), np.float32)
        # See kinematics.next_motion.
        self._motions = np.zeros((num_envs, motion_dim(config.robot)), np.float32)
        self._judged = np.zeros(num_envs, np.float32)  # R of the current frame, 0 of a first one
        self._texts = [""] * num_envs
        self._etas = np.zeros(num_envs, np.float32)
        self._time = np.zeros(num_envs, np.int64)
        self.done = np.ones(num_envs, bool)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Begin dreams at real start states: `options["starts"]`, 1 to B of them;
        without, known ones in turn. ValueError for another number of starts, or one whose first
        frame is not known."""
        super().reset(seed=seed)
        if seed is not None:
            self.generator.manual_seed(seed)
        known = list(self.starts)
        starts = (options or {}).get("starts")
        if starts is None:
            starts = [known[i % len(known)] for i in range(self.num_envs)] if known else []
        if not 1 <= len(starts) <= self.num_envs:
            raise ValueError(f"got {len(starts)} starts, expected 1 to {self.num_envs}")
        for slot, start in enumerate(starts):
            if start not in self.starts:
                raise ValueError(
                    f"no real start frame is known for {start}; "
                    "a dream begins at a real start state"
                )
            self._history[slot, 0], self._states[slot] = self.starts[start]
            self._texts[slot] = INSTRUCTIONS[start.task][0]
        self._time[:], self._judged[:] = 0, 0
        self._motions[:] = motion_at_rest(torch.from_numpy(self._states)).numpy()
        self.done = np.arange(self.num_envs) >= len(starts)
        self._prepare()
        return self._observations(), {"success": np.zeros(self.num_envs, bool)}

    def _prepare(self) -> None:
        """What does not change during an episode, of the slots that have one (the first ones): what
        simulator and reflector know of the first frame, the instruction's tokens and its eta."""
        used = int((~self.done).sum())
        first = torch.from_numpy(self._history[:used, 0])
        with torch.no_grad():
            self._look = self.simulator.first_look(first.permute(0, 3, 1, 2).float() / 255 - 0.5)
        self._tokens = without_padding(tokenize(self._texts[:used]))
        self._landmarks = self.reflector.first_look(first, self._tokens)
        self._etas[:used] = [self.reflector.dream_eta(text) for text in self._texts[:used]]

    def _observations(self) -> dict:
        slots = np.arange(self.num_envs)
        return {
            "image": self._history[slots, self._time],
            "state": self._states.copy(),
            "instruction": tuple(self._texts),
        }

    def step(self, actions: np.ndarray):
        """Imagine one decision in every slot that is not done; ValueError where actions are not
        (B, K, A)."""
        actions = np.asarray(actions, np.float32)
        if actions.shape != self.action_space.shape:
            raise ValueError(
                f"actions: got shape {actions.shape}, expected {self.action_space.shape}"
            )
        on = np.flatnonzero(~self.done)
        rewards, judged = np.zeros((2, self.num_envs), np.float32)
        terminations, truncations = np.zeros((2, self.num_envs), bool)
        if len(on):
            for block in np.array_split(on, -(-len(on) // BLOCK)):
                self._imagine(block, torch.from_numpy(actions[block]).clamp(-1, 1))
                judged[block] = self._judge(block)
            latest = np.stack([self._judged[on], judged[on]], axis=1)  # (n, 2) R before and now
            terminations[on] = [
                stop_at(pair, eta) is not None
                for pair, eta in zip(latest, self._etas[on], strict=True)
            ]
            self._judged[on] = judged[on]
            truncations[on] = ~terminations[on] & (self._time[on] >= self.config.horizon)
            ended = terminations | truncations
            rewards[ended] = judged[ended]
            self.done |= ended
            self.imagined_frames += len(on)
        infos = {"success": terminations.copy(), "reflector": judged}
        return self._observations(), rewards, terminations, truncations, infos

    def _imagine(self, on: np.ndarray, action: torch.Tensor) -> None:
        """s_{t+1} by kinematics, o_{t+1} by the simulator, for the slots `on`."""
        times = [memory_indices(int(time)) for time in self._time[on]]
        remembered = self._history[on[:, None], times]  # (n, M, H, W, 3)
        state, motion = torch.from_numpy(self._states[on]), torch.from_numpy(self._motions[on])
        next_state = self.simulator.next_state(state, motion, action)
        frame = self.simulator.next_frame(
            torch.from_numpy(remembered),
            state,
            next_state,
            action,
            tuple(x[on] for x in self._look),
            self.generator,
        )
        self._time[on] += 1
        self._history[on, self._time[on]] = frame.cpu().numpy()
        self._motions[on] = next_motion(state, motion, action, self.config.robot).numpy()
        self._states[on] = next_state.cpu().numpy()

    def _judge(self, on: np.ndarray) -> np.ndarray:
        """R for the slots `on`, (n,) float32: the reflector reads
        the first, the previous and the current frame, and the current state."""
        frames = np.stack(
            [reflector_frames(self._history[slot], int(self._time[slot])) for slot in on]
        )
        state = torch.from_numpy(self._states[on])
        landmarks = None if self._landmarks is None else self._landmarks[on]
        rewards = self.reflector.reward(
            torch.from_numpy(frames), self._tokens[on], state, landmarks
        )
        return rewards.cpu().numpy()

    # -- a dream can be continued from any of its moments, any number of times:
    # branching rollouts live on this.

    def get_states(self, slots: list[int]) -> list[tuple]:
        """A picture of each slot from which `set_states` continues it."""
        return [
            (
                self._history[i, : self._time[i] + 1].copy(),
                self._states[i].copy(),
                self._motions[i].copy(),
                self._texts[i],
                self._judged[i],
            )
            for i in slots
        ]

    def set_states(self, states: list[tuple]) -> dict:
        """Continue from earlier states, one per slot from slot 0 on; returns observations."""
        for slot, (history, state, motion, text, judged) in enumerate(states):
            self._history[slot, : len(history)] = history
            self._states[slot], self._motions[slot] = state, motion
            self._texts[slot], self._judged[slot] = text, judged
            self._time[slot] = len(history) - 1
        self.done = np.arange(self.num_envs) >= len(states)
        self._prepare()
        return self._observations()

    def state(self) -> dict:
        """The count of frames, of all processes, for resume.py."""
        return {"imagined_frames": processes.total(self.imagined_frames)}

    def set_state(self, state: dict) -> None:
        """Put back what `state` gave."""
        self.imagined_frames = state["imagined_frames"] if processes.is_main() else 0


def keep_freed_memory() -> None:
    """Let this process keep more of the memory that it frees, where its C library can be told so
    (glibc). By itself it hands the pictures of one decision, tens of MB, back to the system and
    fetches them anew for the next, page by page: a tenth of an imagined decision [measured here].
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
        library.mallopt(mmap_threshold, 2**25)  # the most that it takes
        library.mallopt(trim_threshold, 2**28)


def give_back_memory() -> None:
    """All that is kept so: a stage is over, and the next one, or another process, needs its own."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


class NoReflector:
    """Stands where a reflector is missing, or only pictures are wanted: no reward (NaN), and never
    a stop."""

    dream_threshold = torch.tensor(float("inf"))

    def dream_eta(self, instruction: str) -> float:
        return float(self.dream_threshold)

    def first_look(self, first, tokens) -> None:
        return None

    def reward(self, frames, tokens, state, landmarks=None) -> torch.Tensor:
        return torch.full((len(frames),), float("nan"))


def start_frames(episodes) -> dict[Start, tuple[np.ndarray, np.ndarray]]:
    """The first frame (H, W, 3) uint8 and state (S,) float32 of every episode:
    the real start states from which dreams may begin."""
    return {Start(e.task, e.seed): (e.image[0], e.state[0]) for e in episodes}
