"""What a run will need of disk, time and real episodes: told, or asked for, before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runs import RunConfig

ESTIMATES = {  # of memory and time: runs.gpu_scale, runs.paper_scale
    "gpu": "a GPU of 12 GB, 3.5 hours at 10 TFLOP/s",
    "paper": "a GPU of 80 GB, 13 hours at 100 TFLOP/s",
}
# What has to be free on the disk: checkpoints, three times the largest state of a stage (two stay,
# one is being written), and episodes. 50 + 3 x 120 in the cpu preset, 200 + 3 x 740 in the gpu
# preset; with adapters for a model of 7 B weights 1600 + 3 x 2400, with Stable Diffusion's U-Net
# 3500 + 3 x 14,000 (estimates).
CHECKPOINTS_MB, GPU_MB, ADAPTERS_MB, UNET_MB = 500, 2500, 9000, 46_000


def expected(preset: str, device: str, config: RunConfig) -> list[str]:
    """What larger runs need, for the start of one."""
    lines = []
    if preset in ESTIMATES:
        lines = [f"preset {preset}: {ESTIMATES[preset]} (estimate, counted, not measured)"]
        if device == "cpu":
            lines += [f"preset {preset} on the processor: expect days; a GPU is --device cuda"]
    if config.env.robot.name == "libero" and preset not in ("libero", "debug", "paper"):
        lines += [
            f"{real_episodes(config)} real episodes of LIBERO ahead, or more; "
            "--preset libero is the reduced setting"
        ]
    return lines


def real_episodes(config: RunConfig) -> int:
    """Demonstrations, exploration and the evaluation of each policy that imitates: at the least,
    since the expert may fail, and the gauge and LOOP in reality play as many as they need."""
    from order import IMITATION, stages_of

    evaluated = config.test_starts * len({*IMITATION} & {*stages_of(config)})
    return len(config.tasks) * (config.demos + explored(config) + evaluated)


def explored(config: RunConfig) -> int:
    """Exploration episodes of each task, over all rounds."""
    return config.exploration + (config.rounds - 1) * config.round_exploration


def room_mb(preset: str, config: RunConfig) -> float:
    """What a run's checkpoints and states need on the disk, in megabytes."""
    room = GPU_MB if preset in ESTIMATES else CHECKPOINTS_MB
    room += ADAPTERS_MB if config.policy.pretrained.checkpoint else 0
    return room + (UNET_MB if config.simulator.pretrained.unet else 0)
