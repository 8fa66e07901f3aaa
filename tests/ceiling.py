"""How well would a dream agree with reality if all that it got wrong were where the hand goes?

    python tests/ceiling.py RUN OUT.json

Reality is played twice from the same 300 starts, which nothing else has played: by the run's dream
BC as it is, and with a small push on each decision's position actions. How often do the two end
alike, and how far apart are the hands? Beside it the dream of the same starts. OUT gets the result
after each push; what is there is not done again.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from levers import SKIPPED, STARTS  # noqa: E402 (needs the path when it is run)

PUSHES = (0.0, 0.02, 0.05, 0.1, 0.2)  # of an action, which ranges over [-1, 1]


def pushed(act, push: float, seed: int):
    """The policy's `act`, and one normal draw times `push` on x, y, z of each chunk."""
    rng = np.random.default_rng(seed)

    def shaken(observation: dict, on: np.ndarray) -> np.ndarray:
        chunk = act(observation, on).copy()
        chunk[..., :3] += push * rng.standard_normal((len(chunk), 1, 3)).astype(np.float32)
        return np.clip(chunk, -1, 1)

    return shaken


def compared(one: list, other: list) -> dict:
    """Two lists of episodes from the same starts: successes of both, how often they end alike, and
    how far apart the hands are over the decisions that both have played, in millimetres."""
    apart = []
    for a, b in zip(one, other, strict=True):
        n = min(len(a), len(b)) + 1
        apart.append(np.linalg.norm(a.state[1:n, :3] - b.state[1:n, :3], axis=1))
    return {
        "real": [int(e.succeeded) for e in one],
        "other": [int(e.succeeded) for e in other],
        "agreement": float(
            np.mean([a.succeeded == b.succeeded for a, b in zip(one, other, strict=True)])
        ),
        "hand_mm": 1000 * float(np.concatenate(apart).mean()),
        "hand_mm_last": 1000 * float(np.mean([path[-1] for path in apart])),
    }


def main(folder: Path, out: Path) -> None:
    import train
    from demos import play, write_atomically
    from evaluate import current_commit, hardware
    from gauge import probe_starts
    from runs import Run
    from vecenv import VecRealEnv
    from worldenv import WorldEnv, start_frames

    run = Run.open(folder)
    config = run.config
    *_, camera = train.sources(run)
    policy = run.policy("dream_bc")
    starts = probe_starts(config.tasks, STARTS, config.seed, skipped=SKIPPED)
    env = VecRealEnv(30, config.env)
    real = play(env, starts, policy.act, "evaluation")
    found = json.loads(out.read_text()) if out.exists() else {"pushes": {}}
    found |= {"command": f"python tests/ceiling.py {folder} {out}", "hardware": hardware()}
    found |= {"commit": current_commit(), "tasks": [s.task for s in starts]}
    if "dream" not in found:
        parts = run.simulator(camera), run.reflector()
        world = WorldEnv(*parts, start_frames(real), 60, config.env, config.seed)
        found["dream"] = compared(real, play(world, starts, policy.act, "evaluation"))
    for push in PUSHES:
        if str(push) not in found["pushes"]:
            again = play(env, starts, pushed(policy.act, push, config.seed), "evaluation")
            found["pushes"][str(push)] = compared(real, again)
            write_atomically(out, json.dumps(found).encode())
            print(
                push,
                {k: v for k, v in found["pushes"][str(push)].items() if "mm" in k or "agr" in k},
                flush=True,
            )
    env.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
