"""Where the hand is seen, and keypoints from there."""

import numpy as np
import torch

from camera import Camera
from tasks import STATE_DIM
from view import HandInView, from_the_hand

# Turned by 30 degrees about its line of sight, 42 degrees wide.
C, S = np.cos(np.pi / 6), np.sin(np.pi / 6)
CAMERA = Camera((0.3, 0.1, 1.0), (C, -S, 0.0, S, C, 0.0, 0.0, 0.0, 1.0), 42.0, 64)


def test_the_hand_is_seen_where_the_camera_projects_it():
    """Row and column of `Camera.project`, scaled to [-1, 1]."""
    state = torch.randn(20, STATE_DIM, generator=torch.Generator().manual_seed(0)) * 0.2
    view = HandInView()
    view.look_through(CAMERA)
    column, row = CAMERA.project(state[:, :3].numpy()).T
    expected = np.stack([row, column], axis=1) / 32 - 1
    assert np.abs(view(state).numpy() - expected).max() < 1e-5


def test_the_projection_stays_in_float32():
    """Under autocast to bfloat16 the hand is where it was, bit by bit, on every processor."""
    state = torch.randn(20, STATE_DIM, generator=torch.Generator().manual_seed(0)) * 0.2
    view = HandInView()
    view.look_through(CAMERA)
    with torch.autocast("cpu", torch.bfloat16):
        seen = view(state)
    assert torch.equal(seen, view(state))


def test_without_a_camera_the_hand_is_in_the_middle():
    """So that an untrained part computes something finite."""
    assert not HandInView()(torch.randn(5, STATE_DIM)).any()


def test_keypoints_from_the_hand_do_not_change_when_all_is_shifted():
    """Rows and columns move with the picture, and so does the hand."""
    where, hand = torch.rand(4, 6), torch.rand(4, 2)
    moved = torch.tensor([[0.25, -0.5]]).expand(4, 2)
    shifted = where + torch.cat([moved[:, :1].expand(4, 3), moved[:, 1:].expand(4, 3)], dim=1)
    assert torch.allclose(from_the_hand(where, hand), from_the_hand(shifted, hand + moved))
    at_the_hand = torch.cat([hand[:, :1].expand(4, 3), hand[:, 1:].expand(4, 3)], dim=1)
    assert not from_the_hand(at_the_hand, hand).any()
