"""A whole run: its stages one after the other, or two branches of them side by side (order.py).

A finished stage is skipped. A killed one goes on from its last state (resume.py) if it fitted a
network or ran LOOP; episodes and dreams along them it plays again. The numbers stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import processes
from beside import Beside, SideRun, half_the_cores, tidy
from order import BESIDE, MEANWHILE, named, round_of, up_to
from runs import Run
from train import do_stage
from vecenv import RealWorkers


def train(
    run: Run,
    say: Callable[[str], None],
    progress: Callable[[str, int, int, dict], None],
    until: str | None = None,
    beside: bool = False,
):
    """Run every stage that is not finished, up to `until` (default: all); `say` gets one line per
    stage, `progress` (stage, step, steps, metrics). beside: a second process does filtered BC and
    dream BC while this one does simulator and reflector (beside.py)."""
    run.forget_unfinished()
    if processes.is_main():
        tidy(run, beside)
    processes.wait()
    if not processes.is_main():
        run.stages = Run(run.folder, run.config).stages  # as the main process has left them
    names = up_to(run.config, until)
    second: Beside | None = None
    with RealWorkers(run.config) as real:
        try:
            for name in names:
                stage, number = round_of(name)
                if second and stage not in BESIDE + MEANWHILE:
                    _join(second, say)
                    second = None
                if beside and stage == BESIDE[0]:
                    both = [named(one, number) for one in BESIDE]
                    theirs = [n for n in names if n in both and n not in run.stages]
                    if theirs:
                        real.rest()
                        second = Beside(run, theirs, side_stages, progress)
                if name in run.stages or second is None or stage in MEANWHILE:
                    with half_the_cores() if beside and stage in MEANWHILE else nullcontext():
                        _unless_done(run, real, name, say, _heard(progress, second))
            if second:
                _join(second, say)
                second = None
        finally:
            if second:
                second.close()


def side_stages(run: SideRun, names: list[str], say, progress) -> None:
    """What the second process does."""
    with RealWorkers(run.config) as real:  # which these stages do not start
        for name in names:
            stage, number = round_of(name)
            if stage == "dream_bc":
                run.wait_for(named("simulator", number))
            _unless_done(run, real, name, say, progress)


def _unless_done(run: Run, real: RealWorkers, name: str, say, progress) -> None:
    """A stage, or a line that says it is finished."""
    if name in run.stages:
        say(f"{name}: done already ({run.stages[name]['seconds']:.0f} s)")
    else:
        do_stage(run, real, name, say, progress)


def _heard(progress, second: Beside | None):
    """`progress`, and a look at the second process each time."""

    def heard(*content) -> None:
        progress(*content)
        if second:
            second.look()

    return heard


def _join(second: Beside, say) -> None:
    """Wait for the second process; its lines are told."""
    for line in second.join():
        say(f"{line}, beside")
    second.close()
