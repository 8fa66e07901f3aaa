"""Recorded steps as episodes, without the packages that the formats themselves need."""

import numpy as np
import pytest

import recordings
from demos import BadEpisodes
from recordings import Recording, aligned, fitted, in_chunks, success_flags, to_episode


def test_actions_lie_between_the_frames():
    """N - 1 of N actions have a frame on both sides; a flag belongs to the frame after it."""
    action, flags = np.arange(4)[:, None], np.array([0, 0, 1, 0])
    between, labels = aligned(action, flags, "after")
    assert between.ravel().tolist() == [1, 2, 3] and labels.tolist() == [0, 0, 1, 0]
    between, labels = aligned(action, flags, "before")
    assert between.ravel().tolist() == [0, 1, 2] and labels.tolist() == [0, 0, 0, 1]
    assert aligned(action, np.array([0, 0, 0, 1]), "before")[1].tolist() == [0, 0, 0, 1]
    assert aligned(action, None, "after")[1].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_chunks_against_a_loop(count):
    """Every action once and in order; what is missing in the last chunk repeats the last."""
    action = np.arange(count)[:, None]
    chunks, at = in_chunks(action, 4)
    seen = []
    for chunk, first, last in zip(chunks, at, at[1:]):
        seen += chunk.ravel().tolist()[: last - first]
        assert all(value == last - 1 for value in chunk.ravel()[last - first :])
    assert seen == list(range(count)) and at[0] == 0 and at[-1] == count


def test_dense_rewards_say_nothing_of_success():
    assert success_flags({"rewards": np.array([0.1, 0.7]), "dones": np.array([0, 1])})[1] == 1
    assert success_flags({"rewards": np.array([-1.0, -0.5])}) is None
    assert success_flags({}) is None


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("upside_down", [False, True])
def test_a_picture_of_the_right_size_keeps_every_bit(upside_down, mirrored):
    """Only rows and columns change places; an oblong one loses its sides."""
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    got = fitted(image, Recording("before", upside_down, mirrored, size=32))
    rows, columns = (-1 if upside_down else 1), (-1 if mirrored else 1)
    assert np.array_equal(got, image[::rows, 4:36][:, ::columns])


@pytest.mark.parametrize(
    "state, action, words, told",
    [
        (0, 7, {}, r"states \[5, 0\]"),
        (8, 0, {}, r"actions \[5, 0\]"),
        (8, 7, {"task": "\ud800"}, "task is"),
        (8, 7, {"instruction": "\udcff"}, "instruction is"),
        (8, 7, {"seed": 2**63}, "seed is"),
        (8, 7, {"source": "dreamt"}, "source is"),
    ],
)
def test_steps_and_words_that_nothing_can_be_made_of(state, action, words, told):
    """One line, before a picture is looked at."""
    arrays = (np.zeros((5, state)), np.zeros((5, action)), None)
    words = {"task": "pick", "instruction": "pick it", "seed": 0} | words
    with pytest.raises(BadEpisodes, match=f"^here: .*{told}.*[;,] expected"):
        to_episode("here", None, *arrays, Recording("after", False), **words)


def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match=r"no_such_package.*requirements-data\.txt"):
        recordings.package("no_such_package")


def test_conventions_are_those_of_the_formats():
    """The original LIBERO files, and LeRobot's definition of a frame."""
    hdf5, lerobot = (Recording(**recordings.CONVENTIONS[kind]) for kind in ("hdf5", "lerobot"))
    assert (hdf5.recorded, hdf5.upside_down) == ("after", True)
    assert (lerobot.recorded, lerobot.upside_down) == ("before", False)
