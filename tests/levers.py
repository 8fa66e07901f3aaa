"""One lever of LOOP at a time, from dream BC of a finished run: what does it do to real success?

    python tests/levers.py RUN OUT.json

Each variant post-trains in the run's dream for eight iterations (but `long`), by a loop that
differs in one thing, without a stop rule; then both worlds are played by it from the same 300
starts, which nothing else has played. OUT gets the result after each variant; what is there is not
done again.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VARIANTS = {
    "start": "dream BC as it is: no LOOP",
    "default": "LOOP as `train` does it",
    "plain": "no branches, the policy's own noise (of its rows 1,024 an iteration, as ever)",
    "frozen": "the backbone is frozen: heads only",
    "small": "a tenth of the learning rate",
    "sametask": "leave-one-out over all rollouts of the task, not of the start",
    "mixed": "only starts from which, of eight rollouts before, some succeeded and some failed",
    "independent": "noise of each step's own in a chunk, not one draw for it",
    "lora": "LoRA of rank 8 in convolutions, FiLM and trunk at 1e-4; their weights stand still",
    "mapped": "a stop pays 0.5 at the task's eta and 1 where R is 1, as if eta were 0.5",
    "long": "LOOP as `train` does it, for forty iterations",
}
STARTS, SKIPPED = 60, 300  # a task; the first of the rl split, which the gauge plays


def over_the_task(leave_one_out: Callable, tasks: int) -> Callable:
    """`ppo.leave_one_out` over all groups of a task: groups come with the tasks in turn."""
    import torch

    def advantages(returns):
        result = torch.empty_like(returns)
        for task in range(tasks):
            some = returns[task::tasks]
            result[task::tasks] = leave_one_out(some.flatten()[None]).view_as(some)
        return result

    return advantages


def only_adapters(policy) -> None:
    """LoRA in every convolution and linear layer below the heads; the heads train as ever."""
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    below = [
        name
        for name, layer in policy.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and "head" not in name
    ]
    adapters = LoraConfig(
        r=8, lora_alpha=8, target_modules=below, init_lora_weights="gaussian", bias="none"
    )
    inject_adapter_in_model(adapters, policy)
    for head in (policy.mean_head, policy.scale_head):
        head.requires_grad_(True)


def as_if_eta_were_half(world) -> Callable:
    """`world.step` whose reward at a stop does not know how low eta is."""
    step = world.step

    def mapped(actions):
        observation, rewards, terminations, *rest = step(actions)
        eta = world._etas[terminations]
        rewards[terminations] = 0.5 + 0.5 * (rewards[terminations] - eta) / (1 - eta)
        return observation, rewards, terminations, *rest

    return mapped


def mixed_starts(world, policy, starts: list, loop) -> list:
    """Those whose group has both outcomes."""
    import torch

    import ppo

    generator = torch.Generator().manual_seed(7)
    kept: list = []
    for first in range(0, len(starts), loop.groups):
        some = starts[first : first + loop.groups]
        won = ppo.branch_rollouts(world, policy, some, loop, generator).success.sum(1)
        kept += [start for start, n in zip(some, won, strict=True) if 0 < n < loop.rollouts]
    return kept


def changed(name: str, stack: ExitStack, world, policy, draw, loop, config):
    """(loop's settings, what draws its starts) of a variant; what else it changes is undone when
    the stack closes."""
    import numpy as np

    import ppo

    if name == "plain":
        loop = replace(loop, branch=0, noise=1.0)
    if name == "mapped":
        stack.enter_context(patch.object(world, "step", as_if_eta_were_half(world)))
    if name == "long":
        loop = replace(loop, iterations=40)
    if name == "small":
        loop = replace(loop, learning_rate=loop.learning_rate / 10)
    if name == "frozen":
        for parameter in policy.backbone.parameters():
            parameter.requires_grad_(False)
    if name == "lora":
        only_adapters(policy)
    if name == "sametask":
        other = over_the_task(ppo.leave_one_out, len(config.tasks))
        stack.enter_context(patch.object(ppo, "leave_one_out", other))
    if name == "independent":
        explorer, log_prob = ppo.Explorer, ppo.chunk_log_prob

        class Independent(explorer):
            def __init__(self, policy, noise, shared, *rest, **named):
                super().__init__(policy, noise, False, *rest, **named)

        stack.enter_context(patch.object(ppo, "Explorer", Independent))
        own = lambda sample, mean, scale, shared: log_prob(sample, mean, scale, False)  # noqa: E731
        stack.enter_context(patch.object(ppo, "chunk_log_prob", own))
    if name == "mixed":
        kept = mixed_starts(world, policy, draw(10_000, 4 * loop.groups), loop)
        assert kept, "no start has both outcomes: a dream without a signal"

        def draw(iteration: int, groups: int) -> list:
            rngs = (np.random.default_rng([config.seed, iteration, i]) for i in range(groups))
            return [kept[rng.integers(len(kept))] for rng in rngs]

    return loop, draw


def both_worlds(parts, policy, env, starts, config) -> dict[str, list[int]]:
    """Whether each start succeeds, in reality and in the dream."""
    from gauge import play_both

    played: list = [[], []]
    for first in range(0, len(starts), 60):
        some = starts[first : first + 60]
        for kind, episodes in zip(
            played, play_both(*parts, policy, env, some, config.env, config.seed), strict=True
        ):
            kind += [int(episode.succeeded) for episode in episodes]
    return {"real": played[0], "imagined": played[1]}


def main(folder: Path, out: Path) -> None:
    import ppo
    import train
    from demos import write_atomically
    from evaluate import current_commit, hardware
    from gauge import known_starts, probe_starts
    from runs import Run
    from vecenv import VecRealEnv
    from worldenv import WorldEnv, start_frames

    found = json.loads(out.read_text()) if out.exists() else {"variants": {}}
    run = Run.open(folder)
    config = run.config
    demonstrations, exploration, camera = train.sources(run)
    parts = run.simulator(camera), run.reflector()
    known = start_frames(demonstrations + exploration)
    starts = probe_starts(config.tasks, STARTS, config.seed, skipped=SKIPPED)
    env = VecRealEnv(30, config.env)
    for name in [name for name in VARIANTS if name not in found["variants"]]:
        began, policy, history = time.time(), run.policy("dream_bc"), []
        world = WorldEnv(*parts, known, config.slots, config.env, config.seed)
        draw = known_starts(config.tasks, config.seed, known)
        eight = replace(config.loop, iterations=8)
        with ExitStack() as stack:
            loop, draw = changed(name, stack, world, policy, draw, eight, config)
            if name != "start":
                history = ppo.loop(world, policy, draw, loop, 100 * config.seed + 1)
        found["variants"][name] = {
            "what": VARIANTS[name],
            **both_worlds(parts, policy, env, starts, config),
            "history": history,
            "seconds": round(time.time() - began),
        }
        found |= {"command": f"python tests/levers.py {folder} {out}", "hardware": hardware()}
        found |= {"commit": current_commit(), "tasks": [s.task for s in starts]}
        write_atomically(out, json.dumps(found).encode())
        print(name, {k: sum(found["variants"][name][k]) for k in ("real", "imagined")}, flush=True)
    env.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
