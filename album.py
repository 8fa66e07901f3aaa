"""The album: real frames of recorded episodes, looked up by where the hand is and by the scene.

Paper's section: "World simulator" (memory), which this extends from one episode to all of them.

    episodes --spread over all hand places--> N frames with their states
    s_{t+1}, o_0 --nearest page--> frame, moved by the pixels that are left --> a source to copy

The camera stands still, so what the arm looks like depends on its pose alone, and the arm is most
of what changes between frames. To paint it costs a small network nearly all of its training; to
copy it from a real frame with nearly the same pose costs a choice. A page of an episode that began
in a similar scene is preferred; what else is in it (objects at other places) the network learns to
leave there.

# DEVIATION: the paper's memory holds frames of the same episode; the album holds real frames of any
#   recorded one; because from a few hundred training steps an arm that is painted is a red smear.

Symbols: B batch, N frames in the album, S state dimensions, H, W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tasks import STATE_DIM

# What one unit of the state weighs in a distance: metres as they are, and the whole of the
# gripper's opening as 5 cm. Further entries are angles: a hand of 10 cm that turns by a radian
# moves its far end by as much.
WEIGHT, TURN_WEIGHT = (1.0, 1.0, 1.0, 0.05), 0.1
# A mean difference of 1 between the thumbnails of two first frames (all of the range) weighs as
# much as that many metres: another task's scene, some 5 % off, as 2.5 cm.
SCENE_WEIGHT = 0.5
THUMBNAIL = 8  # pixels
NOWHERE = 1e3  # the state of an empty page: farther than any other


class Album(nn.Module):
    """N pages, each a frame, its state and the number of its episode; a checkpoint holds them.

    `fill` chooses the frames once, before the simulator trains; `recall` finds the nearest.
    """

    frames: torch.Tensor
    states: torch.Tensor
    scenes: torch.Tensor
    owners: torch.Tensor
    weight: torch.Tensor

    def __init__(self, pages: int, size: int, state_dim: int = STATE_DIM):
        super().__init__()
        self.register_buffer("frames", torch.zeros(pages, size, size, 3, dtype=torch.uint8))
        self.register_buffer("states", torch.full((pages, state_dim), NOWHERE))
        self.register_buffer("scenes", torch.zeros(pages, 3 * THUMBNAIL**2))
        self.register_buffer("owners", torch.full((pages,), -1))
        self.register_buffer("weight", torch.tensor(weights(state_dim)))

    def fill(self, episodes) -> None:
        """Choose frames of the episodes (`demos.Episode`; their place in the list is their number)
        by farthest-point sampling: each time the one whose hand is farthest from all chosen."""
        states = np.concatenate([e.state for e in episodes])
        owners = np.repeat(np.arange(len(episodes)), [len(e.state) for e in episodes])
        frames = [frame for e in episodes for frame in e.image]
        firsts = torch.from_numpy(np.stack([e.image[0] for e in episodes])).movedim(-1, 1)
        scenes = thumbnail(firsts.float() / 255 - 0.5)
        places = weighed(states)
        chosen, distance = [0], ((places - places[0]) ** 2).sum(1)
        while len(chosen) < min(len(self.frames), len(places)):
            chosen.append(int(distance.argmax()))
            distance = np.minimum(distance, ((places - places[chosen[-1]]) ** 2).sum(1))
        n = len(chosen)
        self.states.fill_(NOWHERE)
        self.frames[:n] = torch.from_numpy(np.stack([frames[i] for i in chosen]))
        self.states[:n] = torch.from_numpy(states[chosen])
        self.owners[:n] = torch.from_numpy(owners[chosen])
        self.scenes[:n] = scenes[torch.from_numpy(owners[chosen])]

    def scene_distance(self, first: torch.Tensor) -> torch.Tensor:
        """First frames (B, 3, H, W) in [-0.5, 0.5] -> how much each page's scene differs, (B, N):
        the second term of `recall`, the same during an episode."""
        return torch.cdist(thumbnail(first), self.scenes, p=1) / self.scenes.shape[1]

    def recall(
        self, state: torch.Tensor, scene: torch.Tensor, owner: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, S) and the `scene_distance` (B, N) of their episodes' first frames
        -> frames (B, H, W, 3) uint8 and states (B, S) of the nearest pages:

            distance = |WEIGHT (s - s_page)| + SCENE_WEIGHT mean |thumbnail(o_0) - that of the page|

        owner: (B,) numbers of episodes whose own pages do not count. While the simulator trains it
        must not be shown the very frame that it is asked for. (Dreams along training episodes may
        find their own pages.)
        """
        distance = torch.cdist(state * self.weight, self.states * self.weight)
        distance = distance + SCENE_WEIGHT * scene
        if owner is not None:
            distance = distance + NOWHERE * (owner[:, None] == self.owners)
        page = distance.argmin(1)
        return self.frames[page], self.states[page]


def weighed(states: np.ndarray) -> np.ndarray:
    """States (..., S) float32, so scaled by WEIGHT that differences are distances in metres."""
    return states * np.array(weights(states.shape[-1]), np.float32)


def weights(state_dim: int) -> tuple[float, ...]:
    """WEIGHT, and TURN_WEIGHT for each further entry of a state."""
    return WEIGHT + (TURN_WEIGHT,) * (state_dim - len(WEIGHT))


def thumbnail(image: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) -> (B, 3 * THUMBNAIL^2): means over squares."""
    return F.adaptive_avg_pool2d(image, THUMBNAIL).flatten(1)
