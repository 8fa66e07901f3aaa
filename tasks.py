"""The real environment: Meta-World tasks in MuJoCo, seen through one camera, played in chunks.

Paper's section: "Evaluation" (the real environment) and the source of every real frame in the
project. This is the bottom of the project: it imports no torch, so that worker processes stay
small.

    start seed --reset--> image, state, instruction
               --step(chunk of K actions)--> image, state, success

Axis legend used in every file of the project:
    B  environments played side by side     H, W  image height, width in pixels
    K  environment steps in one action chunk (one *decision*)
    A  action dimensions (4)                S  state dimensions (4)

# DEVIATION: the paper evaluates on LIBERO with a 7-D end-effector action; here Meta-World's 4-D
#   action (dx, dy, dz, gripper; the hand's orientation is fixed); because Meta-World installs from
#   PyPI alone and brings a scripted expert for each task. For the same reason the state is (x, y,
#   z, gripper opening).
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import signal
import traceback
from dataclasses import dataclass
from functools import partial

import gymnasium
import numpy as np

from camera import Camera
from instructions import INSTRUCTION_CHARACTERS, INSTRUCTIONS, TASKS
from processes import own_cores
from render import choose_backend

# dx, dy, dz in [-1, 1] (1.0 moves the hand's target by 1 cm), gripper in [-1, 1] (+1 closes)
ACTION_DIM = 4
STATE_DIM = 4  # hand x, y, z in metres (world frame), gripper opening in [0, 1]

# The default suite: chosen by `python cli.py screen`, whose table is results/screening.md.
DEFAULT_SUITE = ("coffee-push", "dial-turn", "faucet-close", "lever-pull", "reach-wall")

# Every start state is a seed, and every purpose owns a range of seeds: no start is ever used for
# two purposes. Training runs with different --seed take different demonstration and exploration
# starts; test starts are the same for every run, so that runs can be compared start by start.
SPLITS = {
    "demo": range(0, 100_000),  # expert demonstrations
    "explore": range(100_000, 1_000_000),  # exploration episodes of the SFT policy
    "rl": range(1_000_000, 9_000_000),  # starts of reinforcement learning in the real simulator
    "dev": range(9_000_000, 9_100_000),  # tuning of every setting
    "test": range(9_100_000, 9_200_000),  # reported figures only
}


def check_tasks(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Return the task names without Meta-World's version suffix;
    raise ValueError for an unknown or repeated one."""
    short = tuple(name.removesuffix("-v3") for name in names)
    for name in short:
        if name not in INSTRUCTIONS:
            near = [task for task in TASKS if name.split("-")[0] in task]
            hint = f"near it: {', '.join(near)}" if near else f"one of: {', '.join(TASKS)}"
            raise ValueError(f"unknown task {name!r}; expected {hint}")
    if not short or len(set(short)) != len(short):
        raise ValueError(f"expected one or more different tasks, got {', '.join(short) or 'none'}")
    return short


def split_seeds(split: str, count: int, offset: int = 0) -> list[int]:
    """The `count` start seeds of a split from `offset` on;
    raises ValueError where they would leave its range."""
    seeds = SPLITS[split][max(offset, 0) : max(offset, 0) + count]
    if offset < 0 or len(seeds) != count:
        raise ValueError(
            f"the {split} split holds {len(SPLITS[split])} starts, asked for {offset}+{count}"
        )
    return list(seeds)


def split_of(seed: int) -> str:
    """The name of the split that owns a start seed, "none" for a seed of no split."""
    return next((name for name, seeds in SPLITS.items() if seed in seeds), "none")


# --------------------------------------------------------------------------------------- the camera


# The usual Meta-World close-up ("corner2" moved to [0.75, 0.075, 0.7], turned by 180 degrees),
# zoomed in from 60 to 42 degrees and moved 12 cm sideways, so that the objects rather than the
# arm's base fill 64 pixels.
CAMERA_NAME = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)
CAMERA_SIDEWAYS = 0.12
CAMERA_FOVY = 42.0
# Frames are drawn twice as large and averaged down: otherwise a goal marker of two pixels flickers,
# and the place of things is only known to a pixel, which is more than a centimetre. A frame takes
# 10 ms instead of 7 [measured here].
SUPERSAMPLE = 2


def _decimate_meshes(model, cell: float = 0.05, min_faces: int = 1000) -> None:
    """Thin out the large visual meshes of a MjModel in memory (vertex clustering),
    before a renderer copies them.

    All vertices in one cell (a cube of `cell` x the mesh's extent) become one; triangles that
    collapse are dropped. Software rendering becomes about 2.5 times faster and the 64-pixel image
    hardly changes. Collisions are untouched: MuJoCo collides the convex hull, which is kept apart
    from the drawn faces.
    """
    for mesh in range(model.nmesh):
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        if count < min_faces:
            continue
        first = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        extent = (vertices.max(0) - vertices.min(0)).max()
        cells = np.floor((vertices - vertices.min(0)) / (cell * extent)).astype(np.int64)
        _, representative, inverse = np.unique(
            cells, axis=0, return_index=True, return_inverse=True
        )
        faces = representative[inverse.reshape(-1)][model.mesh_face[start : start + count]]
        a, b, c = faces.T
        keep = (a != b) & (b != c) & (a != c)
        kept = int(keep.sum())
        model.mesh_face[start : start + kept] = faces[keep]
        for name in ("mesh_facenormal", "mesh_facetexcoord"):
            array = getattr(model, name)
            array[start : start + kept] = array[start : start + count][keep]
        model.mesh_facenum[mesh] = kept


def _touching_object(sim, object_geom: int) -> bool:
    """Meta-World's test of a grasp (both finger pads press on the object),
    on arrays instead of contact by contact.

    Meta-World runs it at every step for its dense reward, where its loop takes
    a fifth of the step's time."""
    contact, force = sim.data.contact, sim.data.efc_force
    on_object = (contact.geom1 == object_geom) | (contact.geom2 == object_geom)
    for pad in ("leftpad_geom", "rightpad_geom"):
        geom = sim.data.geom(pad).id
        touching = on_object & ((contact.geom1 == geom) | (contact.geom2 == geom))
        if not force[contact.efc_address[touching]].sum() > 0:
            return False
    return True


# ---------------------------------------------------------------------------------- one environment


@dataclass(frozen=True)
class EnvConfig:
    """How the real environment is seen and played; the imagined one copies these."""

    size: int = 64  # image height and width in pixels
    chunk: int = 4  # K, environment steps per decision [measured here: episodes of 8-25 decisions]
    horizon: int = 30  # decisions until truncation; the expert needs 22 for the longest task

    def __post_init__(self) -> None:
        for name in ("size", "chunk", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"EnvConfig.{name}: got {getattr(self, name)}, expected 1 or more")
        if self.size % 16:
            raise ValueError(f"EnvConfig.size: got {self.size}, expected a multiple of 16 pixels")


def spaces(config: EnvConfig) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.Box]:
    """One environment's observation and action space, the same in reality and in the dream."""
    size = (config.size, config.size, 3)
    observation = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, size, np.uint8),
        state=gymnasium.spaces.Box(-2.0, 2.0, (STATE_DIM,), np.float32),
        instruction=gymnasium.spaces.Text(100, min_length=0, charset=INSTRUCTION_CHARACTERS),
    )
    return observation, gymnasium.spaces.Box(-1.0, 1.0, (config.chunk, ACTION_DIM), np.float32)


def _shrink(image: np.ndarray) -> np.ndarray:
    """Mean of every SUPERSAMPLE x SUPERSAMPLE pixels: (nH, nW, 3) uint8 -> (H, W, 3) uint8."""
    n, side = SUPERSAMPLE, len(image) // SUPERSAMPLE
    return image.reshape(side, n, side, n, 3).mean((1, 3)).round().astype(np.uint8)


class RealEnv(gymnasium.Env):
    """One Meta-World task as a Gymnasium environment that is stepped in action chunks.

    Observation: {"image": (H, W, 3) uint8, "state": (S,) float32, "instruction": str}.
    Action: (K, A) float32 in [-1, 1].
    Reward: 1.0 when the decision ends in success, else 0.0.
    `info["success"]` is the success after the decision.
    With `stop_on_success` (the oracle's termination) the environment ends at the very step that
    succeeds. `info["steps"]` counts the environment steps really taken.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: str, config: EnvConfig | None = None, stop_on_success: bool = True):
        choose_backend()
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        (self.task,) = check_tasks([task])
        self.config = config or EnvConfig()
        self.stop_on_success = stop_on_success
        self.render_mode = "rgb_array"
        self.observation_space, self.action_space = spaces(self.config)

        self._mujoco = mujoco
        self._sim = ALL_V3_ENVIRONMENTS[f"{self.task}-v3"]()
        # A task of our own choosing: starts are drawn from the task's reset space by our seed.
        # (Meta-World's own `set_task` freezes the start vector, with which some tasks' rejection
        # sampling never ends.)
        self._sim._set_task_called = True
        # The expert reads the goal from the observation, which Meta-World hides
        # (and clips to 0) by default.
        self._sim._partially_observable = False
        vars(self._sim).pop("sawyer_observation_space", None)
        self._sim._freeze_rand_vec = False
        self._sim.seeded_rand_vec = True
        self._sim.max_path_length = 10**9
        self._sim.touching_object = partial(_touching_object, self._sim)
        self._expert = ENV_POLICY_MAP[f"{self.task}-v3"]()
        self._place_camera()
        self._decisions = 0

    def _place_camera(self) -> None:
        """Move and zoom the camera, turn off what costs time in software rendering,
        create the renderer."""
        mujoco, model, data = self._mujoco, self._sim.model, self._sim.data
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        _decimate_meshes(model)
        right = data.cam(CAMERA_NAME).xmat.reshape(3, 3)[:, 0]
        model.cam(CAMERA_NAME).pos[:] = np.array(CAMERA_POSITION) - CAMERA_SIDEWAYS * right
        model.cam(CAMERA_NAME).fovy[:] = CAMERA_FOVY
        mujoco.mj_forward(model, data)
        # OSMesa trap: closing or collecting one renderer makes all others of the process return
        # garbage without a word. So a renderer is never closed: it lives in this list until its
        # process ends.
        side = SUPERSAMPLE * self.config.size
        self._renderer = mujoco.Renderer(model, side, side)
        _ALL_RENDERERS.append(self._renderer)
        camera = data.cam(CAMERA_NAME)
        self.camera = Camera(
            tuple(camera.xpos.tolist()), tuple(camera.xmat.tolist()), CAMERA_FOVY, self.config.size
        )

    def render(self) -> np.ndarray:
        """The current camera image, (H, W, 3) uint8, upright."""
        renderer, flags = self._renderer, self._mujoco.mjtRndFlag
        if renderer._gl_context:
            renderer._gl_context.make_current()
        renderer.update_scene(self._sim.data, CAMERA_NAME)
        renderer.scene.flags[flags.mjRND_SHADOW] = 0
        renderer.scene.flags[flags.mjRND_REFLECTION] = 0
        return _shrink(renderer.render()[::-1, ::-1])

    def _observe(self) -> dict[str, np.ndarray]:
        # The first four entries of Meta-World's observation: hand's position, gripper's opening.
        state = self._raw[:STATE_DIM].astype(np.float32)
        return {"image": self.render(), "state": state, "instruction": INSTRUCTIONS[self.task][0]}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start over at the start state that `seed` names, the same on every machine."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(SPLITS["rl"].start, SPLITS["rl"].stop))
        self._sim.seed(seed)
        self._sim.reset()
        # Meta-World's reset leaves the drawn scene where it was before: work it out anew, or the
        # first frame, at which every dream begins, shows another start.
        self._mujoco.mj_forward(self._sim.model, self._sim.data)
        self._sim._get_obs()  # an observation holds the one before it, too
        self._raw = self._sim._get_obs()
        self._decisions = 0
        self._success = False
        return self._observe(), {"success": False, "steps": 0}

    def _advance(self, action: np.ndarray) -> None:
        """One environment step (12.5 ms of simulated time times Meta-World's frame skip of 5)."""
        self._raw, _, _, _, info = self._sim.step(np.clip(action, -1.0, 1.0))
        self._success = bool(info["success"])

    def _play(self, next_action) -> tuple:
        """Play up to K steps with actions from `next_action(k)`, then look once."""
        steps = 0
        for k in range(self.config.chunk):
            self._advance(next_action(k))
            steps += 1
            if self.stop_on_success and self._success:
                break
        self._decisions += 1
        terminated = self.stop_on_success and self._success
        truncated = not terminated and self._decisions >= self.config.horizon
        info = {"success": self._success, "steps": steps}
        return self._observe(), float(self._success), terminated, truncated, info

    def step(self, action: np.ndarray):
        """Play one chunk of K actions, (K, A) float32; values outside [-1, 1] are clipped."""
        action = np.asarray(action, np.float32)
        if action.shape != self.action_space.shape:
            raise ValueError(
                f"action chunk: got shape {action.shape}, expected {self.action_space.shape}"
            )
        return self._play(lambda k: action[k])

    def expert_step(self):
        """Let Meta-World's scripted expert play one chunk (it sees the true state at every step).

        Returns (chunk (K, A) float32 in [-1, 1] as executed, then the five values of `step`)."""
        chunk = np.zeros(self.action_space.shape, np.float32)

        def next_action(k: int) -> np.ndarray:
            chunk[k:] = np.clip(self._expert.get_action(self._raw), -1.0, 1.0)
            return chunk[k]

        outcome = self._play(next_action)
        return chunk, *outcome

    # -- a simulator can be put back to an earlier moment; a robot cannot.
    # Used by workers and branching rollouts.

    def snapshot(self) -> dict:
        """Everything that the next step depends on, as a plain picklable dict."""
        mujoco, sim = self._mujoco, self._sim
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(sim.model, spec))
        mujoco.mj_getState(sim.model, sim.data, physics, spec)
        plain = (np.ndarray, float, int, bool, str, type(None), tuple, np.generic)
        fields = {k: copy.deepcopy(v) for k, v in vars(sim).items() if isinstance(v, plain)}
        placed = {name: getattr(sim.model, name).copy() for name in _MOVED_AT_RESET}
        own = (self._raw.copy(), self._decisions, self._success)
        return {"physics": physics, "fields": fields, "placed": placed, "own": own}

    def restore(self, snapshot: dict) -> None:
        """Go back to a snapshot of the same task."""
        mujoco, sim = self._mujoco, self._sim
        for name, value in snapshot["placed"].items():
            getattr(sim.model, name)[:] = value
        mujoco.mj_setState(
            sim.model, sim.data, snapshot["physics"], mujoco.mjtState.mjSTATE_INTEGRATION
        )
        vars(sim).update(copy.deepcopy(snapshot["fields"]))
        mujoco.mj_forward(sim.model, sim.data)
        # mj_forward moved the warm start of the contact solver: set it again, so that a restored
        # environment continues bit by bit like the one that was never interrupted.
        mujoco.mj_setState(
            sim.model, sim.data, snapshot["physics"], mujoco.mjtState.mjSTATE_INTEGRATION
        )
        raw, self._decisions, self._success = snapshot["own"]
        self._raw = raw.copy()


_ALL_RENDERERS: list = []
_MOVED_AT_RESET = ("body_pos", "body_quat", "site_pos", "geom_pos", "geom_quat")


# ------------------------------------------------------------------------ many environments at once


@dataclass(frozen=True)
class Start:
    """Where an episode begins: a task and a start seed (see SPLITS)."""

    task: str
    seed: int


def _worker(pipe, config: EnvConfig) -> None:
    """A worker process: plays its slots one after the other, in lockstep with the other workers.

    It keeps one MuJoCo environment (and renderer) per task and swaps slots in and out with
    snapshots, so that 64 slots cost no more memory than one environment per task.
    """
    # Ctrl-C reaches every process of the terminal: the main one ends the workers by their pipes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = os.environ["LP_NUM_THREADS"] = "1"
    envs: dict[str, RealEnv] = {}
    task_of: dict[int, str] = {}
    resting: dict[int, dict] = {}  # slot -> snapshot, for slots that are swapped out
    loaded: dict[str, int] = {}  # task -> the slot that its environment holds now

    def bring_in(slot: int, task: str, restore: bool) -> RealEnv:
        if task not in envs:
            envs[task] = RealEnv(task, config)
        env, holder = envs[task], loaded.get(task)
        if holder != slot:
            if holder is not None:
                resting[holder] = env.snapshot()
            if restore:
                env.restore(resting.pop(slot))
            loaded[task] = slot
        return env

    def do(command: str, slot: int, argument):
        if command == "reset":
            start, stop_on_success = argument
            previous = task_of.get(slot)
            if previous is not None and loaded.get(previous) == slot:
                del loaded[previous]
            resting.pop(slot, None)
            task_of[slot] = start.task
            env = bring_in(slot, start.task, restore=False)
            env.stop_on_success = stop_on_success
            return env.reset(seed=start.seed)
        if command == "set":
            task, snapshot, stop_on_success = argument
            previous = task_of.get(slot)
            if previous is not None and loaded.get(previous) == slot:
                del loaded[previous]
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
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send(traceback.format_exc())


class VecRealEnv(gymnasium.vector.VectorEnv):
    """B real environments side by side, spread over worker processes;
    the same face as worldenv.WorldEnv.

    reset(options={"starts": [Start, ...], "stop_on_success": bool}) -> observations, infos
    step(actions (B, K, A) float32 in [-1, 1])
        -> observations, rewards, terminations, truncations, infos

    Observations: {"image": (B, H, W, 3) uint8, "state": (B, S) float32, "instruction": B strings};
    rewards (B,) float32; infos: "success" (B,) bool after the decision, "steps" (B,) environment
    steps taken. A slot that is done rests (its last observation is repeated, at no cost) until the
    next reset: autoreset is disabled.
    """

    def __init__(self, num_envs: int, config: EnvConfig | None = None, workers: int | None = None):
        choose_backend()  # here, so that every worker inherits MUJOCO_GL
        self.config = config or EnvConfig()
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spaces(self.config)
        self.observation_space = gymnasium.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
        self.real_steps = self.real_resets = self.real_frames = 0  # the ledger of real interaction
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(min(workers or own_cores(), num_envs)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, self.config), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _ask(self, jobs: list[tuple]) -> dict[int, object]:
        """Send (command, slot, argument) jobs to the workers that own the slots;
        return {slot: answer}."""
        answers: dict[int, object] = {}
        shares = [
            [job for job in jobs if job[1] % len(self._pipes) == w] for w in range(len(self._pipes))
        ]
        try:
            for pipe, share in zip(self._pipes, shares, strict=True):
                if share:
                    pipe.send(share)
            for pipe, share in zip(self._pipes, shares, strict=True):
                if share:
                    answer = pipe.recv()
                    if isinstance(answer, str):
                        raise RuntimeError(f"a worker of the real environment failed:\n{answer}")
                    answers.update(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(
                "a worker process of the real environment died (out of memory, or killed?); "
                "run the same command again to resume"
            ) from error
        return answers

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
        self._states = np.zeros((self.num_envs, STATE_DIM), np.float32)
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
        self.real_frames += 1

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
        terminations, truncations = np.zeros((2, self.num_envs), bool)
        steps = np.zeros(self.num_envs, np.int64)
        rewards = np.zeros(self.num_envs, np.float32)
        for slot, answer in answers.items():
            if len(answer) == 6:  # the expert's answer also tells what it did
                chunks[slot], *answer = answer
            observation, rewards[slot], terminations[slot], truncations[slot], info = answer
            self._remember(slot, observation)
            self._success[slot], steps[slot] = info["success"], info["steps"]
        self.done |= terminations | truncations
        self.real_steps += int(steps.sum())
        infos = {"success": self._success.copy(), "steps": steps}
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
