"""`python tests/faulty.py FAULT ARGUMENT...`: the command line, `python cli.py ARGUMENT...`, with a
fault that is really there. For test_faults.py.

    pause      says READY and waits for a line on stdin before the third step of real environments:
               time for a test to kill a worker, fill the disk, take the folder away
    renderer   workers lose their renderer at their twentieth picture
    nan        the policy's loss is NaN from its fifth step on (the explorer has made two of them)
    memory     filtered BC gets no more memory than it has when it begins, and 8 MiB (nothing is
               imitated before, which would leave memory to it)
    greedy     the same, and a stage asks numpy for a terabyte
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAULT = os.environ.setdefault("FAULT", sys.argv[1] if len(sys.argv) > 1 else "")

if FAULT == "renderer":  # here, because every worker imports this file again
    import tasks

    drawn = [0]
    draw = tasks.RealEnv.render

    def lose_renderer(self):
        drawn[0] += 1
        if drawn[0] > 20:
            raise RuntimeError("OpenGL context lost")
        return draw(self)

    tasks.RealEnv.render = lose_renderer


def pause() -> None:
    from vecenv import VecRealEnv

    step, taken = VecRealEnv.step, [0]

    def wait_first(self, actions):
        taken[0] += 1
        if taken[0] == 3:
            print("READY", flush=True)
            sys.stdin.readline()
        return step(self, actions)

    VecRealEnv.step = wait_first


def not_a_number() -> None:
    from policy import Policy

    forward, steps = Policy.forward, [0]

    def spoiled(self, batch):
        loss, metrics = forward(self, batch)
        steps[0] += 1
        return (loss * float("nan") if steps[0] >= 5 else loss), metrics

    Policy.forward = spoiled


def no_memory(greedy: bool) -> None:
    import resource

    import numpy as np
    import torch._dynamo  # noqa: F401  # the first optimizer does: an import is not to be cut short

    import train

    stage = train.stage_filtered_bc
    train._explorer = lambda run, policy, episodes, progress: policy

    def limited(*arguments):
        lines = Path("/proc/self/status").read_text().splitlines()
        size = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**23, resource.RLIM_INFINITY))
        if greedy:
            np.zeros(2**40, np.uint8)
        return stage(*arguments)

    train.stage_filtered_bc = limited


if __name__ == "__main__":
    if FAULT == "pause":
        pause()
    if FAULT == "nan":
        not_a_number()
    if FAULT in ("memory", "greedy"):
        no_memory(FAULT == "greedy")
    import cli

    cli.app(sys.argv[2:])
