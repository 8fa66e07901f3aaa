"""Seconds that the costly work of the `cpu` preset takes, in one process or shared by several.

    OMP_NUM_THREADS=2 python tests/time_processes.py
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 tests/time_processes.py

prints steps of imitation, steps of the simulator, dreams, and real episodes, each timed after a
first round that is not (in it the workers of the real environment make their tasks). On a machine
that does other things too, alternate the two and compare them in pairs.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scripted import random_episode

import processes
from camera import Camera
from demos import Episode, play
from dreams import dream_along
from fit import fit
from policy import Policy, imitation_batches
from runs import preset
from simulator import Simulator, transition_batches
from tasks import Start, split_seeds
from vecenv import VecRealEnv
from worldenv import NoReflector, WorldEnv

REAL = 32  # real episodes of Meta-World, each to its horizon


def recorded(seed: int, length: int = 10) -> Episode:
    """One that never succeeds: imitation then takes all of its decisions."""
    return replace(random_episode(seed, length, 64), success=np.zeros(length + 1, np.uint8))


def timed(work) -> dict[str, float]:
    """Seconds of `work()` until all processes are through, after one round to warm up; and the
    processor's seconds, summed over processes, which other programs disturb less. (What the workers
    of the real environment take is in the first only.)"""
    for _ in range(2):
        processes.wait()
        started, used = time.time(), time.process_time()
        work()
        used = time.process_time() - used
        processes.wait()
    return {"wall": round(time.time() - started, 2), "cpu": round(processes.total(used), 2)}


if __name__ == "__main__":
    config = preset("cpu")
    processes.start("cpu", config.shared)
    episodes = [recorded(seed) for seed in range(16)]
    camera = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, 64)
    policy, simulator = Policy(config.policy), Simulator(config.simulator, camera)
    simulator.album.fill(episodes)
    simulator.kinematics.set_range(np.concatenate([e.state for e in episodes]))
    world = WorldEnv(simulator, NoReflector(), {}, 16 // processes.world(), config.env)
    real = VecRealEnv(REAL // processes.world(), config.env)
    starts = [Start("reach", seed) for seed in split_seeds("dev", REAL)]
    pictures, moves = replace(config.simulator_fit, steps=8), replace(config.sft, steps=20)
    seconds = {
        "sft": timed(lambda: fit(policy, imitation_batches(episodes, moves.batch, 0), moves)),
        "simulator": timed(
            lambda: fit(simulator, transition_batches(episodes, pictures.batch, 0), pictures)
        ),
        "dreams": timed(lambda: dream_along(world, episodes)),
        "real": timed(lambda: play(real, starts, policy.act, "evaluation", after_success=None)),
    }
    real.close()
    if processes.is_main():
        print(
            json.dumps({"world": processes.world(), "threads": torch.get_num_threads(), **seconds})
        )
    processes.leave(0)
