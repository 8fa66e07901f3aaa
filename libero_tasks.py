"""LIBERO's forty tasks as plain facts: names, instructions, suites, cameras, step limits.

Paper's section: "Evaluation". None of it needs the LIBERO package; `libero_env.py` plays them.

A task's name here is short (`libero-object-milk`); LIBERO's own is that of its files: the scene, if
the suite has several, and the instruction with underscores.
"""

from __future__ import annotations

_BOWL = "pick up the black bowl {} and place it on the plate"
_BASKET = "pick up the {} and place it in the basket"

# suite -> name -> (scene, instruction), in LIBERO's own order
_SPATIAL = {
    "libero-spatial-between": ("", _BOWL.format("between the plate and the ramekin")),
    "libero-spatial-ramekin": ("", _BOWL.format("next to the ramekin")),
    "libero-spatial-center": ("", _BOWL.format("from table center")),
    "libero-spatial-on-cookies": ("", _BOWL.format("on the cookie box")),
    "libero-spatial-drawer": ("", _BOWL.format("in the top drawer of the wooden cabinet")),
    "libero-spatial-on-ramekin": ("", _BOWL.format("on the ramekin")),
    "libero-spatial-cookies": ("", _BOWL.format("next to the cookie box")),
    "libero-spatial-stove": ("", _BOWL.format("on the stove")),
    "libero-spatial-plate": ("", _BOWL.format("next to the plate")),
    "libero-spatial-cabinet": ("", _BOWL.format("on the wooden cabinet")),
}
_OBJECT = {
    "libero-object-alphabet-soup": ("", _BASKET.format("alphabet soup")),
    "libero-object-cream-cheese": ("", _BASKET.format("cream cheese")),
    "libero-object-salad-dressing": ("", _BASKET.format("salad dressing")),
    "libero-object-bbq-sauce": ("", _BASKET.format("bbq sauce")),
    "libero-object-ketchup": ("", _BASKET.format("ketchup")),
    "libero-object-tomato-sauce": ("", _BASKET.format("tomato sauce")),
    "libero-object-butter": ("", _BASKET.format("butter")),
    "libero-object-milk": ("", _BASKET.format("milk")),
    "libero-object-chocolate-pudding": ("", _BASKET.format("chocolate pudding")),
    "libero-object-orange-juice": ("", _BASKET.format("orange juice")),
}
_GOAL = {
    "libero-goal-middle-drawer": ("", "open the middle drawer of the cabinet"),
    "libero-goal-bowl-stove": ("", "put the bowl on the stove"),
    "libero-goal-wine-cabinet": ("", "put the wine bottle on top of the cabinet"),
    "libero-goal-bowl-drawer": ("", "open the top drawer and put the bowl inside"),
    "libero-goal-bowl-cabinet": ("", "put the bowl on top of the cabinet"),
    "libero-goal-push-plate": ("", "push the plate to the front of the stove"),
    "libero-goal-cheese-bowl": ("", "put the cream cheese in the bowl"),
    "libero-goal-turn-on-stove": ("", "turn on the stove"),
    "libero-goal-bowl-plate": ("", "put the bowl on the plate"),
    "libero-goal-wine-rack": ("", "put the wine bottle on the rack"),
}
_TEN = {
    "libero-10-soup-sauce": (
        "LIVING_ROOM_SCENE2",
        "put both the alphabet soup and the tomato sauce in the basket",
    ),
    "libero-10-cheese-butter": (
        "LIVING_ROOM_SCENE2",
        "put both the cream cheese box and the butter in the basket",
    ),
    "libero-10-stove-moka": ("KITCHEN_SCENE3", "turn on the stove and put the moka pot on it"),
    "libero-10-bowl-drawer": (
        "KITCHEN_SCENE4",
        "put the black bowl in the bottom drawer of the cabinet and close it",
    ),
    "libero-10-mugs-plates": (
        "LIVING_ROOM_SCENE5",
        "put the white mug on the left plate and put the yellow and white mug on the right plate",
    ),
    "libero-10-book-caddy": (
        "STUDY_SCENE1",
        "pick up the book and place it in the back compartment of the caddy",
    ),
    "libero-10-mug-pudding": (
        "LIVING_ROOM_SCENE6",
        "put the white mug on the plate and put the chocolate pudding to the right of the plate",
    ),
    "libero-10-soup-cheese": (
        "LIVING_ROOM_SCENE1",
        "put both the alphabet soup and the cream cheese box in the basket",
    ),
    "libero-10-moka-pots": ("KITCHEN_SCENE8", "put both moka pots on the stove"),
    "libero-10-mug-microwave": (
        "KITCHEN_SCENE6",
        "put the yellow and white mug in the microwave and close it",
    ),
}
LIBERO_SUITES = {
    "libero_spatial": _SPATIAL,
    "libero_object": _OBJECT,
    "libero_goal": _GOAL,
    "libero_10": _TEN,
}
LIBERO_INSTRUCTIONS = {
    name: (instruction,)
    for tasks in LIBERO_SUITES.values()
    for name, (_, instruction) in tasks.items()
}

# Environment steps until an episode is given up [as OpenVLA-OFT].
STEP_LIMIT = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
CHUNK = 8  # environment steps per decision [as OpenVLA-OFT]
FIXED_STARTS = 50  # evaluation starts that the benchmark fixes for each task


def suite_of(task: str) -> str:
    """The suite of a LIBERO task."""
    return next(suite for suite, tasks in LIBERO_SUITES.items() if task in tasks)


def own_name(task: str) -> str:
    """LIBERO's own name of a task: that of its files."""
    scene, instruction = LIBERO_SUITES[suite_of(task)][task]
    return "_".join([scene, *instruction.split()] if scene else instruction.split())


def view_of(task: str) -> str:
    """From where a LIBERO task is seen: "floor", "table" (kitchens too), "living room", "study"."""
    scene, _ = LIBERO_SUITES[suite_of(task)][task]
    if suite_of(task) == "libero_object":
        return "floor"
    if scene.startswith("LIVING_ROOM"):
        return "living room"
    return "study" if scene.startswith("STUDY") else "table"
