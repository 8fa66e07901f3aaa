"""The camera as a formula: where a point of the world is seen, without MuJoCo.

Paper's section: "World simulator" (the action map draws projected poses onto the image plane).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Camera:
    """A pinhole camera as MuJoCo holds it, enough to draw the action map without MuJoCo.

    position: (3,) metres; rotation: (3, 3) whose columns are the camera's right, up and backward
    axes in the world frame; fovy: vertical field of view in degrees; size: pixels of the square
    image. The image that the environment returns is turned by 180 degrees against MuJoCo's, and
    `project` speaks of the returned image.
    """

    position: tuple[float, ...]
    rotation: tuple[float, ...]
    fovy: float
    size: int

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (..., 3) in metres -> pixel coordinates (..., 2) as (column, row), float32.

        With p_c = R^T (p - c) in the camera frame (x right, y up, looking along -z) and the focal
        length in pixels f = (size / 2) / tan(fovy / 2), MuJoCo's image has

            column = size / 2 + f * x_c / (-z_c),    row = size / 2 - f * y_c / (-z_c)

        and the turn by 180 degrees maps (column, row) to (size - column, size - row).
        """
        rotation = np.asarray(self.rotation, np.float64).reshape(3, 3)
        local = (np.asarray(points, np.float64) - np.asarray(self.position)) @ rotation  # p_c
        focal = 0.5 * self.size / np.tan(np.radians(self.fovy) / 2)
        depth = np.maximum(-local[..., 2], 1e-6)
        column = self.size / 2 + focal * local[..., 0] / depth
        row = self.size / 2 - focal * local[..., 1] / depth
        return np.stack([self.size - column, self.size - row], axis=-1).astype(np.float32)
