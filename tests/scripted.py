"""Episodes of random pictures and actions, for tests that need no real one."""

import numpy as np

from demos import Episode


def random_episode(
    seed: int,
    length: int,
    size: int,
    task: str = "reach",
    instruction: str = "reach the goal",
    source: str = "expert",
) -> Episode:
    """`length` decisions of 4 actions, pictures of size x size, success at the end."""
    rng = np.random.default_rng(seed)
    return Episode(
        image=rng.integers(0, 256, (length + 1, size, size, 3), dtype=np.uint8),
        state=rng.random((length + 1, 4), dtype=np.float32),
        action=rng.uniform(-1, 1, (length, 4, 4)).astype(np.float32),
        success=np.array([0] * length + [1], np.uint8),
        task=task,
        instruction=instruction,
        seed=seed,
        source=source,
    )
