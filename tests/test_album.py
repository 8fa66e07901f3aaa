"""The album: which frames it keeps, and which it finds."""

import numpy as np
import torch

from album import THUMBNAIL, Album, thumbnail
from demos import Episode
from tasks import ACTION_DIM, STATE_DIM


def episode(places: list[float], grey: int) -> Episode:
    """A hand at these x, in front of a grey wall; the frame's first pixel counts the decisions."""
    n = len(places)
    image = np.full((n, 16, 16, 3), grey, np.uint8)
    image[:, 0, 0] = np.arange(n)[:, None]
    state = np.zeros((n, STATE_DIM), np.float32)
    state[:, 0] = places
    action = np.zeros((n - 1, 2, ACTION_DIM), np.float32)
    success = np.zeros(n, np.uint8)
    return Episode(image, state, action, success, "reach-wall", "", 0, "expert")


def hand(x: float) -> torch.Tensor:
    """(1, S): a state with the hand at x."""
    return torch.tensor([[x, 0.0, 0.0, 0.0]])


def wall(grey: int) -> torch.Tensor:
    """(1, 3, 16, 16): a first frame as the simulator has it."""
    return torch.full((1, 3, 16, 16), grey / 255 - 0.5)


def found(album: Album, x: float, grey: int, owner: int | None = None) -> tuple[float, int]:
    """(x, grey) of the page that is recalled for a hand at x in front of a wall."""
    scene = album.scene_distance(wall(grey))
    frame, state = album.recall(hand(x), scene, None if owner is None else torch.tensor([owner]))
    return round(state[0, 0].item(), 3), int(frame[0, 8, 8, 0])


def test_the_pages_are_spread_over_all_places():
    """Of many frames at one place and few elsewhere, one each is chosen."""
    album = Album(3, 16)
    album.fill([episode([0.0] * 20 + [0.3], 50), episode([0.1] * 9, 50)])
    assert sorted(round(x, 3) for x in album.states[:, 0].tolist()) == [0.0, 0.1, 0.3]
    assert album.owners[album.states[:, 0].argsort()].tolist() == [0, 1, 0]


def test_the_nearest_hand_is_found_and_empty_pages_never():
    """Three frames in an album of eight."""
    album = Album(8, 16)
    album.fill([episode([0.0, 0.1, 0.2], 50)])
    assert [found(album, x, 50)[0] for x in (-0.4, 0.04, 0.06, 0.9)] == [0.0, 0.0, 0.1, 0.2]


def test_filling_again_forgets_what_was_there():
    """A later round brings other episodes."""
    album = Album(8, 16)
    album.fill([episode([0.0, 0.1, 0.2], 50)])
    album.fill([episode([0.5, 0.6], 50)])
    assert found(album, 0.0, 50)[0] == 0.5


def test_an_owners_pages_do_not_count():
    """The nearest page of another episode is taken instead."""
    album = Album(8, 16)
    album.fill([episode([0.0, 0.1], 50), episode([0.5, 0.6], 50)])
    assert found(album, 0.0, 50, owner=1)[0] == 0.0
    assert found(album, 0.0, 50, owner=0)[0] == 0.5


def test_a_similar_scene_outweighs_a_few_centimetres():
    """Walls that differ by a tenth of the range weigh 5 cm."""
    album = Album(8, 16)
    album.fill([episode([0.0, 0.0], 50), episode([0.04, 0.04], 76), episode([0.06, 0.06], 102)])
    assert found(album, 0.0, 76) == (0.04, 76)
    assert found(album, 0.0, 50) == (0.0, 50)
    assert found(album, -0.3, 102) == (0.06, 102)


def test_thumbnails_are_means():
    """Of squares that fill the picture, for every colour."""
    image = torch.rand(2, 3, 16, 16)
    small = thumbnail(image).view(2, 3, THUMBNAIL, THUMBNAIL)
    assert torch.allclose(small[1, 2, 0, 0], image[1, 2, :2, :2].mean())
