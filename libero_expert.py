"""A scripted expert for LIBERO: one routine, pick and place, for every task that is no more.

Paper's section: "Evaluation" (demonstrations). It reads the goal from the task's file ("(On bowl
plate)", "(In soup basket)") and where things are from the simulator:

    above the thing --> down --> close --> lift --> above the goal --> down --> open --> up

and begins again where that was not enough. A bowl or a mug is taken by its rim, anything else
across its least width. Drawers, doors and knobs it cannot do: tasks that ask for them it fails.

# DEVIATION: the paper imitates LIBERO's demonstrations, which people gave; here a routine's;
#   because theirs have to be downloaded, and this needs nothing but the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BY_THE_RIM = ("bowl", "mug", "ramekin")  # words in the names of things that are hollow
GAIN, TURN_GAIN = 15.0, 2.0  # action per metre and per radian that is left to go
REACH = 0.75  # metres from its base to which the arm, pointing down, reaches with ease
CLOSING, OPENING = 10, 8  # steps that the fingers take
CLEARANCE = 0.1  # metres above a thing from which the hand comes down
FINGER = 0.04  # metres: so deep a thing fits between the fingers
WIDEST = 0.072  # metres: what fits between them, with some room
OPEN, CLOSED = -1.0, 1.0


@dataclass
class Waypoint:
    """Go to `position` (3,) metres, the gripper set to `gripper`, until nearer than `tolerance`
    metres or for `patience` steps."""

    position: np.ndarray
    gripper: float
    tolerance: float
    patience: int


@dataclass
class Plan:
    """What the expert remembers between steps; a snapshot of the environment holds a copy."""

    waypoints: list[Waypoint] = field(default_factory=list)
    across: np.ndarray = field(default_factory=lambda: np.array([1.0, 0.0, 0.0]))
    waited: int = 0
    tries: int = 0
    holding: bool = False


class PickAndPlace:
    """The expert of one task. `domain` is LIBERO's environment; all else is in `plan`."""

    def __init__(self, domain):
        self.domain = domain
        self.plan = Plan()
        robot = domain.robots[0]
        self.site = robot.eef_site_id

    def action(self) -> np.ndarray:
        """The next action (7,), by the true state; values may lie outside [-1, 1]."""
        hand, rotation = self.hand()
        plan = self.plan
        if not plan.waypoints:
            self._go_on(hand, rotation)
        waypoint = plan.waypoints[0]
        error = waypoint.position - hand
        turn = rotation_vector(pointing_down(plan.across) @ rotation.T)
        plan.waited += 1
        near = np.linalg.norm(error) < waypoint.tolerance and np.linalg.norm(turn) < 0.06
        if near or plan.waited >= waypoint.patience:
            plan.waypoints.pop(0)
            plan.waited = 0
        return np.concatenate([GAIN * error, TURN_GAIN * turn, [waypoint.gripper]])

    def hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the fingers meet, (3,) metres, and how they are turned, (3, 3)."""
        data = self.domain.sim.data
        return data.site_xpos[self.site].copy(), data.site_xmat[self.site].reshape(3, 3).copy()

    # -- plans

    def _go_on(self, hand: np.ndarray, rotation: np.ndarray) -> None:
        """Plan what comes next: to take the first thing that is not where it should be, or, having
        taken it, to bring it there."""
        goal = next((g for g in self.goals() if not self.domain._eval_predicate(g)), None)
        if goal is None:
            self.plan.waypoints = [Waypoint(hand, OPEN, 0.0, 1)]
        elif self.plan.holding and self._something_held():
            self._plan_to_place(hand, goal)
        else:
            self._plan_to_take(hand, rotation, goal[1])
            self.plan.holding = True
            return
        self.plan.holding = False

    def _something_held(self) -> bool:
        """Are the closed fingers apart?"""
        fingers = self.domain.robots[0]._ref_gripper_joint_pos_indexes
        return np.ptp(self.domain.sim.data.qpos[fingers]) > 0.004

    def goals(self) -> list[list[str]]:
        """The parts of the goal that picking and placing can bring about."""
        return [g for g in self.domain.parsed_problem["goal_state"] if g[0] in ("on", "in")]

    def _plan_to_take(self, hand: np.ndarray, rotation: np.ndarray, thing: str) -> None:
        """Take the thing in the way that costs least; where that failed, in the next best."""
        points, others = self.points(thing), self._others(thing)
        ways = rims(points) if any(word in thing for word in BY_THE_RIM) else pinches(points)
        base = self.domain.robots[0].base_pos[:2]
        costs = [
            cost
            - room(place, across, others)
            - 0.003 * abs(across @ rotation[:, 0])
            + 0.3 * max(0.0, float(np.linalg.norm(place[:2] - base)) - REACH)
            for place, across, cost in ways
        ]
        place, across, _ = ways[np.argsort(costs, kind="stable")[self.plan.tries % len(ways)]]
        if across @ rotation[:, 0] < 0:  # the two fingers are alike: turn the shorter way
            across = -across
        above = np.array([*place[:2], points[:, 2].max() + CLEARANCE])
        # Past something tall, a cabinet, the hand goes level first.
        tall = others[:, 2].max(initial=0.0) > above[2] - 0.05
        level = np.array([*place[:2], max(hand[2], above[2])])
        self.plan.tries += 1
        self.plan.across = across
        self.plan.waypoints = [Waypoint(level, OPEN, 0.05, 60)] if tall else []
        self.plan.waypoints += [
            Waypoint(above, OPEN, 0.005, 90),
            Waypoint(place, OPEN, 0.008, 40),
            Waypoint(place, CLOSED, 0.0, CLOSING),
        ]

    def _others(self, thing: str) -> np.ndarray:
        """Points of all other things, (N, 3)."""
        names = [name for name in self.domain.obj_body_id if name != thing]
        return np.concatenate(
            [self.points(name, solid=True) for name in names] or [np.zeros((0, 3))]
        )

    def _plan_to_place(self, hand: np.ndarray, goal: list[str]) -> None:
        """Bring what is held above the goal, let it down and go."""
        thing, where = goal[1:]
        points = self.points(thing)
        body = self.domain.sim.data.body_xpos[self.domain.obj_body_id[thing]]
        hangs = hand[2] - points[:, 2].min()  # how far the thing reaches below the hand
        target, floor, rim = self._target(where)
        over = np.array([*(target[:2] + hand[:2] - body[:2]), 0.0])
        height = max(rim + 0.06, points[:, 2].min() + 0.1) + hangs
        low = floor + hangs + 0.01
        if "contain" in where:  # a basket: the palm stays above its rim
            low = max(low, rim - 0.03)
        self.plan.waypoints = [
            Waypoint(np.array([*hand[:2], height]), CLOSED, 0.02, 60),
            Waypoint(np.array([*over[:2], height]), CLOSED, 0.01, 120),
            Waypoint(np.array([*over[:2], low]), CLOSED, 0.01, 50),
            Waypoint(np.array([*over[:2], low]), OPEN, 0.0, OPENING),
            Waypoint(np.array([*over[:2], height]), OPEN, 0.03, 30),
        ]

    def _target(self, where: str) -> tuple[np.ndarray, float, float]:
        """Where a goal is: its middle (3,), the heights of its floor and of its highest point."""
        domain = self.domain
        if where in domain.obj_body_id:  # on another thing: its middle, as LIBERO looks at it
            points = self.points(where)
            middle = domain.sim.data.body_xpos[domain.obj_body_id[where]].copy()
            inner = np.linalg.norm(points[:, :2] - middle[:2], axis=1) < 0.03
            floor = points[inner, 2].max() if inner.any() else middle[2]
            return middle, floor, points[:, 2].max()
        site = domain.object_sites_dict[where]
        middle = domain.sim.data.get_site_xpos(where).copy()
        half = np.abs(domain.sim.data.get_site_xmat(where) @ np.asarray(site.size))[2]
        parent = getattr(site, "parent_name", "")
        rim = self.points(parent)[:, 2].max() if parent in domain.obj_body_id else middle[2]
        return middle, middle[2] - half, max(rim, middle[2] + half)

    def points(self, thing: str, solid: bool = False) -> np.ndarray:
        """Points of the drawn surface of a thing, (N, 3) metres in the world; solid: those of the
        shapes that collide as well (a cabinet's mesh has vertices at its corners only)."""
        model, data = self.domain.sim.model._model, self.domain.sim.data._data
        body = self.domain.obj_body_id[thing]
        geoms = np.flatnonzero(model.body_rootid[model.geom_bodyid] == model.body_rootid[body])
        drawn = list(geoms) if solid else [g for g in geoms if model.geom_group[g] == 1]
        return np.concatenate([geom_points(model, data, int(g)) for g in drawn])


def geom_points(model, data, geom: int) -> np.ndarray:
    """Some vertices of a mesh, or a grid of 2 cm in the box around any other shape, (N, 3) in the
    world."""
    mesh = model.geom_dataid[geom]
    if mesh >= 0:
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        local = model.mesh_vert[first : first + count : max(1, count // 500)]
    else:
        radius, *rest = model.geom_size[geom]
        half = np.array([radius, *np.where(np.array(rest) > 0, rest, radius)])
        lines = [np.linspace(-h, h, 2 + int(h / 0.01)) for h in half]
        local = np.array(np.meshgrid(*lines)).reshape(3, -1).T
    return data.geom_xpos[geom] + local @ data.geom_xmat[geom].reshape(3, 3).T


def rims(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Ways to take a hollow thing by its rim: (where (3,), across which horizontal direction (3,),
    what it costs besides)."""
    top = points[:, 2].max()
    rim = points[points[:, 2] > top - 0.015][:, :2]
    middle = (rim.max(0) + rim.min(0)) / 2
    radius = np.linalg.norm(rim - middle, axis=1).max() - 0.005
    ways = []
    for angle in np.arange(16) * np.pi / 8:
        out = np.array([np.cos(angle), np.sin(angle), 0.0])
        ways.append((np.array([*(middle + radius * out[:2]), top - 0.02]), out, 0.0))
    return ways


def pinches(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Ways to take a thing across its width, as `rims`; each centimetre above the least width that
    fits, and each that it is taken higher than at its middle, costs 2 mm of room."""
    low, high = points[:, 2].min(), points[:, 2].max()
    deep = max((low + high) / 2, high - FINGER)
    ways, widths = [], []
    for height in (deep, max(deep, high - FINGER / 2)):
        level = points[np.abs(points[:, 2] - height) < 0.02]
        level = (level if len(level) > 8 else points)[:, :2]
        for angle in np.arange(18) * np.pi / 18:
            across = np.array([np.cos(angle), np.sin(angle)])
            along = np.array([-across[1], across[0]])
            here, there = level @ across, level @ along
            middle = (here.max() + here.min()) * across + (there.max() + there.min()) * along
            widths.append(np.ptp(here))
            cost = 0.2 * (widths[-1] + height - deep)
            ways.append((np.array([*middle / 2, height]), np.array([*across, 0.0]), cost))
    fits = max(WIDEST, min(widths))
    return [way for way, width in zip(ways, widths, strict=True) if width <= fits]


def room(place: np.ndarray, across: np.ndarray, others: np.ndarray) -> float:
    """How far other things, points (N, 3), are from an open hand at `place`; at most 2 cm.

    The palm is a rectangle 3.5 cm above where the fingers meet, the fingers a thinner one that
    reaches 2 cm below."""
    away = others - place
    here = np.abs(away @ across)
    there = np.abs(away @ np.array([-across[1], across[0], 0.0]))
    nearest = 0.02
    for bottom, half_here, half_there in ((0.035, 0.105, 0.035), (-0.02, 0.055, 0.012)):
        high = away[:, 2] > bottom
        gap = np.hypot(np.maximum(here - half_here, 0), np.maximum(there - half_there, 0))
        nearest = min(nearest, gap[high].min(initial=nearest))
    return nearest


def pointing_down(across: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) of a hand that points straight down, its fingers opening along `across`
    (3,), a horizontal unit vector: columns x (across), y, z (down)."""
    down = np.array([0.0, 0.0, -1.0])
    return np.column_stack([across, np.cross(down, across), down])


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """A rotation matrix (3, 3) -> axis times angle, (3,) radians, of length at most pi."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(rotation).as_rotvec()
