"""The camera as a formula: where a point of the world is seen, without MuJoCo.

Paper's section: "World simulator" (the action map draws projected poses onto the image plane).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST = 1e6  # metres, degrees: a number of a camera or a robot beyond that is no honest one


def are_numbers(values, count: int) -> bool:
    """Whether this is a tuple of `count` finite numbers; a file may hold anything."""
    kinds = (int, float, np.floating)
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(x, kinds) and not isinstance(x, bool) for x in values)
        and all(abs(x) <= MOST for x in values)  # False for NaN
    )


def check_values(part, *checks: tuple[str, bool, str]) -> None:
    """ValueError for the first value of a dataclass that is not right.

    checks: (name of the value, whether it is right, what was expected), one each.
    """
    for name, right, expected in checks:
        if not right:
            got = f"{getattr(part, name)!r:.80}"
            raise ValueError(f"{type(part).__name__}.{name}: got {got}, expected {expected}")


@dataclass(frozen=True)
class Camera:
    """A pinhole camera as MuJoCo holds it, enough to draw the action map without MuJoCo.

    position: (3,) metres; rotation: (3, 3) whose columns are the camera's right, up and backward
    axes in the world frame; fovy: vertical field of view in degrees; size: pixels of the square
    image. The image that Meta-World's environment returns is turned by 180 degrees against MuJoCo's
    (its camera hangs head down), LIBERO's is not; `project` speaks of the returned image.
    """

    position: tuple[float, ...]
    rotation: tuple[float, ...]
    fovy: float
    size: int
    turned: bool = True  # the returned image is MuJoCo's, turned by 180 degrees

    def __post_init__(self) -> None:
        lens = are_numbers((self.fovy,), 1) and 1 <= self.fovy <= 179
        check_values(
            self,
            ("position", are_numbers(self.position, 3), "3 numbers, x, y, z in metres"),
            ("rotation", are_numbers(self.rotation, 9), "9 numbers, the rows of a matrix"),
            ("fovy", lens, "1 to 179 degrees"),
            ("size", type(self.size) is int and self.size > 0, "a whole number of pixels"),
            ("turned", type(self.turned) is bool, "true or false"),
        )

    def matrix(self) -> np.ndarray:
        """The projection P (3, 4) float64: (u, v, w) = P (x, y, z, 1), column u / w, row v / w.

        With p_c = R^T (p - c) in the camera frame (x right, y up, looking along -z), the depth
        w = -z_c and the focal length in pixels f = (size / 2) / tan(fovy / 2), MuJoCo's image has

            column = size / 2 + f * x_c / w,    row = size / 2 - f * y_c / w

        and the turn by 180 degrees, if there is one, maps (column, row) to (size - column,
        size - row).
        """
        rotation = np.asarray(self.rotation, np.float64).reshape(3, 3)
        half = self.size / 2
        focal = half / np.tan(np.radians(self.fovy) / 2)
        across = -focal if self.turned else focal
        turned = np.array([[across, 0, -half], [0, -across, -half], [0, 0, -1]])
        from_world = np.column_stack([rotation.T, -rotation.T @ np.asarray(self.position)])
        return turned @ from_world

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (..., 3) in metres -> pixel coordinates (..., 2) as (column, row), float32;
        see `matrix`."""
        points = np.asarray(points, np.float64)
        ones = np.ones((*points.shape[:-1], 1))
        seen = np.concatenate([points, ones], axis=-1) @ self.matrix().T
        return (seen[..., :2] / np.maximum(seen[..., 2:], 1e-6)).astype(np.float32)

    def motion_to(self, other: Camera) -> tuple[np.ndarray, np.ndarray]:
        """The rigid motion p' = Q p + b, Q (3, 3) and b (3,) float64, after which the other camera,
        of the same lens, sees at p' what this one sees at p:

            R'^T (p' - c') = R^T (p - c),    so Q = R' R^T and b = c' - Q c
        """
        mine, theirs = (np.asarray(x.rotation).reshape(3, 3) for x in (self, other))
        turn = theirs @ mine.T
        return turn, np.asarray(other.position) - turn @ np.asarray(self.position)
