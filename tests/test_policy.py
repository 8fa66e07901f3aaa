"""The policy: what comes out, that each input is read, and the scale head not moving the mean."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from checkpoints import BadRun, check_settings, save_part
from demos import Episode
from fit import FitConfig, fit
from instructions import INSTRUCTIONS
from policy import Policy, PolicyConfig, imitation_batches, random_shift, to_float, to_tensors
from tasks import ACTION_DIM, STATE_DIM
from vlm import LIBERO_VOCABULARY, TOKENS, FiLMConv, tokenize

SIZE, CHUNK = 32, 3


def small_policy(seed: int = 0, backbone: str = "cnn") -> Policy:
    """A policy that trains in a second."""
    torch.manual_seed(seed)
    config = PolicyConfig(backbone=backbone, size=SIZE, chunk=CHUNK, width=8, hidden=32)
    return Policy(config)


def random_batch(rows: int) -> dict[str, torch.Tensor]:
    """Rows that differ in everything."""
    generator = torch.Generator().manual_seed(0)
    texts = [INSTRUCTIONS[task][0] for task in list(INSTRUCTIONS)[:rows]]
    return {
        "image": torch.randint(0, 256, (rows, SIZE, SIZE, 3), generator=generator).to(torch.uint8),
        "state": torch.randn(rows, STATE_DIM, generator=generator),
        "tokens": tokenize(texts),
        "action": 1.8 * torch.rand(rows, CHUNK, ACTION_DIM, generator=generator) - 0.9,
    }


def test_distribution_shapes_and_ranges():
    """Mean in (-1.2, 1.2), log-scale in its range, one of each per step and dimension."""
    policy, batch = small_policy().eval(), random_batch(5)
    with torch.no_grad():
        for p in policy.scale_head.parameters():
            p.normal_(0, 10)  # far outside of the range
    mean, log_scale = policy.distribution(to_float(batch["image"]), batch["state"], batch["tokens"])
    assert mean.shape == log_scale.shape == (5, CHUNK, ACTION_DIM)
    assert mean.dtype == log_scale.dtype == torch.float32
    assert mean.abs().max() < 1.2
    config = policy.config
    assert log_scale.min().item() == pytest.approx(config.min_log_scale)
    assert log_scale.max().item() == pytest.approx(config.max_log_scale)


def test_state_statistics_normalise_the_trunk_input():
    """The same policy on scaled states with matching statistics answers the same."""
    policy, batch = small_policy().eval(), random_batch(6)
    image = to_float(batch["image"])
    plain, _ = policy.distribution(image, batch["state"], batch["tokens"])
    states = (
        0.3 * np.random.default_rng(0).standard_normal((500, STATE_DIM)).astype(np.float32) + 0.6
    )
    policy.set_state_statistics(states)
    moved = batch["state"] * policy.state_std + policy.state_mean
    assert torch.allclose(policy.state_std, torch.full((STATE_DIM,), 0.3), atol=0.05)
    shifted, _ = policy.distribution(image, moved, batch["tokens"])
    assert torch.allclose(plain, shifted, atol=1e-4)


# ----------------------------------------------------------------------------------------- learning


def overfit(policy: Policy, batch: dict, steps: int) -> float:
    """Mean L1 error on one batch after training on it alone."""
    config = FitConfig(steps=steps, learning_rate=5e-3, weight_decay=0.0, warmup=10)
    fit(policy, lambda step: batch, config)
    with torch.no_grad():
        return policy(batch)[1]["l1"]


@pytest.mark.parametrize("backbone", ["cnn", "vlm"])
def test_overfits_one_batch(backbone):
    """Random actions have an L1 error near 0.45; learned by heart they have next to none."""
    policy, batch = small_policy(backbone=backbone), random_batch(8)
    with torch.no_grad():
        assert policy(batch)[1]["l1"] > 0.3
    assert overfit(policy, batch, 300) < 0.05


def test_learns_from_the_image_alone():
    """State and words are equal in all rows: only the place of a bright spot tells the action."""
    batch = random_batch(8)
    batch["state"][:] = 0.0
    batch["tokens"][:] = batch["tokens"][0].clone()
    batch["image"][:] = 0
    for row in range(8):
        corner = 6 * (row // 3), 6 * (row % 3)
        batch["image"][row, 4 + corner[0] : 12 + corner[0], 4 + corner[1] : 12 + corner[1]] = 255
    policy = small_policy()
    policy.shift = 1  # shifts of up to 4 pixels would make neighbouring spots alike
    assert overfit(policy, batch, 400) < 0.05


def test_learns_from_the_instruction_alone():
    """Image and state are the same in all rows: only the words tell the action."""
    batch = random_batch(8)
    batch["image"][:] = batch["image"][0].clone()
    batch["state"][:] = 0.0
    assert overfit(small_policy(), batch, 400) < 0.05


def test_the_instruction_reaches_the_convolutions():
    """FiLM begins as the identity; with other weights the words change what is seen where."""
    backbone, batch = small_policy().eval().backbone, random_batch(4)
    image = to_float(batch["image"])[:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        for trained in (False, True):
            hand = torch.zeros(4, 2)
            seen = backbone(image, batch["tokens"], hand)[:, : 4 * 8]  # rows and columns
            spread = (seen - seen[:1]).abs().max()
            assert spread > 1e-3 if trained else spread < 1e-5
            for conv in backbone.convs:
                conv.film.weight.normal_(0, 0.3)


def test_film_against_the_formula():
    """SiLU((1 + gamma) norm(conv(x)) + delta), values and gradients, each picture with words of
    its own."""
    torch.manual_seed(0)
    layer, x, text = FiLMConv(3, 16, 2, 5), torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    gamma, delta = layer.film(text)[:, :, None, None].chunk(2, dim=1)
    expected = torch.nn.functional.silu(layer.norm(layer.conv(x)) * (1 + gamma) + delta)
    weights = torch.randn_like(expected)
    of_formula = torch.autograd.grad((weights * expected).sum(), list(layer.parameters()))
    found = layer(x, text)
    of_layer = torch.autograd.grad((weights * found).sum(), list(layer.parameters()))
    torch.testing.assert_close((found, *of_layer), (expected, *of_formula), rtol=1e-4, atol=1e-4)


def test_scale_head_does_not_move_the_mean():
    """The likelihood has no gradient at the mean head: it is trained by L1 regression alone."""
    policy, batch = small_policy().eval(), random_batch(6)
    policy(batch)[0].backward()
    trained = policy.mean_head.weight.grad.clone()
    assert policy.scale_head.bias.grad.abs().max() > 0
    policy.zero_grad()
    mean, _ = policy.distribution(to_float(batch["image"]), batch["state"], batch["tokens"])
    (batch["action"] - mean).abs().mean().backward()
    assert torch.allclose(trained, policy.mean_head.weight.grad, atol=1e-7)
    assert trained.abs().max() > 0


def test_scale_head_learns_the_size_of_the_error():
    """With the mean held at 0 and actions of +-0.2 the most likely Laplace scale is 0.2."""
    policy, batch = small_policy(), random_batch(8)
    batch["action"] = 0.2 * batch["action"].sign()
    for p in policy.parameters():
        p.requires_grad_(False)
    policy.mean_head.weight.zero_()
    policy.mean_head.bias.zero_()
    policy.scale_head.bias.requires_grad_(True)
    config = FitConfig(steps=300, learning_rate=5e-2, weight_decay=0.0)
    result = fit(policy, lambda step: batch, config)
    assert result["scale"] == pytest.approx(0.2, abs=0.01)


# ------------------------------------------------------------------------------------ random shifts


def test_shift_of_zero_is_identity():
    """Nothing to shift, nothing changed."""
    image = torch.rand(3, 3, 8, 8)
    shifted, moved = random_shift(image, 0)
    assert torch.equal(shifted, image) and not moved.any()


def test_random_shift_moves_whole_images():
    """Every result is one of the 9 x 9 shifts of its own image, edges repeated; shifts differ."""
    image = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    shifted, moved = random_shift(image, 4)
    assert shifted.shape == image.shape and shifted.dtype == image.dtype
    rows = torch.arange(8)
    found = set()
    for one, original, by in zip(shifted, image, moved.tolist(), strict=True):
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                picked = original[:, (rows + dy).clamp(0, 7)][:, :, (rows + dx).clamp(0, 7)]
                if torch.equal(one, picked):
                    found.add((dy, dx))
                    # Looking further down moves the content up; 8 pixels are 2 units.
                    assert by == [-dy / 4, -dx / 4]
    assert (
        len(found) == 6
    )  # probability that 6 of 81 shifts are not all different: 17 %, hence seeded


def test_shift_is_off_outside_of_training():
    """In evaluation the same batch gives the same loss."""
    policy, batch = small_policy().eval(), random_batch(4)
    assert policy(batch)[0].item() == policy(batch)[0].item()
    policy.train()
    assert policy(batch)[0].item() != policy(batch)[0].item()


# ------------------------------------------------------------------------------------- instructions


def test_every_instruction_is_fully_known_and_fits():
    """No unknown word, nothing cut off: as many tokens as words, then padding."""
    for wordings in INSTRUCTIONS.values():
        for text, ids in zip(wordings, tokenize(wordings).tolist(), strict=True):
            words = [i for i in ids if i != 0]
            assert len(ids) == TOKENS
            assert 1 not in ids, text
            assert len(words) == len(text.replace("'", " ").split())
            assert ids[len(words) :] == [0] * (TOKENS - len(words))


def test_different_instructions_have_different_tokens():
    """Different texts are different tokens, and every id is in the vocabulary."""
    texts = sorted({text for wordings in INSTRUCTIONS.values() for text in wordings})
    ids = tokenize(texts)
    assert ids.dtype == torch.int64 and ids.max() < LIBERO_VOCABULARY
    assert len({tuple(row) for row in ids.tolist()}) == len(texts)


def test_tokenizer_is_deterministic_and_marks_unknown_words():
    """The same ids every time, alone or in a batch; upper case is read; a word never seen is 1."""
    alone = tokenize(["open the drawer"])
    assert torch.equal(alone, tokenize(["press the button", "open the drawer"])[1:])
    assert torch.equal(alone, tokenize(["Open the DRAWER"]))
    unknown = tokenize(["open the spaceship"])[0].tolist()
    assert unknown[:2] == alone[0, :2].tolist() and unknown[2] == 1 and unknown[3:] == [0] * 21


# ------------------------------------------------------------------------------------------- acting


def observation(rows: int) -> dict:
    """What an environment hands to the policy."""
    batch = random_batch(rows)
    texts = tuple(INSTRUCTIONS[task][0] for task in list(INSTRUCTIONS)[:rows])
    return {"image": batch["image"].numpy(), "state": batch["state"].numpy(), "instruction": texts}


def test_act_fills_running_rows_only():
    """A resting slot gets zeros; a running one gets what it would get alone."""
    policy, seen = small_policy().eval(), observation(4)
    running = np.array([True, False, True, False])
    chunks = policy.act(seen, running)
    assert chunks.shape == (4, CHUNK, ACTION_DIM) and chunks.dtype == np.float32
    assert (chunks[~running] == 0).all()
    everyone = policy.act(seen, np.ones(4, bool))
    assert np.allclose(chunks[running], everyone[running], atol=1e-5)
    assert (everyone[~running] != 0).any()


def test_act_is_the_mean_clipped_to_the_action_range():
    """A mean of 1.2 becomes an action of 1."""
    policy, seen = small_policy().eval(), observation(2)
    with torch.no_grad():
        policy.mean_head.bias[:] = torch.tensor([50.0, -50.0, 0.0, 0.0]).repeat(CHUNK)
    running = np.ones(2, bool)
    chunks = policy.act(seen, running)
    with torch.no_grad():
        mean, _ = policy.distribution(*to_tensors(seen, running, torch.device("cpu")))
    assert (chunks[..., 0] == 1).all() and (chunks[..., 1] == -1).all()
    assert np.allclose(chunks[..., 2:], mean[..., 2:].numpy())


# ------------------------------------------------------------------------------------------ batches


def counting_episode(task: str, length: int, first_success: int | None, offset: int) -> Episode:
    """Everything at decision t carries the number offset + t, so that a wrong pairing shows."""
    count = np.arange(length + 1) + offset
    success = np.zeros(length + 1, np.uint8)
    if first_success is not None:
        success[first_success:] = 1
    return Episode(
        image=np.broadcast_to(count[:, None, None, None], (length + 1, 4, 4, 3)).astype(np.uint8),
        state=np.repeat(count[:, None], STATE_DIM, 1).astype(np.float32),
        action=np.broadcast_to(count[:-1, None, None], (length, CHUNK, ACTION_DIM)).astype(
            np.float32
        ),
        success=success,
        task=task,
        instruction=INSTRUCTIONS[task][0],
        seed=0,
        source="expert",
    )


def test_imitation_batches_pair_what_belongs_together():
    """Image, state, action and words of one decision; none after success; tasks drawn evenly."""
    episodes = [
        counting_episode("drawer-open", 6, 4, offset=0),
        counting_episode("drawer-open", 5, None, offset=20),
        counting_episode("handle-press", 3, 2, offset=100),
    ]
    sample = imitation_batches(episodes, batch=200, seed=0)
    words = {
        task: {tuple(t) for t in tokenize(INSTRUCTIONS[task]).tolist()} for task in INSTRUCTIONS
    }
    seen, handle, wordings = set(), 0, set()
    for step in range(5):
        batch = sample(step)
        assert batch["image"].shape == (200, 4, 4, 3) and batch["image"].dtype == torch.uint8
        for row in range(200):
            number = int(batch["state"][row, 0])
            assert (batch["image"][row] == number).all() and (batch["action"][row] == number).all()
            tokens = tuple(batch["tokens"][row].tolist())
            assert tokens in words["handle-press" if number >= 100 else "drawer-open"]
            seen.add(number)
            wordings.add(tokens)
            handle += number >= 100
    assert seen == {0, 1, 2, 3} | {20, 21, 22, 23, 24} | {100, 101}
    assert len(wordings) == 6
    # 1000 fair draws, 5 standard deviations: false-alarm probability 6e-7 (and seeded)
    assert abs(handle - 500) < 5 * np.sqrt(250)


def test_narrow_convolutions_answer_alike_and_are_a_setting(tmp_path):
    """The same keypoints' shape from fewer weights. A checkpoint from before there was the setting
    has wide ones, and is not taken for a narrow policy's, nor the other way round."""
    wide = small_policy()
    torch.manual_seed(0)
    narrow = Policy(replace(wide.config, narrow=True))
    batch = random_batch(3)
    tensors = to_float(batch["image"]), batch["state"], batch["tokens"]
    for policy in (wide, narrow):
        mean, _ = policy.eval().distribution(*tensors)
        assert mean.shape == (3, CHUNK, ACTION_DIM)
    channels = [conv.conv.out_channels for conv in narrow.backbone.convs]
    assert channels == [8, 8, 8, 16]
    assert [conv.conv.out_channels for conv in wide.backbone.convs] == [8, 16, 16, 16]
    old, path = asdict(wide.config), tmp_path / "policy.safetensors"
    del old["narrow"]
    save_part(path, wide, old)
    check_settings(path, asdict(wide.config))
    with pytest.raises(BadRun, match="narrow"):
        check_settings(path, asdict(narrow.config))
    save_part(path, narrow, asdict(narrow.config))
    with pytest.raises(BadRun, match="narrow"):
        check_settings(path, asdict(wide.config))
