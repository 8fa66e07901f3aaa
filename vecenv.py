"""Many real environments side by side, spread over worker processes.

Paper's section: "Evaluation" (the real environment). It has the same face as worldenv.WorldEnv, so
one rollout function serves both, and imports no torch, so that worker processes stay small.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

import processes
from camera import Camera
from libero_env import LiberoEnv
from libero_tasks import LIBERO_INSTRUCTIONS
from render import choose_backend
from tasks import DEFAULT_SUITE, SPLITS, ChunkedEnv, EnvConfig, RealEnv, Start, spaces

# Seconds without an answer after which a worker that still lives is taken to hang. The longest
# honest wait is the first reset: it builds an environment per task and draws the first frames.
PATIENCE = 1800.0
LOOK = 1.0  # seconds between two looks at whether it lives


def make_env(task: str, config: EnvConfig) -> ChunkedEnv:
    """The real environment of a task: LIBERO's or Meta-World's."""
    if task in LIBERO_INSTRUCTIONS:
        return LiberoEnv(task, config)
    return RealEnv(task, config)


def _worker(pipe, config: EnvConfig) -> None:
    """A worker process: plays its slots one after the other, in lockstep with the other workers.

    It keeps one MuJoCo environment (and renderer) per task and swaps slots in and out with
    snapshots, so that 64 slots cost no more memory than one environment per task.
    """
    # Ctrl-C reaches every process of the terminal, and SIGTERM may reach a whole group: the main
    # process ends the workers by their pipes.
    for number in processes.ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = os.environ["LP_NUM_THREADS"] = "1"
    envs: dict[str, ChunkedEnv] = {}
    task_of: dict[int, str] = {}
    resting: dict[int, dict] = {}  # slot -> snapshot, for slots that are swapped out
    loaded: dict[str, int] = {}  # task -> the slot that its environment holds now

    def bring_in(slot: int, task: str, restore: bool) -> ChunkedEnv:
        if task not in envs:
            envs[task] = make_env(task, config)
        env, holder = envs[task], loaded.get(task)
        if holder != slot:
            if holder is not None:
                resting[holder] = env.snapshot()
            if restore:
                env.restore(resting.pop(slot))
            loaded[task] = slot
        return env

    def let_go(slot: int) -> None:
        task = task_of.get(slot)
        if task is not None and loaded.get(task) == slot:
            del loaded[task]

    def do(command: str, slot: int, argument):
        if command == "reset":
            start, stop_on_success = argument
            let_go(slot)
            resting.pop(slot, None)
            task_of[slot] = start.task
            env = bring_in(slot, start.task, restore=False)
            env.stop_on_success = stop_on_success
            return env.reset(seed=start.seed)
        if command == "set":
            task, snapshot, stop_on_success = argument
            let_go(slot)
            task_of[slot] = task
            resting[slot] = snapshot
            env = bring_in(slot, task, restore=True)
            env.stop_on_success = stop_on_success
            return None
        env = bring_in(slot, task_of[slot], restore=True)
        if command == "get":
            return task_of[slot], env.snapshot(), env.stop_on_success
        if command == "camera":
            return env.camera
        return env.step(argument) if command == "step" else env.expert_step()

    try:
        while (jobs := pipe.recv()) is not None:
            pipe.send([(slot, do(command, slot, argument)) for command, slot, argument in jobs])
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # the main process is gone: nobody is left to answer
    except Exception:
        with contextlib.suppress(ConnectionError):
            pipe.send(traceback.format_exc())
    finally:
        # Python's own end would close the renderers one after the other, when parts of MuJoCo are
        # gone already: a screenful of "Exception ignored" behind the one line that matters.
        os._exit(0)


@contextlib.contextmanager
def _ignoring_endings() -> Iterator[None]:
    """A process that is started inside ignores all ENDINGS from its first moment on, also while it
    still imports what `_worker` needs. (Only the main thread may say so.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in processes.ENDINGS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _kill_all(workers: list) -> None:
    """End workers that nobody has closed."""
    for worker in workers:
        worker.kill()


class VecRealEnv(gymnasium.vector.VectorEnv):
    """B real environments side by side, spread over worker processes;
    the same face as worldenv.WorldEnv.

    reset(options={"starts": [Start, ...], "stop_on_success": bool}) -> observations, infos
    step(actions (B, K, A) float32 in [-1, 1])
        -> observations, rewards, terminations, truncations, infos

    Observations: {"image": (B, H, W, 3) uint8, "state": (B, S) float32, "instruction": B strings};
    rewards (B,) float32; infos: "success" (B,) bool after the decision, "passed" (B,) after any of
    its steps, "steps" (B,) environment steps taken. A slot that is done rests (its last observation
    is repeated, at no cost) until the next reset: autoreset is disabled.
    """

    action_space: gymnasium.spaces.Box

    def __init__(self, num_envs: int, config: EnvConfig | None = None, workers: int | None = None):
        self._pipes, self._processes = [], []  # first: `close` comes here whatever fails below
        choose_backend()  # here, so that every worker inherits MUJOCO_GL
        self.config = config or EnvConfig()
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spaces(self.config)
        self.observation_space = gymnasium.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gymnasium.vector.utils.batch_space(  # type: ignore[assignment]  # a Box
            self.single_action_space, num_envs
        )
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
        self.real_steps = self.real_resets = 0  # the ledger of real interaction

        context = multiprocessing.get_context("spawn")
        for _ in range(min(workers or processes.own_cores(), num_envs)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, self.config), daemon=True)
            with _ignoring_endings():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        # Python's own end would send them SIGTERM, which they ignore, and wait.
        multiprocessing.util.Finalize(self, _kill_all, (self._processes,), exitpriority=1)

    def _ask(self, jobs: list[tuple]) -> dict[int, Any]:
        """Send (command, slot, argument) jobs to the workers that own the slots;
        return {slot: answer}. RuntimeError where a worker fails, dies or hangs: at once, at once,
        and after PATIENCE."""
        answers: dict[int, Any] = {}
        shares = [
            [job for job in jobs if job[1] % len(self._pipes) == w] for w in range(len(self._pipes))
        ]
        try:
            for pipe, share in zip(self._pipes, shares, strict=True):
                if share:
                    pipe.send(share)
            for number, share in enumerate(shares):
                if share:
                    answer = self._answer(number)
                    if isinstance(answer, str):
                        raise RuntimeError(
                            "a worker of the real environment failed; expected it to play and draw "
                            f"(`python cli.py doctor` tries it); {processes.AGAIN}:\n{answer}"
                        )
                    answers.update(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(
                "a worker process of the real environment died (out of memory, or killed?); "
                f"expected all of them to the end; {processes.AGAIN}"
            ) from error
        return answers

    def _answer(self, number: int):
        """What a worker sends; EOFError once it is dead, RuntimeError when it hangs."""
        pipe, process = self._pipes[number], self._processes[number]
        for _ in range(math.ceil(PATIENCE / LOOK)):
            if pipe.poll(LOOK):  # there is an answer, or the end of a worker that closed its pipe
                return pipe.recv()
            if not process.is_alive() and not pipe.poll():
                raise EOFError
        raise RuntimeError(
            f"a worker of the real environment gave no answer in {PATIENCE / 60:.0f} minutes; "
            f"expected one within seconds; {processes.AGAIN}"
        )

    def reset(self, *, seed=None, options: dict | None = None):
        """Start every slot at its Start; `options["starts"]` has 1 to num_envs of them,
        other slots rest."""
        super().reset(seed=seed)
        options = options or {}
        starts = options.get("starts")
        if starts is None:  # gymnasium's way: seeds only, tasks of the default suite in turn
            seeds = self.np_random.integers(SPLITS["rl"].start, SPLITS["rl"].stop, self.num_envs)
            starts = [
                Start(DEFAULT_SUITE[i % len(DEFAULT_SUITE)], int(s)) for i, s in enumerate(seeds)
            ]
        if not 1 <= len(starts) <= self.num_envs:
            raise ValueError(f"got {len(starts)} starts, expected 1 to {self.num_envs}")
        stop = options.get("stop_on_success", True)
        answers = self._ask([("reset", slot, (start, stop)) for slot, start in enumerate(starts)])
        size = self.config.size
        self._images = np.zeros((self.num_envs, size, size, 3), np.uint8)
        self._states = np.zeros((self.num_envs, self.config.robot.state_dim), np.float32)
        self._texts = [""] * self.num_envs
        self._success = np.zeros(self.num_envs, bool)
        self.done = np.arange(self.num_envs) >= len(starts)
        for slot, (observation, _) in answers.items():
            self._remember(slot, observation)
        self.real_resets += len(starts)
        return self._observations(), {"success": self._success.copy()}

    def _remember(self, slot: int, observation: dict) -> None:
        self._images[slot] = observation["image"]
        self._states[slot] = observation["state"]
        self._texts[slot] = observation["instruction"]

    def _observations(self) -> dict:
        return {
            "image": self._images.copy(),
            "state": self._states.copy(),
            "instruction": tuple(self._texts),
        }

    def step(self, actions: np.ndarray):
        """Play one chunk in every slot that is not done."""
        actions = np.asarray(actions, np.float32)
        if actions.shape != self.action_space.shape:
            raise ValueError(
                f"actions: got shape {actions.shape}, expected {self.action_space.shape}"
            )
        active = np.flatnonzero(~self.done)
        return self._collect(self._ask([("step", int(slot), actions[slot]) for slot in active]))[1:]

    def expert_step(self):
        """The scripted expert plays one chunk in every slot:
        (chunks (B, K, A), then the values of `step`)."""
        return self._collect(
            self._ask([("expert", int(slot), None) for slot in np.flatnonzero(~self.done)])
        )

    def _collect(self, answers: dict) -> tuple:
        chunks = np.zeros(self.action_space.shape, np.float32)
        terminations, truncations, passed = np.zeros((3, self.num_envs), bool)
        steps = np.zeros(self.num_envs, np.int64)
        rewards = np.zeros(self.num_envs, np.float32)
        for slot, answer in answers.items():
            if len(answer) == 6:  # the expert's answer also tells what it did
                chunks[slot], *answer = answer
            observation, rewards[slot], terminations[slot], truncations[slot], info = answer
            self._remember(slot, observation)
            self._success[slot], passed[slot] = info["success"], info["passed"]
            steps[slot] = info["steps"]
        self.done |= terminations | truncations
        self.real_steps += int(steps.sum())
        infos = {"success": self._success.copy(), "passed": passed, "steps": steps}
        return chunks, self._observations(), rewards, terminations, truncations, infos

    def get_states(self, slots: list[int]) -> list[tuple]:
        """A picture of each slot from which `set_states` continues it,
        in any slot, any number of times."""
        answers = self._ask([("get", slot, None) for slot in slots])
        return [
            (answers[i], self._images[i].copy(), self._states[i].copy(), self._texts[i])
            for i in slots
        ]

    def set_states(self, states: list[tuple]) -> dict:
        """Continue from earlier states (see `get_states`), one per slot from slot 0 on;
        returns observations."""
        self._ask([("set", slot, state[0]) for slot, state in enumerate(states)])
        self.real_resets += len(states)  # a branch is an episode too: a robot would have to replay
        self._success[:] = False
        self.done = np.arange(self.num_envs) >= len(states)
        for slot, (_, image, state, text) in enumerate(states):
            self._images[slot], self._states[slot], self._texts[slot] = image, state, text
        return self._observations()

    @property
    def camera(self) -> Camera:
        """The camera, the same for every task (asks a worker; only after a reset)."""
        return self._ask([("camera", 0, None)])[0]

    def close_extras(self, **kwargs) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a broken pipe: the worker is gone already
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()


def stopped_by_the_oracle(state: tuple) -> tuple:
    """A state of `VecRealEnv.get_states`, to be continued with the oracle's termination."""
    (task, snapshot, _), *seen = state
    return ((task, snapshot, True), *seen)


class RealWorkers:
    """The real environment of a run, started when it is first needed, with a ledger of what was
    played."""

    def __init__(self, config):
        """config: runs.RunConfig, of which `slots` and `env` are read."""
        self.config = config
        self.env: VecRealEnv | None = None

    def __enter__(self) -> RealWorkers:
        return self

    def __exit__(self, *exception) -> None:
        self.rest()

    def open(self) -> VecRealEnv:
        if self.env is None:
            self.env = VecRealEnv(self.config.slots // processes.world(), self.config.env)
        return self.env

    def rest(self) -> None:
        """End its processes, whose memory others need now; `open` starts them again."""
        if self.env is not None:
            self.env.close()
            self.env = None

    def count(self) -> dict[str, int]:
        """Real episodes and steps since the last call, of all processes."""
        env = self.env
        if env is None:
            return {"real_episodes": 0, "real_steps": 0}
        spent = {"real_episodes": env.real_resets, "real_steps": env.real_steps}
        env.real_resets = env.real_steps = 0
        return {name: processes.total(count) for name, count in spent.items()}

    def state(self) -> dict:
        """What was counted since the last call of `count`, for resume.py."""
        spent = self.count()
        self.set_state(spent)
        return spent

    def set_state(self, state: dict) -> None:
        """Put back what `state` gave: the main process has it for all."""
        if processes.is_main() and self.env is not None:
            self.env.real_resets = state["real_episodes"]
            self.env.real_steps = state["real_steps"]
