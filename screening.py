"""Screening Meta-World for a default suite, and how often the scripted expert succeeds.

python cli.py screen           imitation from 5 demonstrations on every task the expert solves
                               -> results/screening.md
python cli.py expert           how often the scripted expert succeeds -> results/expert.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from demos import collect_expert, parse_json, play, write_atomically
from evaluate import current_commit, evaluate, hardware, test_starts, wilson
from fit import FitConfig, fit
from instructions import TASKS
from policy import Policy, PolicyConfig, imitation_batches
from runs import RunConfig, with_tasks
from summary import reading_results
from tasks import EnvConfig, Start, split_seeds
from vecenv import VecRealEnv

SCREEN_GROUP = 5  # tasks that share one policy while screening, as many as the default suite has
SCREEN_STARTS = 30  # development starts per task
KEEP = (0.3, 0.8)  # where imitation solves this share there is room, and something to improve on


def screen(folder: Path, say: Callable[[str], None]) -> None:
    """Screen every task; resumable (one line per task in screening.jsonl,
    written as each group ends).

    1. The expert plays 5 development starts; a task is a candidate if it solves 4 within 25
       decisions (of 30).
    2. Candidates, in groups of 5, get one policy each group: 5 demonstrations per task, the cpu
       preset's architecture.
    3. Real success on 30 development starts per task; 30-80 % keeps the task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "screening.jsonl"
    rows: list[dict] = []
    if path.is_file():
        with reading_results(path, "delete it to screen every task again"):
            rows = [parse_json(line) for line in path.read_bytes().splitlines()]
            screening_table(rows)
    env = VecRealEnv(50, EnvConfig())
    try:
        for group in screening_groups(env):
            if any(row["task"] in group for row in rows):
                continue
            new = _screen_group(env, group)
            rows += new
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            for row in new:
                say(f"{row['task']}: {row['success']:.2f}")
    finally:
        env.close()
    write_atomically(folder / "screening.md", screening_table(rows).encode())


def screening_groups(env: VecRealEnv) -> list[list[str]]:
    """The candidates in groups of five; five tasks first, as in the committed table, then
    alphabetically."""
    length: dict[str, list] = {task: [] for task in TASKS}
    for seed in split_seeds("dev", 5):
        for episode in play(env, [Start(task, seed) for task in TASKS], None, "expert"):
            length[episode.task].append(len(episode) if episode.succeeded else math.inf)
    able = [task for task, values in length.items() if sum(v <= 25 for v in values) >= 4]
    first = ["button-press-topdown", "coffee-button", "drawer-open", "handle-press", "faucet-open"]
    order = [t for t in first if t in able] + [t for t in able if t not in first]
    return [order[i : i + SCREEN_GROUP] for i in range(0, len(order), SCREEN_GROUP)]


def _screen_group(env: VecRealEnv, group: list[str]) -> list[dict]:
    torch.manual_seed(0)
    episodes = []
    for task in group:
        try:
            episodes += collect_expert(env, [task], 5, 0)
        except RuntimeError:
            continue  # the expert is too unreliable on this task's starts: it is left out
    policy = Policy(PolicyConfig())
    policy.hand.look_through(env.camera)
    policy.set_state_statistics(np.concatenate([e.state for e in episodes]))
    fit(policy, imitation_batches(episodes, 64, 0), FitConfig(steps=1500))
    solved = sorted({e.task for e in episodes})
    result = evaluate(policy, env, test_starts(tuple(solved), SCREEN_STARTS, "dev"), "oracle")
    lengths = {
        t: float(np.mean([e.first_success for e in episodes if e.task == t])) for t in solved
    }
    return [
        {"task": t, "success": result["tasks"][t]["success"], "expert_decisions": lengths[t]}
        for t in solved
    ]


def measure_expert(
    suite: str, tasks: tuple[str, ...], starts: int, path: Path, command: str, say
) -> None:
    """The expert plays the first `starts` of the dev split of every task, up to the suite limit of
    steps; adds the counts to a JSON file, as an entry named after the suite."""
    config = with_tasks(RunConfig(), tasks).env
    found: dict[str, dict] = {}
    if path.is_file():
        with reading_results(path, "delete it, or choose another --out"):
            found = {**parse_json(path.read_bytes())}
    seeds = split_seeds("dev", starts)
    rows: dict[str, dict] = {}
    env = VecRealEnv(min(starts, 8), config)
    try:
        for task in tasks:
            episodes = play(env, [Start(task, seed) for seed in seeds], None, "expert")
            won = [len(e) for e in episodes if e.succeeded]
            rows[task] = {
                "successes": len(won),
                "starts": starts,
                "mean_decisions": float(np.mean(won)) if won else None,
            }
            say(f"{task}: {len(won)} of {starts}")
    finally:
        env.close()
    found[suite] = {
        "command": command,
        "commit": current_commit(),
        "seeds": [seeds[0], seeds[-1]],
        "step_limit": config.horizon * config.chunk,
        "chunk": config.chunk,
        "hardware": hardware(),
        "successes": sum(row["successes"] for row in rows.values()),
        "starts": starts * len(tasks),
        "tasks": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    say(f"{suite}: {found[suite]['successes']} of {found[suite]['starts']}; {path}")


def screening_table(rows: list[dict]) -> str:
    """The text of results/screening.md."""
    lines = [
        "# Screening of Meta-World's tasks",
        "",
        "`python cli.py screen`: imitation from 5 demonstrations "
        "(seed 0, 1,500 steps, one policy per group of five tasks),",
        f"real success on {SCREEN_STARTS} development starts with Wilson's 95 % interval. "
        f"Kept: {KEEP[0]:.0%}-{KEEP[1]:.0%}.",
        "Tasks that are missing are not solved by Meta-World's expert in 4 of 5 starts "
        "within 25 decisions.",
        "",
        "| task | imitation | interval | expert's decisions | kept |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: -r["success"]):
        low, high = wilson(round(row["success"] * SCREEN_STARTS), SCREEN_STARTS)
        kept = "yes" if KEEP[0] <= row["success"] <= KEEP[1] else ""
        lines.append(
            f"| {row['task']} | {row['success']:.2f} | {low:.2f}-{high:.2f} | "
            f"{row['expert_decisions']:.0f} | {kept} |"
        )
    return "\n".join(lines) + "\n"
