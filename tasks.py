"""The real environment: tasks in MuJoCo, seen through one camera, played in chunks.

Meta-World's tasks are here, and what every source of tasks shares: names, start seeds, settings,
the face of an environment. LIBERO's tasks are played by `libero_env.py` behind the same face.

Paper's section: "Evaluation" (the real environment) and the source of every real frame in the
project. This is the bottom of the project: it imports no torch, so that worker processes stay
small.

    start seed --reset--> image, state, instruction
               --step(chunk of K actions)--> image, state, success

Axis legend used in every file of the project:
    B  environments played side by side     H, W  image height, width in pixels
    K  environment steps in one action chunk (one *decision*)
    A  action dimensions (4 or 7)           S  state dimensions (4 or 7)

# DEVIATION: the paper evaluates on LIBERO with a 7-D end-effector action; here the reported runs
#   have Meta-World's 4-D action (dx, dy, dz, gripper; the hand's orientation is fixed) and state
#   (x, y, z, gripper opening), and LIBERO is an option (`--suite`); because a processor plays
#   Meta-World several times faster, and it brings a scripted expert for each task.
"""

from __future__ import annotations

import atexit
import copy
import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from camera import Camera, are_numbers, check_values
from instructions import INSTRUCTION_CHARACTERS, INSTRUCTIONS, TASKS
from libero_tasks import FIXED_STARTS, LIBERO_INSTRUCTIONS, LIBERO_SUITES, view_of
from render import choose_backend

# Meta-World's dx, dy, dz in [-1, 1] (1.0 moves the hand's target by 1 cm), gripper in [-1, 1]
# (+1 closes)
ACTION_DIM = 4
STATE_DIM = 4  # hand x, y, z in metres (world frame), gripper opening in [0, 1]


def is_text(value) -> bool:
    """Whether this is text that can be written and printed. Half a surrogate pair cannot, and both
    JSON and the names of files may bring one."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


@dataclass(frozen=True)
class Robot:
    """What policy, simulator and reflector have to know of a robot; by default Meta-World's.

    Whatever the robot, the state begins with the hand's x, y, z in metres and the gripper's opening
    in [0, 1]; the action begins with dx, dy, dz and ends with the gripper (+1 closes).
    """

    name: str = "metaworld"
    state_dim: int = STATE_DIM  # S
    action_dim: int = ACTION_DIM  # A
    metres: float = 0.01  # how far one step of an action of 1 moves the hand's target [Meta-World]
    # Where that target starts in each decision: where it was (False), or the hand's place (True).
    from_hand: bool = False
    # In which frame positions, turns and moves are told: the world's (""), or the one in which that
    # view's camera would see what the task's own camera sees (libero_env.py).
    frame: str = ""
    # The box that holds the target, metres [Meta-World; two of fifty tasks let it 20 cm lower].
    low: tuple[float, ...] = (-0.5, 0.4, 0.05)
    high: tuple[float, ...] = (0.5, 1.0, 0.5)
    # About where hands are and how far they move [Meta-World], so that a network's inputs are near
    # 1; one number for each entry of the state.
    middle: tuple[float, ...] = (0.0, 0.7, 0.2, 0.5)
    spread: tuple[float, ...] = (0.1, 0.1, 0.1, 0.5)

    def __post_init__(self) -> None:
        dims = (self.state_dim, self.action_dim)
        if not all(type(dim) is int and 4 <= dim <= 1000 for dim in dims):
            raise ValueError(
                f"Robot: got state {self.state_dim!r:.40}, action {self.action_dim!r:.40}; "
                "expected 4 or more of both, at most 1000: x, y, z and gripper"
            )
        for name in ("middle", "spread"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and len(numbers) != self.state_dim:
                raise ValueError(
                    f"Robot.{name}: got {len(numbers)} numbers, expected "
                    f"{self.state_dim}, one for each entry of the state"
                )
        self._check_values()

    def _check_values(self) -> None:
        """ValueError for what no robot has; a folder of others may name anything."""
        size, box = self.state_dim, are_numbers(self.low, 3) and are_numbers(self.high, 3)
        check_values(
            self,
            ("name", is_text(self.name), "text"),
            ("metres", are_numbers((self.metres,), 1) and self.metres > 0, "a number above 0"),
            ("from_hand", type(self.from_hand) is bool, "true or false"),
            ("frame", is_text(self.frame), "text"),
            (
                "low",
                box and all(a < b for a, b in zip(self.low, self.high)),
                "3 numbers below high",
            ),
            ("middle", are_numbers(self.middle, size), f"{size} numbers"),
            ("spread", are_numbers(self.spread, size) and min(self.spread) > 0, "numbers above 0"),
        )


METAWORLD = Robot()
# LIBERO's Panda: the state goes on with the hand's orientation (3), the action is dx, dy, dz,
# rotation (3), gripper; see libero_env.py. An action of 1 asks for 5 cm from where the hand is
# *now* and gets a part of it before the next one comes: `metres`, once it moves [measured here].
LIBERO = Robot(
    name="libero",
    state_dim=7,
    action_dim=7,
    metres=0.013,
    from_hand=True,
    low=(-2.0, -2.0, 0.0),
    high=(2.0, 2.0, 2.0),
    middle=(0.0, 0.0, 0.2, 0.5, 0.0, 0.0, 0.0),
    spread=(0.1, 0.1, 0.1, 0.5, 0.2, 0.2, 0.2),
)
# How high the hand is at work, metres: LIBERO's tables differ.
WORKING_HEIGHT = {"floor": 0.2, "table": 1.1, "living room": 0.6, "study": 1.1}

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
    "test": range(9_100_000, 9_200_000),  # reported figures, and whole recipes: docs/protocol.md
}

# What --suite may name, and its tasks.
SUITES = {"metaworld": DEFAULT_SUITE} | {suite: tuple(t) for suite, t in LIBERO_SUITES.items()}


def check_tasks(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Return the task names without Meta-World's version suffix;
    raise ValueError for an unknown or repeated one, and for tasks that cannot share a run."""
    short = tuple(name.removesuffix("-v3") for name in names)
    for name in short:
        if name not in INSTRUCTIONS:
            near = [task for task in TASKS if name.split("-")[0] in task]
            near = near or get_close_matches(name, LIBERO_INSTRUCTIONS, 5)
            hint = f"near it: {', '.join(near)}" if near else f"one of: {', '.join(TASKS)}"
            raise ValueError(f"unknown task {name!r}; expected {hint}")
    if not short or len(set(short)) != len(short):
        raise ValueError(f"expected one or more different tasks, got {', '.join(short) or 'none'}")
    libero = [name for name in short if name in LIBERO_INSTRUCTIONS]
    if libero and len(libero) < len(short):
        others = [name for name in short if name not in libero]
        raise ValueError(
            f"tasks that one robot cannot play (Meta-World: {', '.join(others)}; "
            f"LIBERO: {', '.join(libero)}); expected tasks of one of them; choose them with --tasks"
        )
    return short


STEPS_PER_SECOND = {METAWORLD.name: 80, LIBERO.name: 20}  # of simulated time


def robot_of(tasks: tuple[str, ...] | list[str]) -> Robot:
    """The robot that plays these tasks of one run; where LIBERO's rooms are mixed, in the frame of
    the tables' view."""
    if tasks[0] not in LIBERO_INSTRUCTIONS:
        return METAWORLD
    views = {view_of(task) for task in tasks}
    mixed = len(views) > 1
    view = "table" if mixed else views.pop()
    x, y, _, *rest = LIBERO.middle
    middle = (x, y, WORKING_HEIGHT[view], *rest)
    return replace(LIBERO, middle=middle, frame=view if mixed else "")


def split_seeds(split: str, count: int, offset: int = 0) -> list[int]:
    """The `count` start seeds of a split from `offset` on;
    raises ValueError where they would leave its range."""
    seeds = SPLITS[split][max(offset, 0) : max(offset, 0) + count]
    if offset < 0 or len(seeds) != count:
        raise ValueError(
            f"the {split} split holds {len(SPLITS[split])} starts, asked for {offset}+{count}"
        )
    return list(seeds)


def check_fixed_starts(tasks: tuple[str, ...], split: str, count: int, skipped: int = 0) -> None:
    """Raise ValueError for more test starts than LIBERO has, `count` after the first `skipped`;
    its other starts are as many as there are seeds."""
    fixed = split == "test" and any(task in LIBERO_INSTRUCTIONS for task in tasks)
    if fixed and skipped + count > FIXED_STARTS:
        after = f" after the first {skipped}" if skipped else ""
        raise ValueError(
            f"test starts per task: got {count}{after}, expected 1 to {FIXED_STARTS} in all, those "
            f"that LIBERO fixes; use fewer --starts{' or a smaller --skip' if skipped else ''}"
        )


def split_of(seed: int) -> str:
    """The name of the split that owns a start seed, "none" for a seed of no split."""
    return next((name for name, seeds in SPLITS.items() if seed in seeds), "none")


@dataclass(frozen=True)
class Start:
    """Where an episode begins: a task and a start seed (see SPLITS)."""

    task: str
    seed: int


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


def decimate_meshes(model, cell: float = 0.05, min_faces: int = 1000) -> None:
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


_ALL_RENDERERS: list = []


def keep_renderer(renderer) -> None:
    """Never let a renderer be closed or collected before its process ends: under OSMesa all others
    of the process would return garbage, without a word."""
    if not _ALL_RENDERERS:  # only now, since what is registered last comes first
        atexit.register(_close_renderers)
    _ALL_RENDERERS.append(renderer)


def _close_renderers() -> None:
    """While MuJoCo and EGL are still whole: a renderer that is collected later complains."""
    while _ALL_RENDERERS:
        _ALL_RENDERERS.pop().close()


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


def new_renderer(model, side: int):
    """A renderer of side x side pixels, never closed before its process ends. MuJoCo draws into a
    buffer of 640 x 480 unless the model asks for another."""
    import mujoco

    buffer = model.vis.global_
    buffer.offwidth, buffer.offheight = max(side, buffer.offwidth), max(side, buffer.offheight)
    renderer = mujoco.Renderer(model, side, side)
    keep_renderer(renderer)
    return renderer


# ---------------------------------------------------------------------------------- one environment

# Beyond what anyone plays. What is larger is a slip, and would run, or fill the memory, without
# end: a frame of 1024 is drawn in 2048 x 2048 pixels.
LARGEST = {"size": 1024, "chunk": 1000, "horizon": 100_000}


@dataclass(frozen=True)
class EnvConfig:
    """How the real environment is seen and played; the imagined one copies these."""

    size: int = 64  # image height and width in pixels
    chunk: int = 4  # K, environment steps per decision [measured here: episodes of 8-25 decisions]
    horizon: int = 30  # decisions until truncation; the expert needs 22 for the longest task
    robot: Robot = field(default_factory=Robot)

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(
                    f"EnvConfig.{name}: got {value!r:.80}, expected a whole number, 1 or more and "
                    f"at most {most}; choose another"
                )
        if self.size % 16:
            raise ValueError(f"EnvConfig.size: got {self.size}, expected a multiple of 16 pixels")


def spaces(config: EnvConfig) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.Box]:
    """One environment's observation and action space, the same in reality and in the dream."""
    size = (config.size, config.size, 3)
    observation = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, size, np.uint8),
        state=gymnasium.spaces.Box(-4.0, 4.0, (config.robot.state_dim,), np.float32),
        instruction=gymnasium.spaces.Text(100, min_length=0, charset=INSTRUCTION_CHARACTERS),
    )
    shape = (config.chunk, config.robot.action_dim)
    return observation, gymnasium.spaces.Box(-1.0, 1.0, shape, np.float32)


def shrink(image: np.ndarray) -> np.ndarray:
    """Mean of every SUPERSAMPLE x SUPERSAMPLE pixels: (nH, nW, 3) uint8 -> (H, W, 3) uint8."""
    n = SUPERSAMPLE
    # A sum of n^2 small pictures: numpy's mean over two axes takes a tenth of a whole decision
    # [measured here].
    parts = [image[i::n, j::n] for i in range(n) for j in range(n)]
    return (np.stack(parts).sum(axis=0, dtype=np.uint16) / n**2).round().astype(np.uint8)


class ChunkedEnv(gymnasium.Env):
    """A task as a Gymnasium environment that is stepped in action chunks: the face that every
    source of tasks has. A source adds `reset`, `render`, `camera` and the five methods
    below that raise NotImplementedError.

    Observation: {"image": (H, W, 3) uint8, "state": (S,) float32, "instruction": str}.
    Action: (K, A) float32 in [-1, 1].
    Reward: 1.0 when the decision ends in success, else 0.0.
    `info["success"]` is the success after the decision, `info["passed"]` success after any of its
    steps: what the oracle would have stopped at.
    With `stop_on_success` (the oracle's termination) the environment ends at the very step that
    succeeds. `info["steps"]` counts the environment steps really taken.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    action_space: gymnasium.spaces.Box
    camera: Camera

    def __init__(self, task: str, config: EnvConfig, stop_on_success: bool):
        choose_backend()
        (self.task,) = check_tasks([task])
        if config.robot.name != robot_of([self.task]).name:
            raise ValueError(
                f"EnvConfig.robot: got {config.robot.name} (state {config.robot.state_dim}, action "
                f"{config.robot.action_dim}), expected that of {self.task}: tasks.robot_of"
            )
        self.config = config
        self.stop_on_success = stop_on_success
        self.render_mode = "rgb_array"
        rate = STEPS_PER_SECOND[config.robot.name] / config.chunk  # a picture a decision
        self.metadata = {**self.metadata, "render_fps": rate}
        self.observation_space, self.action_space = spaces(config)
        self._decisions = 0
        self._success = False

    def snapshot(self) -> dict:
        """Everything that the next step depends on, as a plain picklable dict."""
        raise NotImplementedError

    def restore(self, snapshot: dict) -> None:
        """Go back to a snapshot of the same task."""
        raise NotImplementedError

    def _state(self) -> np.ndarray:
        """The state now, (S,) float32."""
        raise NotImplementedError

    def _advance(self, action: np.ndarray) -> None:
        """Play one environment step, (A,) in [-1, 1], and set `_success`."""
        raise NotImplementedError

    def _expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, (A,)."""
        raise NotImplementedError

    def _observe(self) -> dict:
        instruction = INSTRUCTIONS[self.task][0]
        return {"image": self.render(), "state": self._state(), "instruction": instruction}

    def _play(self, next_action) -> tuple:
        """Play up to K steps with actions from `next_action(k)`, then look once."""
        steps, passed = 0, False
        for k in range(self.config.chunk):
            self._advance(next_action(k))
            steps += 1
            passed |= self._success
            if self.stop_on_success and self._success:
                break
        self._decisions += 1
        terminated = self.stop_on_success and self._success
        truncated = not terminated and self._decisions >= self.config.horizon
        info = {"success": self._success, "passed": passed, "steps": steps}
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
        """Let the scripted expert play one chunk (it sees the true state at every step).

        Returns (chunk (K, A) float32 in [-1, 1] as executed, then the five values of `step`)."""
        chunk = np.zeros(self.action_space.shape, np.float32)

        def next_action(k: int) -> np.ndarray:
            chunk[k:] = np.clip(self._expert_action(), -1.0, 1.0)
            return chunk[k]

        outcome = self._play(next_action)
        return chunk, *outcome


# What Meta-World's reset moves in the model itself, beside the physical state.
_MOVED_AT_RESET = ("body_pos", "body_quat", "site_pos", "geom_pos", "geom_quat")


class RealEnv(ChunkedEnv):
    """One Meta-World task."""

    def __init__(self, task: str, config: EnvConfig | None = None, stop_on_success: bool = True):
        super().__init__(task, config or EnvConfig(), stop_on_success)
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

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
        touching = partial(_touching_object, self._sim)
        self._sim.touching_object = touching  # type: ignore[method-assign]  # a faster one
        policy: Any = ENV_POLICY_MAP[f"{self.task}-v3"]  # typed there as the abstract base class
        self._expert = policy()
        self._place_camera()

    def _place_camera(self) -> None:
        """Move and zoom the camera, turn off what costs time in software rendering,
        create the renderer."""
        mujoco, model, data = self._mujoco, self._sim.model, self._sim.data
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        decimate_meshes(model)
        right = data.cam(CAMERA_NAME).xmat.reshape(3, 3)[:, 0]
        model.cam(CAMERA_NAME).pos[:] = np.array(CAMERA_POSITION) - CAMERA_SIDEWAYS * right
        model.cam(CAMERA_NAME).fovy[:] = CAMERA_FOVY
        mujoco.mj_forward(model, data)
        side = SUPERSAMPLE * self.config.size
        self._renderer = new_renderer(model, side)
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
        return shrink(renderer.render()[::-1, ::-1])

    def _state(self) -> np.ndarray:
        # The first four entries of Meta-World's observation: hand's position, gripper's opening.
        return self._raw[:STATE_DIM].astype(np.float32)

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
        return self._observe(), {"success": False, "passed": False, "steps": 0}

    def _advance(self, action: np.ndarray) -> None:
        """One environment step (12.5 ms of simulated time: 5 steps of 2.5 ms)."""
        self._raw, _, _, _, info = self._sim.step(np.clip(action, -1.0, 1.0))
        self._success = bool(info["success"])

    def _expert_action(self) -> np.ndarray:
        return self._expert.get_action(self._raw)

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
