"""What `test_processes.py` lets one process and two do: `accelerate launch ... shared_work.py OUT`.

The same fits and passes of LOOP, tiny; every process writes what it ended with to OUT/RANK.pt. With
a second word, the folder of a checkpoint, the fit of a pretrained policy alone, and OUT/policy.
"""

import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scripted import random_episode
from test_ppo import SIZE as WALK_SIZE
from test_ppo import Walk

import processes
from camera import Camera
from checkpoints import save_part
from demos import Episode
from fit import FitConfig, fit
from kinematics import Kinematics, episode_batches
from policy import Policy, PolicyConfig, imitation_batches
from ppo import LoopConfig, loop
from pretrained import PretrainedConfig
from pushes import explored
from reflector import Reflector, ReflectorConfig, frame_batches
from simulator import Simulator, SimulatorConfig, transition_batches
from tasks import Start

SIZE = 32
CAMERA = Camera((0.0, 0.0, 1.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, SIZE)


def recorded(seed: int, length: int) -> Episode:
    return random_episode(seed, length, SIZE, ("reach", "push")[seed % 2])


EPISODES = [recorded(seed, 3 + seed) for seed in range(4)]
FIT = FitConfig(steps=6, batch=6, warmup=2)


def weights(part: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in part.parameters()])


def small_policy(size: int = SIZE, chunk: int = 4) -> Policy:
    torch.manual_seed(0)
    return Policy(PolicyConfig(size=size, chunk=chunk, width=8, hidden=16))


def fits() -> dict:
    """Every part after a few steps on batches of six rows, its augmentations on."""
    policy, kinematics = small_policy(), Kinematics(4)
    simulator = Simulator(SimulatorConfig(size=SIZE, channels=(32, 32, 32), album=8), CAMERA)
    simulator.album.fill(EPISODES)
    parts = {
        "policy": (policy, imitation_batches(EPISODES, 6, 0)),
        "kinematics": (kinematics, episode_batches(EPISODES, 6, 0)),
        "simulator": (simulator, transition_batches(EPISODES, 6, 0)),
        "reflector": (
            Reflector(ReflectorConfig(size=SIZE, width=32)),
            frame_batches(EPISODES, 6, 0),
        ),
    }
    done = {}
    for name, (part, sample) in parts.items():
        torch.manual_seed(1)
        losses, first = [], weights(part)
        fit(part, sample, FIT, lambda step, loss, metrics, losses=losses: losses.append(loss))
        done[name] = {"losses": losses, "first": first, "weights": weights(part)}
    return done


class AnySlot(Walk):
    """A walk that does not tell in which slot it is, and what `play` asks for besides."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += len(options["starts"])
        return super().reset(seed=seed, options=options)

    def observation(self) -> dict:
        self.state[:, 2] = 0
        return super().observation()

    def step(self, actions: np.ndarray):
        *outcome, _ = super().step(actions)
        return *outcome, {"success": outcome[2]}


def loops() -> dict:
    """LOOP: noise in every decision, in the first two of a branch, and held."""
    done = {}
    for name, branch, held in (("plain", 0, False), ("branch", 2, False), ("held", 6, True)):
        policy = small_policy(WALK_SIZE, chunk=2)
        env, first = AnySlot(16 // processes.world(), horizon=6), weights(policy)
        config = LoopConfig(
            iterations=2, groups=4, rollouts=4, branch=branch, held=held, noise=4.0, epochs=2,
            minibatch=7, decisions=40, learning_rate=1e-3,
        )  # fmt: skip
        history: list[dict] = []
        draw = lambda iteration, groups: [Start("reach", 10 * iteration + g) for g in range(groups)]  # noqa: E731
        loop(env, policy, draw, config, 3, lambda i, metrics, h=history: h.append(metrics))
        done[name] = {"history": history, "first": first, "weights": weights(policy)}
    return done


def episodes() -> dict:
    """Five explored episodes, four at a time, so that of the second batch one process plays none;
    then two more."""
    env: Any = AnySlot(4 // processes.world(), horizon=4)
    generator, policy = torch.Generator().manual_seed(5), small_policy(WALK_SIZE, chunk=2)
    starts, played = [Start("reach", seed) for seed in range(7)], []
    for some in (starts[:5], starts[5:]):
        played += explored(env, policy, some, 2.0, generator)
    return {
        "seeds": [episode.seed for episode in played],
        "actions": [torch.from_numpy(episode.action) for episode in played],
        "resets": processes.total(env.resets),
    }


def pretrained(checkpoint: str, width: str, out: Path) -> dict:
    """A pretrained policy in float32 or bfloat16 after a few steps, as its checkpoint has it;
    sharded where that is configured."""
    torch.manual_seed(0)
    rank = 4 * (find_spec("peft") is not None)
    model = PretrainedConfig(checkpoint, lora_rank=rank, bf16=width == "bfloat16")
    config = PolicyConfig(backbone="pretrained", size=SIZE, hidden=16, pretrained=model)
    policy, losses = Policy(config), []
    processes.shard(policy)
    sample = imitation_batches(EPISODES, 6, 0)
    fit(policy, sample, FIT, lambda step, loss, metrics: losses.append(loss))
    save_part(out / "policy.safetensors", policy, asdict(config))
    own = sum(getattr(p, "_local_tensor", p).numel() for p in policy.parameters())
    return {"losses": losses, "weights held": own}


if __name__ == "__main__":
    processes.start("cpu", {"groups": 4})
    torch.set_num_threads(1)
    result, out = {"world": processes.world()}, Path(sys.argv[1])
    if len(sys.argv) == 4:
        result |= pretrained(sys.argv[2], sys.argv[3], out)
    else:
        result |= {**fits(), **loops(), "episodes": episodes()}
    result["connected"] = torch.distributed.is_initialized()
    torch.save(result, out / f"{os.environ.get('RANK', 0)}.pt")
    processes.leave(0)
