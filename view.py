"""Where the hand is in the picture, and where things are from there.

Paper's section: "World simulator" (poses are projected onto the image plane); here the policy and
the reflector use the projection too.

What a policy or a reflector has to know is where things are *from the hand*. Keypoints are
therefore reported relative to the hand's own place in the picture, which the proprioceptive state
and the camera give exactly: then neither must learn to find the hand, and a random shift of the
picture, which moves both, costs no precision [measured here: results/attempts.md].

Symbols: B batch, S state dimensions, C keypoints. Rows and columns: the picture is [-1, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from camera import Camera


class HandInView(nn.Module):
    """State -> where the hand is seen. The camera is a buffer: a checkpoint brings it along."""

    matrix: torch.Tensor

    def __init__(self):
        super().__init__()
        # Until a camera is given, the hand is in the middle of the picture.
        self.register_buffer("matrix", torch.tensor([[0.0] * 4, [0.0] * 4, [0.0, 0.0, 0.0, 1.0]]))

    def look_through(self, camera: Camera) -> None:
        """Take a camera: its `Camera.matrix`, scaled so that the picture is [-1, 1]."""
        half = camera.size / 2
        scale = np.array([[1 / half, 0, -1], [0, 1 / half, -1], [0, 0, 1]])
        self.matrix.copy_(torch.from_numpy(scale @ camera.matrix()))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """States (B, S) -> row and column of the hand, (B, 2), the picture being [-1, 1].

        As a sum of products: a matrix product would be done in bfloat16 where the networks around
        it are, and move the hand by up to a fifth of a pixel."""
        position = torch.cat([state[:, :3], torch.ones_like(state[:, :1])], dim=1)
        column, row, depth = (position[:, None] * self.matrix).sum(-1).unbind(1)
        return torch.stack([row / depth, column / depth], dim=1)


def from_the_hand(where: torch.Tensor, hand: torch.Tensor) -> torch.Tensor:
    """Keypoints (B, 2C), rows then columns, and the hand (B, 2) -> the same, seen from the hand.

    Twice the difference: mostly within [-1, 1] again."""
    row, column = where.chunk(2, dim=1)
    return 2 * torch.cat([row - hand[:, :1], column - hand[:, 1:]], dim=1)
