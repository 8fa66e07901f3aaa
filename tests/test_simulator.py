"""The world simulator: what it remembers, what it draws, its kinematics, and that it learns."""

import numpy as np
import pytest
import torch

from demos import Episode
from fit import FitConfig, fit
from simulator import (
    MEMORY,
    SHARPNESS,
    SOURCES,
    Simulator,
    SimulatorConfig,
    folded,
    memory_indices,
    transition_batches,
)
from tasks import ACTION_DIM, STATE_DIM, Camera

SIZE, CHUNK = 32, 2
# One metre above the origin, looking straight down (columns of the rotation: right, up, backward).
CAMERA = Camera((0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), 60.0, SIZE)


def small_simulator(seed: int = 0, sampling_steps: int = 1) -> Simulator:
    """A U-Net that trains in seconds."""
    torch.manual_seed(seed)
    config = SimulatorConfig(
        size=SIZE, chunk=CHUNK, channels=(32, 32, 32), sampling_steps=sampling_steps, album=4
    )
    return Simulator(config, CAMERA)


def moving_square(rows: int) -> dict[str, torch.Tensor]:
    """A bright square that jumps somewhere else in every row, over a fixed random background."""
    generator = torch.Generator().manual_seed(0)
    background = torch.randint(60, 120, (SIZE, SIZE, 3), generator=generator).to(torch.uint8)
    memory = background.expand(rows, MEMORY, SIZE, SIZE, 3).clone()
    following = background.expand(rows, SIZE, SIZE, 3).clone()
    for row in range(rows):
        memory[row, :, 12:18, 12:18] = 230
        following[row, 3 * row : 3 * row + 6, 4:10] = 230
    return {
        "memory": memory,
        "next": following,
        "state": 0.2 * torch.randn(rows, STATE_DIM, generator=generator),
        "next_state": 0.2 * torch.randn(rows, STATE_DIM, generator=generator),
        "action": 2 * torch.rand(rows, CHUNK, ACTION_DIM, generator=generator) - 1,
        "owner": torch.arange(rows),
    }


def imagine(simulator: Simulator, batch: dict, seed: int = 0) -> torch.Tensor:
    """The next frames of a batch, drawn with a generator of its own."""
    return simulator.next_frame(
        batch["memory"],
        batch["state"],
        batch["next_state"],
        batch["action"],
        generator=torch.Generator().manual_seed(seed),
    )


def squared_error(frames: torch.Tensor, batch: dict) -> float:
    """Mean squared error against the true next frame, in grey levels squared."""
    return ((frames.float() - batch["next"].float()) ** 2).mean().item()


# ------------------------------------------------------------------------------------------- memory


def test_memory_reaches_back_to_the_first_frame():
    """Newest first: now, one before, half-way back, the beginning."""
    assert memory_indices(0) == [0, 0, 0, 0]
    assert memory_indices(1) == [1, 0, 0, 0]
    assert memory_indices(9) == [9, 8, 4, 0]
    assert len(memory_indices(3)) == MEMORY


def test_transition_batches_pair_what_belongs_together():
    """Memory, next frame, states and action of one decision; tasks drawn evenly."""
    episodes = []
    for number, task in enumerate(("drawer-open", "drawer-open", "handle-press")):
        count = np.arange(6) + 20 * number
        episodes.append(
            Episode(
                image=np.broadcast_to(count[:, None, None, None], (6, 4, 4, 3)).astype(np.uint8),
                state=np.repeat(count[:, None], STATE_DIM, 1).astype(np.float32),
                action=np.broadcast_to(count[:-1, None, None], (5, CHUNK, ACTION_DIM)).astype(
                    np.float32
                ),
                success=np.zeros(6, np.uint8),
                task=task,
                instruction="",
                seed=number,
                source="expert",
            )
        )
    sample = transition_batches(episodes, batch=500, seed=0)
    batch = sample(0)
    assert batch["memory"].dtype == batch["next"].dtype == torch.uint8
    now = batch["state"][:, 0].long()
    first, time = 20 * (now // 20), now % 20
    remembered = batch["memory"][:, :, 0, 0, 0].long()
    expected = [first + time, first + (time - 1).clamp(min=0), first + time // 2, first]
    assert torch.equal(remembered, torch.stack(expected, dim=1))
    assert torch.equal(batch["next"][:, 0, 0, 0].long(), now + 1)
    assert torch.equal(batch["next_state"][:, 0].long(), now + 1)
    assert (batch["action"] == now[:, None, None]).all()
    assert torch.equal(batch["owner"], now // 20)
    assert set(now.tolist()) == {20 * e + t for e in range(3) for t in range(5)}
    # 500 fair draws, 5 standard deviations: false-alarm probability 6e-7 (and seeded)
    assert abs((now >= 40).sum().item() - 250) < 5 * np.sqrt(125)


# --------------------------------------------------------------------------------------- action map


def test_action_map_peaks_at_the_projected_pixels():
    """Channel 0 marks the current hand, channel 1 the next one, at the pixels of Camera.project."""
    simulator = small_simulator()
    state = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.2, -0.1, 0.1, 0.5]])
    next_state = torch.tensor([[0.1, 0.2, 0.0, 1.0], [-0.2, 0.1, 0.3, 0.25]])
    drawn = simulator.action_map(state, next_state)
    assert drawn.shape == (2, 3, SIZE, SIZE) and drawn.min() >= 0 and drawn.max() <= 1
    for channel, pose in ((0, state), (1, next_state)):
        for row in range(2):
            column_row = CAMERA.project(pose[row, :3].numpy())
            peak = np.unravel_index(int(drawn[row, channel].argmax()), (SIZE, SIZE))
            assert np.abs(np.array(peak[::-1]) + 0.5 - column_row).max() <= 0.5 + 1e-4
            assert drawn[row, channel].max() > 0.75
    assert torch.allclose(drawn[:, 2], drawn[:, 1] * next_state[:, 3, None, None])


def test_action_map_outside_of_the_view_is_black():
    """A hand far beside the picture leaves no mark."""
    far = torch.tensor([[5.0, 0.0, 0.0, 1.0]])
    assert small_simulator().action_map(far, far).max() < 1e-6


# ---------------------------------------------------------------------------------------- imagining


def test_frames_have_the_shape_and_type_of_real_ones():
    """(B, H, W, 3) uint8, with 1 and 4 sampling steps, reference tokens given or not."""
    batch = moving_square(3)
    for steps in (1, 4):
        simulator = small_simulator(sampling_steps=steps).eval()
        frames = imagine(simulator, batch)
        assert frames.shape == (3, SIZE, SIZE, 3) and frames.dtype == torch.uint8
        first = batch["memory"][:, -1].permute(0, 3, 1, 2).float() / 255 - 0.5
        again = simulator.next_frame(
            batch["memory"],
            batch["state"],
            batch["next_state"],
            batch["action"],
            simulator.first_look(first),
            torch.Generator().manual_seed(0),
        )
        assert torch.equal(frames, again)


def test_the_generator_alone_decides_the_noise():
    """With four steps the same seed gives the same frames, another seed others; with one step
    sampling starts from the mean of the noise, and no seed matters."""
    batch = moving_square(3)
    four = small_simulator(sampling_steps=4).eval()
    assert torch.equal(imagine(four, batch, 1), imagine(four, batch, 1))
    assert not torch.equal(imagine(four, batch, 1), imagine(four, batch, 2))
    one = small_simulator().eval()
    assert torch.equal(imagine(one, batch, 1), imagine(one, batch, 2))


def test_no_predicted_change_repeats_the_frame():
    """What the network outputs is the *change*: zero gives the newest frame of the memory."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    batch["memory"][:, 1:] = 0  # only the newest is copied
    simulator._denoise = lambda x, *conditions: torch.zeros_like(x)
    assert torch.equal(imagine(simulator, batch), batch["memory"][:, 0])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (5, 4, 3, 16, 8)])
@pytest.mark.parametrize("fold", [1, 2, 4])
def test_folding_is_torchs_pixel_unshuffle(shape, fold):
    """The same numbers in the same places."""
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(folded(image, fold), torch.nn.functional.pixel_unshuffle(image, fold))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_perfect_network_gives_the_perfect_frame(steps):
    """A network that answers with the true x_0 is sampled to the true next frame."""
    simulator, batch = small_simulator(sampling_steps=steps).eval(), moving_square(2)
    change = (batch["next"].float() - batch["memory"][:, 0].float()).permute(0, 3, 1, 2) / 255
    scale, fold = simulator.config.change_scale, simulator.config.fold
    target = torch.nn.functional.pixel_unshuffle(scale * change, fold)
    simulator._denoise = lambda x, *conditions: target
    assert torch.equal(imagine(simulator, batch), batch["next"])


def test_the_loss_of_a_perfect_network_is_zero():
    """Training asks for the same x_0 that sampling turns into frames."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    change = (batch["next"].float() - batch["memory"][:, 0].float()).permute(0, 3, 1, 2) / 255
    scale, fold = simulator.config.change_scale, simulator.config.fold
    target = torch.nn.functional.pixel_unshuffle(scale * change, fold)
    simulator._denoise = lambda x, *conditions: target
    assert simulator(batch)[0].item() < 1e-10
    simulator._denoise = lambda x, *conditions: torch.zeros_like(x)
    assert simulator(batch)[0].item() > 0.1


def scripted_unet(simulator: Simulator, choice: int, painted: float) -> None:
    """Replace the U-Net: every pixel paints `painted` and chooses `choice` (0 paints, m copies)."""
    fold, side = simulator.config.fold, SIZE // simulator.config.fold

    class Answer(torch.nn.Module):
        def forward(self, inputs, time, encoder_hidden_states, class_labels):
            output = torch.zeros(len(inputs), 3 + 1 + SOURCES, SIZE, SIZE)
            output[:, :3] = painted
            output[:, 3 + choice] = 50.0
            folded = torch.nn.functional.pixel_unshuffle(output, fold)
            assert folded.shape[2:] == (side, side)
            return type("Output", (), {"sample": folded})

    simulator.unet = Answer()


@pytest.mark.parametrize("which", range(MEMORY))
def test_a_remembered_frame_can_be_copied(which):
    """Choosing memory frame m gives exactly that frame: its change against the newest is added."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    batch["memory"] = torch.stack([batch["memory"][:, 0] // (m + 1) for m in range(MEMORY)], dim=1)
    scripted_unet(simulator, choice=1 + which, painted=3.0)
    assert torch.equal(imagine(simulator, batch), batch["memory"][:, which])


def test_what_moves_with_the_hand_can_be_carried_along():
    """The carried frame is the current one, moved as far as the hand is seen to move."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    scripted_unet(simulator, choice=1 + MEMORY, painted=3.0)
    # At a depth of one metre a pixel is this wide; row and column grow down and to the left.
    pixel = float(np.tan(np.radians(30.0)) / (SIZE / 2))
    batch["state"][:] = 0.0
    batch["next_state"] = batch["state"].clone()
    batch["next_state"][1, :2] = torch.tensor([2 * pixel, -3 * pixel])
    column, row = (CAMERA.project(batch["next_state"][1, :3].numpy()) - SIZE / 2).round()
    assert {abs(column), abs(row)} == {2, 3}
    frames, before = imagine(simulator, batch), batch["memory"][:, 0]
    assert torch.equal(frames[0], before[0])
    expected = before[1].roll((int(row), int(column)), (0, 1))
    assert torch.equal(frames[1, 4:-4, 4:-4], expected[4:-4, 4:-4])  # away from the borders


def test_a_frame_of_the_album_can_be_copied():
    """The page of the nearest hand, moved to where the hand will be: here it is there already."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    scripted_unet(simulator, choice=2 + MEMORY, painted=3.0)
    simulator.album.frames[:2] = batch["next"]
    simulator.album.states[:2] = batch["next_state"]
    assert torch.equal(imagine(simulator, batch), batch["next"])


def test_training_never_shows_the_frame_that_is_asked_for():
    """Pages of the row's own episode do not count."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    scripted_unet(simulator, choice=2 + MEMORY, painted=3.0)
    simulator.album.frames[:2] = batch["next"]
    simulator.album.states[:2] = batch["next_state"]
    assert simulator(batch)[0].item() < 1e-8  # nobody owns the pages
    simulator.album.owners[:2] = torch.tensor([0, 1])
    assert simulator(batch)[0].item() > 0.1


def test_a_painted_change_is_added_to_the_newest_frame():
    """Choosing to paint p moves every pixel by p / change_scale."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    scripted_unet(simulator, choice=0, painted=0.04 * simulator.config.change_scale)
    change = imagine(simulator, batch).int() - batch["memory"][:, 0].int()
    assert change.unique().tolist() == [10]  # 0.04 of 255


def test_overfits_one_batch():
    """After training on four transitions it imagines them far better than a repeated frame.

    All four begin with the same picture, so it can only tell them apart by action and states.
    """
    simulator, batch = small_simulator(), moving_square(4)
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    copied = squared_error(batch["memory"][:, 0], batch)
    assert squared_error(imagine(simulator.eval(), batch), batch) > 0.5 * copied
    fit(simulator, lambda step: twice, FitConfig(steps=150, learning_rate=2e-3, warmup=10))
    assert squared_error(imagine(simulator, batch), batch) < 0.15 * copied


def denoised(simulator, noisy, time, memory, state, next_state, action, tokens):
    """The network's x_0 from the conditions as a batch or a dream has them."""
    scene = simulator.album.scene_distance(memory[:, -1])
    conditions = simulator.conditions(memory, state, next_state, action, scene)
    return simulator._denoise(noisy, time, *conditions, tokens)


def test_the_folded_mixture_is_that_of_pixels():
    """A slow twin: unfold the U-Net's output, mix paint and sources pixel by pixel, fold again."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    memory = batch["memory"].float().movedim(-1, -3) / 255 - 0.5
    states = batch["state"], batch["next_state"], batch["action"]
    tokens, noisy, time = torch.randn(2, 16, 64), torch.randn(2, 48, 8, 8), torch.tensor([999, 999])
    fold, scale = simulator.config.fold, simulator.config.change_scale
    with torch.no_grad():
        scene = simulator.album.scene_distance(memory[:, -1])
        sources, drawn, vector = simulator.conditions(memory, *states, scene)
        inputs = torch.cat([noisy, sources.flatten(1, 2), drawn], dim=1)
        output = simulator.unet(
            inputs, time, encoder_hidden_states=tokens, class_labels=vector
        ).sample
        pixels = torch.nn.functional.pixel_shuffle(output, fold)
        weight = (SHARPNESS * pixels[:, 3:]).softmax(dim=1)
        frames = torch.nn.functional.pixel_shuffle(sources, fold)  # (B, M+2, 3, H, W)
        assert torch.allclose(frames[:, :MEMORY], memory)
        change = weight[:, :1] * pixels[:, :3]
        for m in range(SOURCES):
            change += weight[:, 1 + m : 2 + m] * scale * (frames[:, m] - frames[:, 0])
        expected = torch.nn.functional.pixel_unshuffle(change, fold)
        x_0 = simulator._denoise(noisy, time, sources, drawn, vector, tokens)
    assert torch.allclose(x_0, expected, atol=1e-5)


def test_the_frame_depends_on_every_condition():
    """Memory, states, action and reference tokens all reach the output of the network."""
    simulator, batch = small_simulator().eval(), moving_square(2)
    inputs = {
        "memory": batch["memory"].float().movedim(-1, -3) / 255,
        "state": batch["state"].clone(),
        "next_state": batch["next_state"].clone(),
        "action": batch["action"].clone(),
        "tokens": torch.randn(2, 16, 64),
    }
    noisy, time = torch.randn(2, 48, 8, 8), torch.tensor([999, 999])
    with torch.no_grad():
        plain = denoised(simulator, noisy, time, **inputs)
        for name in inputs:
            changed = denoised(simulator, noisy, time, **{**inputs, name: inputs[name] + 0.3})
            assert (changed - plain).abs().max() > 1e-4, name


@pytest.mark.parametrize("wrong", [{"sampling_steps": 0}, {"size": 40}])
def test_impossible_settings_are_refused(wrong):
    """With what was got and what was expected."""
    with pytest.raises(ValueError, match="SimulatorConfig"):
        SimulatorConfig(**wrong)
