"""Every part computes where it was put: checked without a GPU, on torch's "meta" device.

A meta tensor has a shape and a dtype and no numbers, and mixing it with a tensor of the processor
fails as mixing two real devices does. So a `.to(device)` that is missing somewhere is found on any
machine. What reads numbers (`.item()`, numpy) is out of reach here and tested on the processor.
"""

import pytest
import torch

from camera import Camera
from kinematics import motion_at_rest
from policy import Policy, PolicyConfig, to_float
from reflector import Reflector, ReflectorConfig, stack_frames
from simulator import Simulator, SimulatorConfig
from tasks import ACTION_DIM, STATE_DIM
from vlm import TOKENS

OTHER = torch.device("meta")
CAMERA = Camera((0.7, 0.1, 0.7), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), 42.0, 64)
B = 3


@pytest.fixture(autouse=True)
def without_llavas_own_check(monkeypatch):
    """LLaVA counts its image tokens, which reads numbers."""
    from transformers.models.llava import modeling_llava

    monkeypatch.setattr(modeling_llava, "torch_compilable_check", lambda *_: None)


def frames(*shape: int, device="cpu") -> torch.Tensor:
    """uint8 pictures as they come from memory or disk."""
    return torch.zeros((*shape, 64, 64, 3), dtype=torch.uint8, device=device)


@pytest.mark.parametrize("backbone", ["cnn", "vlm"])
def test_policy_computes_on_its_device(backbone):
    """Mean and log-scale come out where the policy is."""
    policy = Policy(PolicyConfig(backbone=backbone)).to(OTHER).eval()
    tokens = torch.ones((B, TOKENS), dtype=torch.int64, device=OTHER)
    state = torch.zeros((B, STATE_DIM), device=OTHER)
    mean, log_scale = policy.distribution(to_float(frames(B, device=OTHER)), state, tokens)
    assert mean.device == log_scale.device == OTHER
    with pytest.raises(Exception, match="device"):  # the check itself works
        policy.distribution(to_float(frames(B)), state, tokens)


def test_pretrained_policy_computes_on_its_device(tmp_path, monkeypatch):
    """LLaVA's: pictures, words, placeholders, heads. (Words come from the numbers
    of tokens and so are scripted; the frozen reflector compares pictures by their numbers and Qwen
    reads its grid, so both are out of reach here.)"""
    import contextlib

    from test_pretrained import large, save_tiny

    import pretrained

    # There is no autocast for this device, not even to turn it off.
    monkeypatch.setattr(pretrained, "bf16_autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(pretrained, "words", lambda tokens: ["open the drawer"] * len(tokens))
    save_tiny(tmp_path, "llava")
    config = PolicyConfig(backbone="pretrained", pretrained=large(tmp_path))
    policy = Policy(config).to(OTHER).eval()
    policy.backbone.vlm.model.set_attn_implementation("eager")  # the other looks into its mask
    tokens = torch.ones((B, TOKENS), dtype=torch.int64, device=OTHER)
    state = torch.zeros((B, STATE_DIM), device=OTHER)
    mean, log_scale = policy.distribution(to_float(frames(B, device=OTHER)), state, tokens)
    assert mean.device == log_scale.device == OTHER


def test_reflector_takes_frames_from_anywhere():
    """`reward` moves frames and tokens itself; R comes out where the reflector is."""
    reflector = Reflector(ReflectorConfig()).to(OTHER).eval()
    tokens, state = torch.ones((B, TOKENS), dtype=torch.int64), torch.zeros((B, STATE_DIM))
    assert reflector.reward(frames(B, 3), tokens, state).device == OTHER
    inputs = (stack_frames(frames(B, 3)), tokens, state)
    logits = reflector.logits(*(x.to(OTHER) for x in inputs))
    assert logits.device == OTHER


def test_simulator_computes_on_its_device():
    """Kinematics, tokens, action map, sources, denoising."""
    simulator = Simulator(SimulatorConfig(), CAMERA).to(OTHER).eval()
    state, action = torch.zeros((B, STATE_DIM)), torch.zeros((B, 4, ACTION_DIM))
    motion = motion_at_rest(state)
    now = (x.to(OTHER) for x in (state, motion, action))
    assert simulator.kinematics.smooth(*now).device == OTHER  # the forest computes in numpy
    tokens, scene = simulator.first_look(torch.zeros((B, 3, 64, 64)))
    assert tokens.device == OTHER
    memory = torch.zeros((B, 4, 3, 64, 64), device=OTHER)
    noisy = torch.zeros((B, 48, 16, 16), device=OTHER)
    time = torch.zeros((B,), dtype=torch.int64, device=OTHER)
    conditions = (x.to(OTHER) for x in (state, state, action))
    conditions = simulator.conditions(memory, *conditions, scene)
    assert simulator._denoise(noisy, time, *conditions, tokens).device == OTHER


def test_latents_compute_on_their_device(tmp_path, monkeypatch):
    """Encoding, denoising, decoding. (The frozen encoders compare pictures by their numbers, so
    they are out of reach here.)"""
    import contextlib

    from test_latents import models, save_tiny

    import latents

    # There is no autocast for this device, not even to turn it off.
    monkeypatch.setattr(latents, "in_float32", lambda x: contextlib.nullcontext())
    save_tiny(tmp_path, "AutoencoderKL")
    parts = models({"tiny": tmp_path}, "tiny", "", "", "")
    config = SimulatorConfig(fold=1, channels=(32, 32), pretrained=parts)
    simulator = Simulator(config, CAMERA).to(OTHER).eval()
    state, action = torch.zeros((B, STATE_DIM)), torch.zeros((B, 4, ACTION_DIM))
    tokens, scene = simulator.first_look(torch.zeros((B, 3, 64, 64)))
    memory = torch.zeros((B, 4, 3, 64, 64), device=OTHER)
    noisy = torch.zeros((B, 4, 16, 16), device=OTHER)
    time = torch.zeros((B,), dtype=torch.int64, device=OTHER)
    conditions = (x.to(OTHER) for x in (state, state, action))
    conditions = simulator.conditions(memory, *conditions, scene)
    change = simulator._denoise(noisy, time, *conditions, tokens)
    assert change.device == OTHER and change.shape == noisy.shape
    assert simulator.frames.decode(change).device == OTHER
