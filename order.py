"""The stages of a run by name: their order, their rounds, and which of them go side by side.

    demos - sft - explore -+- simulator --- reflector -+- calibrate - rl - evaluate
                           '- filtered_bc - dream_bc --'

The two branches need nothing of each other, but for dream BC, which waits for the simulator: two
processes can work at them, each on half of the cores (beside.py).
"""

from __future__ import annotations

import processes
from runs import RunConfig

STAGES = (
    "demos", "sft", "explore", "filtered_bc", "simulator", "reflector", "dream_bc", "calibrate",
    "rl", "evaluate",
)  # fmt: skip
ROUND = STAGES[2:-1]  # what `--rounds` repeats
IMITATION = ("sft", "filtered_bc", "dream_bc")  # policies on the way; the last is where LOOP begins
BESIDE = IMITATION[1:]  # what a second process does ...
MEANWHILE = ("simulator", "reflector")  # ... while the first one does these
PAYS = 1000  # steps of filtered BC: a second process takes ten seconds to start [measured here]


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The stages of a run, in order. RL in the real simulator (the baseline) needs no exploration,
    simulator or reflector; rounds from the second on repeat those of ROUND: explore_2, ..."""
    if config.rl_env == "real":
        return ("demos", "sft", "rl", "evaluate")
    more = [f"{name}_{number}" for number in range(2, config.rounds + 1) for name in ROUND]
    return (*STAGES[:-1], *more, STAGES[-1])


def round_of(name: str) -> tuple[str, int]:
    """ "explore_2" -> ("explore", 2); "explore" -> ("explore", 1)."""
    stage, _, number = name.rpartition("_")
    return (stage, int(number)) if number.isdigit() else (name, 1)


def named(stage: str, number: int) -> str:
    """("rl", 2) -> "rl_2"; ("rl", 1) -> "rl": what `round_of` takes apart."""
    return stage if number == 1 else f"{stage}_{number}"


def up_to(config: RunConfig, until: str | None) -> tuple[str, ...]:
    """The stages of a run up to `until` (None: all), in order."""
    names = stages_of(config)
    return names[: names.index(until) + 1] if until else names


def side_by_side(config: RunConfig, device: str = "cpu") -> bool:
    """Whether a second process pays: on a processor with two cores or more, for a policy that takes
    a while to imitate, and without pretrained models, of which memory would hold two copies. A run
    that a launcher has spread over processes uses all its cores already."""
    pretrained = [config.policy.pretrained.checkpoint, config.reflector.pretrained.checkpoint]
    pretrained += [name for name in vars(config.simulator.pretrained).values() if name]
    alone = processes.launched() == 1 and device == "cpu" and not any(pretrained)
    return alone and processes.own_cores() > 1 and config.filtered_bc.steps >= PAYS


def check_beside(wanted: bool | None) -> None:
    """ValueError where a second process is asked for in a run that several share already."""
    if wanted and processes.launched() > 1:
        raise ValueError(
            f"--beside: got it in a run of {processes.launched()} processes; expected one, which "
            "starts the second by itself; leave --beside or `accelerate launch` out"
        )


def as_they_end(config: RunConfig, beside: bool) -> list[str]:
    """The stages of a run in the order in which they are told of."""
    names = list(stages_of(config))
    if beside and config.rl_env == "dream":
        for number in range(1, config.rounds + 1):
            rest = names.index(named("calibrate", number))
            theirs = [named(stage, number) for stage in BESIDE]
            first = [name for name in names[:rest] if name not in theirs]
            names = first + theirs + names[rest:]
    return names


def wall_seconds(stages: dict[str, dict]) -> float:
    """How long stages took together: what passed beside others counts once."""
    return sum(stage["seconds"] - stage.get("beside_seconds", 0.0) for stage in stages.values())
