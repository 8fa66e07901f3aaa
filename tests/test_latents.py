"""Pretrained parts of the simulator: tiny checkpoints of the real architectures, in the hub's
format, by path."""

import json
import re
from collections import namedtuple
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_simulator import (
    CAMERA,
    CHUNK,
    SIZE,
    denoised,
    imagine,
    moving_square,
    squared_error,
)

import cli
import latents
import pretrained
import runs
from checkpoints import load_part, save_part, used
from fit import FitConfig, fit
from latents import Encoder, Latents, SimulatorModels, check_models, check_part
from pretrained import FINGERPRINT, BadCheckpoint
from simulator import MEMORY, SOURCES, Simulator, SimulatorConfig
from tasks import EnvConfig, Start
from worldenv import NoReflector, WorldEnv

FACTOR, CHANNELS = 4, 4  # of the tiny autoencoders: 32 pixels are 8 x 8 latents
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.3, 0.25]}


# ------------------------------------------------------------------------------- tiny checkpoints


def tiny_autoencoder(kind: str, width: int = 8):
    """Three blocks, so a latent is 4 pixels wide."""
    import diffusers

    if kind == "AutoencoderTiny":
        blocks, depth = (width,) * 3, (1, 1, 1)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=blocks, decoder_block_out_channels=blocks,
            num_encoder_blocks=depth, num_decoder_blocks=depth,
        )  # fmt: skip
    return diffusers.AutoencoderKL(
        block_out_channels=(width,) * 3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=CHANNELS,
        scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip


def tiny_unet(**settings):
    """As Stable Diffusion's, but small: cross-attention first, 4 channels in and out."""
    import diffusers

    usual = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4, "norm_num_groups": 8, "cross_attention_dim": 24,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**usual | settings)


def tiny_encoder(kind: str):
    """One layer of width 16."""
    import transformers as hf

    body = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind.startswith("clip"):
        sizes = body | {"intermediate_size": 32}
        vision = sizes | {"image_size": 32, "patch_size": 8}
        words = sizes | {"vocab_size": 50, "eos_token_id": 2}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=words, vision_config=vision))
        return model if kind == "clip" else model.vision_model
    body |= {"image_size": 224, "patch_size": 56, "mlp_ratio": 2}
    if kind == "dinov2":
        return hf.Dinov2Model(hf.Dinov2Config(**body))
    if kind == "dinov3_vit":
        return hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**body | {"intermediate_size": 32, "num_register_tokens": 4})
        )
    backbone = hf.Dinov2Config(
        **body, out_features=["stage1"], reshape_hidden_states=False, apply_layernorm=True
    )
    return hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(
            backbone_config=backbone, patch_size=56, reassemble_hidden_size=16,
            reassemble_factors=[1], neck_hidden_sizes=[8], fusion_hidden_size=8,
        )
    )  # fmt: skip


ENCODERS = {  # and the part that each can be
    "clip": "clip", "clip_vision_model": "clip",
    "dinov2": "geometry", "dinov3_vit": "geometry", "depth_anything": "geometry",
}  # fmt: skip


def save_tiny(folder, kind: str):
    """A checkpoint as the hub has it; returns the model."""
    torch.manual_seed(0)
    if kind.startswith("Autoencoder"):
        model = tiny_autoencoder(kind)
    elif kind == "unet":
        model = tiny_unet()
    else:
        model = tiny_encoder(kind)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(STATISTICS))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """{kind: folder}."""
    root = tmp_path_factory.mktemp("hub")
    kinds = ("AutoencoderKL", "AutoencoderTiny", "unet", *ENCODERS)
    for kind in kinds:
        save_tiny(root / kind, kind)
    return {kind: root / kind for kind in kinds}


def models(hub, autoencoder="AutoencoderKL", unet="unet", clip="clip", geometry="depth_anything"):
    """Those of the kinds named; "" is none."""
    chosen = {"autoencoder": autoencoder, "unet": unet, "clip": clip, "geometry": geometry}
    return SimulatorModels(**{part: str(hub[kind]) for part, kind in chosen.items() if kind})


def latent_simulator(parts: SimulatorModels, seed: int = 0, **settings) -> Simulator:
    """For the pictures of test_simulator; levels for 8 x 8 latents."""
    torch.manual_seed(seed)
    usual = {"size": SIZE, "chunk": CHUNK, "fold": 1, "channels": (16, 16), "album": 4}
    config = SimulatorConfig(**usual | {"change_scale": 1.0} | settings, pretrained=parts)
    return Simulator(config, CAMERA)


def to_frames(pictures: torch.Tensor) -> torch.Tensor:
    """As `next_frame` rounds them."""
    return ((pictures + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_float(frames: torch.Tensor) -> torch.Tensor:
    return frames.movedim(-1, -3).float() / 255 - 0.5


KINDS = ["AutoencoderKL", "AutoencoderTiny"]


# ---------------------------------------------------------------------------------- autoencoders


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_autoencoders_own(hub, kind):
    """Against the library's model: pictures in [-1, 1], the mean of a distribution, scale and
    shift; any number of leading axes; few pictures at a time."""
    coder, own = Latents(str(hub[kind])), save_tiny(hub[kind], kind)
    frames = torch.rand(2, 3, 3, SIZE, SIZE) - 0.5
    coder.rows = 4
    z = coder.encode(frames)
    assert z.shape == (2, 3, CHANNELS, SIZE // FACTOR, SIZE // FACTOR)
    with torch.no_grad():
        output = own.encode(2 * frames.flatten(0, 1))
        if kind == "AutoencoderKL":
            theirs = 0.5 * (output.latent_dist.mean - 0.1)
            back = own.decode(theirs / 0.5 + 0.1).sample / 2
        else:
            theirs = output.latents
            back = own.decode(theirs).sample / 2
    assert torch.allclose(z.flatten(0, 1), theirs, atol=1e-5)
    assert torch.allclose(coder.decode(z[0]), back[:3], atol=1e-5)


def test_older_names_of_attention_are_understood(hub, tmp_path):
    """As in the files of Stable Diffusion's autoencoders: query, key, value, proj_attn."""
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, "AutoencoderKL")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    older, names = {}, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, weight in load_file(path).items():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        older[name] = weight
    assert sum("proj_attn" in name for name in older) == 4
    save_file(older, path, metadata={"format": "pt"})
    frames = torch.rand(2, 3, SIZE, SIZE) - 0.5
    new = Latents(str(hub["AutoencoderKL"])).encode(frames)
    assert torch.equal(Latents(str(tmp_path)).encode(frames), new)


def test_training_lowers_the_loss_on_latents(hub):
    """Four transitions that differ in states and action only; the autoencoder stays as it is."""
    simulator = latent_simulator(models(hub, unet="", clip="", geometry=""))
    batch = moving_square(4)
    before = [p.clone() for p in simulator.frames.parameters()]
    with torch.no_grad():
        first = simulator.eval()(batch)[0].item()
    fit(simulator, lambda step: batch, FitConfig(steps=30, learning_rate=4e-3, warmup=5, ema=0.8))
    with torch.no_grad():
        assert simulator(batch)[0].item() < 0.6 * first
    for weight, old in zip(simulator.frames.parameters(), before, strict=True):
        assert weight.grad is None and not weight.requires_grad and torch.equal(weight, old)


def test_overfits_one_batch_in_latents(tmp_path):
    """With an autoencoder that knows these pictures it imagines the next frames nearly as well as
    that can show them, and far better than a repeated frame."""
    torch.manual_seed(0)
    coder, batch = tiny_autoencoder("AutoencoderTiny", 16), moving_square(4)
    frames = 2 * to_float(torch.cat([batch["memory"][:1, 0], batch["next"]]))
    optimizer = torch.optim.Adam(coder.parameters(), 3e-3)
    for _ in range(200):
        loss = F.mse_loss(coder.decode(coder.encode(frames).latents).sample, frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    coder.save_pretrained(tmp_path)
    simulator = latent_simulator(SimulatorModels(autoencoder=str(tmp_path)), channels=(32, 32))
    fit(simulator, lambda step: batch, FitConfig(steps=140, learning_rate=4e-3, warmup=10))
    coder = simulator.frames
    shown = to_frames(coder.decode(coder.encode(to_float(batch["next"]))))
    imagined, floor = (squared_error(f, batch) for f in (imagine(simulator, batch), shown))
    assert imagined < 1.2 * floor
    assert imagined < 0.4 * squared_error(batch["memory"][:, 0], batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4])
def test_frames_are_uint8_and_repeatable(hub, kind, steps):
    """Shape, dtype, and the same again with the same generator."""
    simulator = latent_simulator(models(hub, kind), sampling_steps=steps).eval()
    batch = moving_square(3)
    frames = imagine(simulator, batch)
    assert frames.shape == (3, SIZE, SIZE, 3) and frames.dtype == torch.uint8
    assert torch.equal(frames, imagine(simulator, batch))


def test_a_perfect_network_gives_the_decoded_latent_of_the_next_frame(hub):
    """What training asks for is what sampling turns into a frame; its loss is zero."""
    simulator, batch = latent_simulator(models(hub)).eval(), moving_square(2)
    now, following = (
        simulator.frames.encode(to_float(x)) for x in (batch["memory"][:, 0], batch["next"])
    )
    simulator._denoise = lambda x, *conditions: following - now
    assert torch.equal(imagine(simulator, batch), to_frames(simulator.frames.decode(following)))
    assert simulator(batch)[0].item() < 1e-10
    simulator._denoise = lambda x, *conditions: torch.zeros_like(x)
    assert simulator(batch)[0].item() > 1e-5


@pytest.mark.parametrize("which", range(MEMORY))
def test_latents_of_a_remembered_frame_can_be_copied(hub, which):
    """Choosing memory frame m everywhere gives that frame, encoded and decoded."""
    simulator, batch = latent_simulator(models(hub)).eval(), moving_square(2)
    batch["memory"] = torch.stack([batch["memory"][:, 0] // (m + 1) for m in range(MEMORY)], dim=1)

    class Answer(torch.nn.Module):
        def forward(self, inputs, time, encoder_hidden_states, class_labels):
            side = SIZE // FACTOR
            assert inputs.shape[1:] == (CHANNELS * (1 + SOURCES) + 3 * FACTOR**2, side, side)
            output = torch.zeros(len(inputs), CHANNELS + 1 + SOURCES, side, side)
            output[:, :CHANNELS] = 3.0  # painted, and not chosen
            output[:, CHANNELS + 1 + which] = 50.0
            return type("Output", (), {"sample": output})

    simulator.unet = Answer()
    coder = simulator.frames
    expected = coder.decode(coder.encode(to_float(batch["memory"][:, which])))
    difference = imagine(simulator, batch).int() - to_frames(expected).int()
    assert difference.abs().max() <= 1


def test_a_dreamt_frame_is_not_encoded_again(hub):
    """Where the newest frame is copied at every decision, nothing changes any more, and only the
    carried and the recalled frame are encoded; without this memory the picture is lost."""
    simulator, batch = latent_simulator(models(hub)).eval(), moving_square(2)

    class Copy(torch.nn.Module):
        def forward(self, inputs, time, encoder_hidden_states, class_labels):
            output = torch.zeros(len(inputs), CHANNELS + 1 + SOURCES, *inputs.shape[2:])
            output[:, CHANNELS + 1] = 50.0
            return type("Output", (), {"sample": output})

    simulator.unet = Copy()
    first = imagine(simulator, batch)

    def dream(forget: bool) -> torch.Tensor:
        frame = first
        for _ in range(5):
            if forget:
                simulator.frames._memory.clear()
            memory = torch.cat([frame[:, None], batch["memory"][:, 1:]], dim=1)
            frame = imagine(simulator, batch | {"memory": memory})
        return frame

    encoded = []
    hook = simulator.frames.model.encoder.register_forward_hook(
        lambda m, args, out: encoded.append(len(args[0]))
    )
    assert torch.equal(dream(forget=False), first)
    assert sum(encoded) == 5 * 2 * (SOURCES - MEMORY)
    hook.remove()
    assert (dream(forget=True).int() - first.int()).abs().max() > 20


def test_what_is_remembered_of_frames_is_bounded(hub):
    """The oldest are forgotten, and encoded again."""
    coder, frames = Latents(str(hub["AutoencoderTiny"])), moving_square(4)["memory"]
    frames = torch.arange(3, dtype=torch.uint8)[:, None, None, None, None] + frames[:3]
    coder.remembered = 2
    z = coder.known(frames, to_float(frames))
    assert z.shape == (3, MEMORY, CHANNELS, SIZE // FACTOR, SIZE // FACTOR)
    assert len(coder._memory) == 2
    assert torch.allclose(z, coder.encode(to_float(frames)), atol=1e-5)


def test_a_cell_weighs_as_much_as_its_pixels_on_average(hub):
    """One changed pixel of the sixteen of a cell: a sixteenth of its extra weight."""
    simulator, batch = latent_simulator(models(hub), contact_weight=0.0).eval(), moving_square(1)
    batch["next"] = batch["memory"][:, 0].clone()
    batch["next"][0, 8, 8] = 255 - batch["next"][0, 8, 8]
    z = [simulator.frames.encode(to_float(x)) for x in (batch["memory"][:, 0], batch["next"])]
    simulator._denoise = lambda x, *conditions: torch.zeros_like(x)
    weight = torch.ones(SIZE // FACTOR, SIZE // FACTOR)
    weight[2, 2] += simulator.config.moving_weight / FACTOR**2
    expected = (weight * (z[1] - z[0]) ** 2).mean().item()
    assert simulator(batch)[0].item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------ U-Net


def test_what_fits_of_a_unet_is_taken_over_and_counted(hub):
    """Everything but the first and last convolution; fresh are these and the class embedding."""
    simulator = latent_simulator(models(hub, clip="", geometry=""))
    theirs, ours = save_tiny(hub["unet"], "unet").state_dict(), simulator.unet.state_dict()
    same = {name for name in theirs if torch.equal(theirs[name], ours[name])}
    assert {name.split(".")[0] for name in theirs.keys() - same} == {"conv_in", "conv_out"}
    # Biases of conv_in fit, and norms are ones in both.
    assert {n for n in ours.keys() - theirs.keys()} == {
        f"class_embedding.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert simulator.begun.startswith(f"{len(same)} of the U-Net's {len(ours)} tensors (")
    assert str(hub["unet"]) in simulator.begun
    weights = list(simulator.unet.parameters())
    assert all(w.requires_grad for w in weights)
    assert simulator.reference_tokens(torch.zeros(1, 3, SIZE, SIZE)).shape[-1] == 24


def test_a_unet_can_begin_on_folded_pixels(hub):
    """Without an autoencoder; 32 pixels folded by 4 are as wide as its 8."""
    simulator = latent_simulator(models(hub, "", clip="", geometry=""), fold=4).eval()
    assert imagine(simulator, moving_square(2)).dtype == torch.uint8


# --------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_the_models_own(hub, kind):
    """Against the library's model on pictures that its size needs no resizing for."""
    encoder, own = Encoder(ENCODERS[kind], str(hub[kind])), save_tiny(hub[kind], kind)
    side = 32 if ENCODERS[kind] == "clip" else 224
    assert encoder.side == side
    pictures = torch.rand(2, 3, side, side) - 0.5
    mean, std = (torch.tensor(STATISTICS[f"image_{n}"])[:, None, None] for n in ("mean", "std"))
    pixels = (pictures + 0.5 - mean) / std
    with torch.no_grad():
        if kind == "clip":  # its vision encoder
            theirs = own.vision_model(pixels).last_hidden_state
        elif kind == "depth_anything":
            theirs = own.backbone(pixels).feature_maps[-1]
        else:
            theirs = own(pixels).last_hidden_state
    theirs = F.layer_norm(theirs, (16,))
    tokens = encoder(pictures)
    registers = 4 if kind == "dinov3_vit" else 0
    assert tokens.shape == theirs.shape == (2, 1 + registers + 4 * 4, 16)
    assert torch.equal(tokens, theirs.bfloat16().float())  # they are kept in bfloat16
    assert (tokens[0] - tokens[1]).abs().max() > 0.1


def test_frozen_encoders_read_each_first_frame_once(hub):
    """In training, in the dream and again; they get no gradient, the linear maps do."""
    simulator, batch = latent_simulator(models(hub)), moving_square(4)
    read = []
    for encoder in simulator.reference.encoders:
        encoder.model.register_forward_hook(lambda m, args, out: read.append(1))
        encoder.rows = 1
    batch["memory"][2:, -1] = 255 - batch["memory"][2:, -1]  # two episodes, two rows of each
    fit(simulator, lambda step: batch, FitConfig(steps=3, ema=0.9))
    assert len(read) == 2 * 2
    imagine(simulator, batch)
    assert len(read) == 2 * 2
    for encoder in simulator.reference.encoders:
        assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
        assert not encoder.train().training
    assert all(p.weight.grad is not None for p in simulator.reference.projections)


def test_averaged_weights_share_what_is_frozen(hub):
    """No second copy of autoencoder and encoders while the simulator trains."""
    import copy

    simulator = latent_simulator(models(hub))
    again = copy.deepcopy(simulator)
    assert again.frames is simulator.frames and again.unet is not simulator.unet
    for one, other in zip(again.reference.encoders, simulator.reference.encoders, strict=True):
        assert one is other
    assert again.reference.projections is not simulator.reference.projections


def test_every_model_reaches_the_frame(hub):
    """Tokens of either encoder, and the action map folded by the autoencoder's factor."""
    simulator, batch = latent_simulator(models(hub)).eval(), moving_square(2)
    tokens = simulator.reference_tokens(to_float(batch["memory"][:, -1]))
    of_clip = simulator.reference.encoders[0](to_float(batch["memory"][:, -1])).shape[1]
    inputs = {
        "memory": to_float(batch["memory"]), "state": batch["state"],
        "next_state": batch["next_state"], "action": batch["action"], "tokens": tokens,
    }  # fmt: skip
    side = SIZE // FACTOR
    noisy, time = torch.randn(2, CHANNELS, side, side), torch.tensor([999, 999])
    with torch.no_grad():
        plain = denoised(simulator, noisy, time, **inputs)
        assert plain.shape == noisy.shape
        for part in (slice(0, of_clip), slice(of_clip, None)):
            other = tokens.clone()
            other[:, part] += 0.5
            changed = denoised(simulator, noisy, time, **inputs | {"tokens": other})
            assert (changed - plain).abs().max() > 1e-5
        for name in ("memory", "state", "next_state", "action"):
            changed = denoised(simulator, noisy, time, **inputs | {name: inputs[name] + 0.3})
            assert (changed - plain).abs().max() > 1e-5, name


def test_vggt_where_it_is_installed(tmp_path, monkeypatch):
    """Its own aggregator, made tiny: a film of one picture, tokens of the last layer."""
    aggregator = pytest.importorskip(
        "vggt.models.aggregator", reason="vggt comes from github.com/facebookresearch/vggt"
    )
    tiny = partial(aggregator.Aggregator, depth=2, num_heads=2, patch_embed="conv")
    monkeypatch.setattr(aggregator, "Aggregator", tiny)
    from safetensors.torch import save_file

    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 32}
    own = tiny(**sizes).eval()
    weights = {f"aggregator.{name}": w for name, w in own.state_dict().items()}
    save_file(weights | {"depth_head.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    encoder = Encoder("geometry", str(tmp_path))
    pictures = torch.rand(2, 3, 224, 224) - 0.5
    with torch.no_grad():
        theirs = own(pictures[:, None] + 0.5)[0][-1][:, 0]
    tokens = encoder(pictures)
    assert tokens.shape == (2, 1 + 4 + 16 * 16, 64)
    assert (tokens - F.layer_norm(theirs, (64,))).abs().max() < 0.1
    assert all(not p.requires_grad for p in encoder.parameters())


# ------------------------------------------------------------------------------------- checkpoints


def test_saved_is_what_was_trained(hub, tmp_path):
    """U-Net, linear maps, kinematics and album; loaded, it imagines the same."""
    simulator, batch = latent_simulator(models(hub)).eval(), moving_square(2)
    path = tmp_path / "simulator.safetensors"
    save_part(path, simulator, simulator.description())
    names = {name for name in simulator.state_dict() if not name.endswith(FINGERPRINT)}
    assert not any(name.startswith(("frames.", "reference.encoders.")) for name in names)
    assert {"reference.projections.0.weight", "unet.conv_in.weight"} <= names
    again = latent_simulator(models(hub), seed=7).eval()
    assert not torch.equal(imagine(again, batch), imagine(simulator, batch))
    load_part(path, again, again.description())
    assert torch.equal(imagine(again, batch), imagine(simulator, batch))
    other = latent_simulator(models(hub, clip=""))
    with pytest.raises(runs.BadRun, match="clip: saved"):
        load_part(path, other, other.description())


def test_checkpoints_from_before_can_be_read():
    """Without pretrained models neither description nor config.json has to name any."""
    simulator = Simulator(SimulatorConfig(size=SIZE, channels=(32, 32), album=4), CAMERA)
    assert "pretrained" not in used(simulator.description())["config"]
    settings = json.loads(runs.config_to_json(runs.preset("debug")))
    del settings["simulator"]["pretrained"]
    assert runs.config_from_json(json.dumps(settings)) == runs.preset("debug")
    text = "clip=a/b,geometry=c/d/e"
    config = runs.with_simulator_models(runs.preset("debug"), text)
    assert runs.config_from_json(runs.config_to_json(config)) == config


# ------------------------------------------------------------------------------------------ errors


def complaint(part: str, checkpoint) -> str:
    """The one line that `check_part` refuses with."""
    with pytest.raises(BadCheckpoint) as caught:
        check_part(part, str(checkpoint))
    text = str(caught.value)
    assert "\n" not in text and text.count("; ") >= 2 and "expected" in text
    return text


@pytest.mark.parametrize(
    "part, kind, missing",
    [
        ("autoencoder", "AutoencoderKL", "diffusion_pytorch_model.safetensors"),
        ("unet", "unet", "config.json"),
        ("clip", "clip", "model.safetensors"),
        ("geometry", "dinov2", "preprocessor_config.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path, part, kind, missing):
    save_tiny(tmp_path, kind)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    assert missing in complaint(part, tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    """As many older checkpoints have them."""
    save_tiny(tmp_path, "AutoencoderKL")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    assert "pickled" in complaint("autoencoder", tmp_path)


def test_another_architecture_is_refused(hub):
    """By its name, before a weight is read."""
    for part, kind in (("autoencoder", "unet"), ("unet", "clip"), ("geometry", "clip")):
        assert f"cannot be the simulator's {part}" in complaint(part, hub[kind])


def test_an_unfit_unet_is_refused(tmp_path):
    """One that wants more than tokens and time, as Stable Diffusion XL does."""
    tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(BadCheckpoint, match="additional embedding"):
        check_models(SimulatorModels(unet=str(tmp_path)), SIZE, 4, 2)


def test_a_size_that_cannot_be_halved_is_refused(hub):
    """36 pixels: 9 latents, which the U-Net would halve once."""
    with pytest.raises(BadCheckpoint, match="expected a multiple of 8"):
        check_models(models(hub), 36, 1, 1)


@pytest.mark.parametrize("blocks", [None, 3, "64", [], ["64", 32], [8.0, 8.0], {"a": 1}, "gone"])
@pytest.mark.parametrize("part, kind", [("autoencoder", "AutoencoderKL"), ("unet", "unet")])
def test_blocks_of_another_kind_are_told_in_a_line(tmp_path, part, kind, blocks):
    """Their number says how often a picture is halved."""
    save_tiny(tmp_path, kind)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | {"block_out_channels": blocks}
    if blocks == "gone":
        del settings["block_out_channels"]
    path.write_text(json.dumps(settings))
    told = "block_out_channels of its config.json is .*; expected a list of whole numbers"
    with pytest.raises(BadCheckpoint, match=told):
        check_models(SimulatorModels(**{part: str(tmp_path)}), SIZE, 1, 1)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
@pytest.mark.parametrize("mean", [None, 0.5, "abc", [0.5, 0.5]])
def test_statistics_of_another_kind_are_told_in_a_line(tmp_path, kind, mean):
    """Before a weight is loaded."""
    save_tiny(tmp_path, kind)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(STATISTICS | {"image_mean": mean}))
    assert "image_mean is" in complaint(ENCODERS[kind], tmp_path)


def test_statistics_may_stand_in_a_processor_of_its_own(tmp_path):
    """As transformers 5 saves CLIP's: one file for words and pictures."""
    save_tiny(tmp_path, "clip")
    path = tmp_path / "preprocessor_config.json"
    whole = {"image_processor": json.loads(path.read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    path.unlink()
    check_models(SimulatorModels(clip=str(tmp_path)), SIZE, 1, 1)


@pytest.mark.parametrize("kind", [["clip"], {"clip": 1}, 7])
@pytest.mark.parametrize("part", ["autoencoder", "unet", "clip", "geometry"])
def test_a_kind_that_is_no_name_is_refused(tmp_path, part, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert f"cannot be the simulator's {part}" in complaint(part, tmp_path)


def test_a_missing_weight_is_named(tmp_path):
    """Otherwise diffusers would fill the gap with random numbers."""
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, "AutoencoderKL")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["encoder.conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    told = r"no weights for encoder\.conv_in\.weight"
    with pytest.raises(BadCheckpoint, match=told):
        check_models(SimulatorModels(autoencoder=str(tmp_path)), SIZE, 1, 1)  # by the headers
    with pytest.raises(BadCheckpoint, match=told):
        Latents(str(tmp_path))


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    """The library's own class takes the weights, whatever config.json says."""
    save_tiny(tmp_path, "dinov2")
    path = tmp_path / "config.json"
    names = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel")}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names}))
    (tmp_path / "evil.py").write_text("raise SystemExit('this code must never run')")
    encoder = Encoder("geometry", str(tmp_path))
    assert type(encoder.model).__module__ == "transformers.models.dinov2.modeling_dinov2"


def test_vggt_without_its_package_is_refused(tmp_path, monkeypatch):
    """Told by its sizes, as its config.json has no name."""
    (tmp_path / "config.json").write_text('{"img_size": 518, "patch_size": 14, "embed_dim": 8}')
    monkeypatch.setattr(latents.importlib.util, "find_spec", lambda name: None)
    assert "the package vggt is missing" in complaint("geometry", tmp_path)


def test_no_access_to_the_hub(monkeypatch):
    """An id with a folder behind it, which is not in the cache, without network; and a model whose
    licence has not been accepted."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no access to it on the hub" in complaint("unet", "nobody/no-model/unet")

    def refuse(*_, **__):
        raise errors.GatedRepoError.__new__(errors.GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    text = complaint("geometry", "facebook/dinov3-vitl16-pretrain-lvd1689m")
    assert "GatedRepoError" in text and "licence" in text


def test_only_the_folder_that_is_named_is_downloaded(monkeypatch, tmp_path):
    """owner/name@v1/unet: that folder of the repository at that revision, its safetensors in full
    precision, no code and no pickle."""
    from fnmatch import fnmatch

    import huggingface_hub

    (tmp_path / "unet").mkdir()
    asked = {}

    def download(repository, revision, allow_patterns, ignore_patterns):
        asked.update(repository=repository, allow=allow_patterns, ignore=ignore_patterns)
        asked["revision"] = revision
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert pretrained.find("owner/name/unet", latents.FILES) == tmp_path / "unet"
    assert (asked["repository"], asked["revision"]) == ("owner/name", None)
    assert pretrained.find("owner/name@v1/unet", latents.FILES) == tmp_path / "unet"
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert pretrained.find("owner/name@refs/pr/1/unet", latents.FILES) == tmp_path / "unet"
    assert (asked["repository"], asked["revision"]) == ("owner/name", "refs/pr/1")
    assert pretrained.find("gpt2", latents.FILES) == tmp_path  # the hub's oldest have no owner
    assert (asked["repository"], asked["revision"]) == ("gpt2", None)
    assert pretrained.find("owner/name@v1/unet", latents.FILES) == tmp_path / "unet"
    files = {
        "unet/config.json": True, "unet/diffusion_pytorch_model.safetensors": True,
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": True,
        "unet/diffusion_pytorch_model.fp16.safetensors": False, "unet/evil.py": False,
        "unet/diffusion_pytorch_model.bin": False, "vae/config.json": False,
        "config.json": False, "unet/deeper/config.json": False,
    }  # fmt: skip
    for name, wanted in files.items():
        allowed = any(fnmatch(name, pattern) for pattern in asked["allow"])
        ignored = any(fnmatch(name, pattern) for pattern in asked["ignore"])
        assert (allowed and not ignored) == wanted, name


def test_memory_is_told_before_anything_is_loaded(hub, monkeypatch, capsys):
    """Four bytes a frozen weight, twenty one that is trained; refused where there is less."""
    import psutil

    def weights(part, kind):
        return pretrained.memory_needed(check_part(part, str(hub[kind]))[1], bf16=False)

    parts = models(hub)
    frozen = sum(
        weights(part, kind)
        for part, kind in (
            ("autoencoder", "AutoencoderKL"), ("clip", "clip"), ("geometry", "depth_anything"),
        )
    )  # fmt: skip
    unet = weights("unet", "unet")
    assert check_models(parts, SIZE, 1, 1) == (frozen + 5 * unet, frozen + unet)
    config = runs.preset("debug")
    config = replace(config, simulator=replace(config.simulator, fold=1, pretrained=parts))
    runs.check_pretrained(config)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [
        "training of the simulator", "policy, reflector and simulator together",
    ]  # fmt: skip
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1000))
    with pytest.raises(BadCheckpoint, match="training of the simulator: needs about"):
        runs.check_pretrained(config)
    runs.check_pretrained(runs.preset("debug"))  # nothing pretrained: nothing to check


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("vae=somewhere", "expected NAME=ID_OR_FOLDER"),
        ("clip", "expected NAME=ID_OR_FOLDER"),
        ("clip=/no/such/model", "no such folder"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, capsys, text, complaint):
    """Exit code 2, and no run folder."""
    out = tmp_path / "run"
    command = ["train", "--preset", "debug", "--simulator-models", text, "--out", str(out)]
    with pytest.raises(SystemExit) as caught:
        cli.app(command)
    assert caught.value.code == 2 and not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and complaint in line


FOREIGN = {
    "autoencoder": "AutoencoderKL", "unet": "unet", "clip": "clip", "geometry": "depth_anything",
}  # fmt: skip


@pytest.mark.parametrize("part, kind", FOREIGN.items())
def test_foreign_weights_are_told_before_anything_is_played(
    hub, tmp_path_factory, capsys, part, kind
):
    """Another model's weights under a part's config.json: exit code 2, one line, an empty tree."""
    folder, tree = tmp_path_factory.mktemp("foreign"), tmp_path_factory.mktemp("tree")
    for path in hub[kind].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes((hub["dinov2"] / "model.safetensors").read_bytes())
    words = ["--simulator-models", f"{part}={folder}", "--out", str(tree / "deep" / "run")]
    with pytest.raises(SystemExit) as caught:
        cli.app(["train", "--preset", "debug", *words])
    assert caught.value.code == 2 and list(tree.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ("no weights for" in line or "not one weight" in line)


def test_models_by_name(hub, monkeypatch):
    """A folder by a path that holds anywhere; what is not named stays; latents are not folded."""
    monkeypatch.chdir(hub["unet"].parent)
    before = runs.preset("debug")
    after = runs.with_simulator_models(before, "autoencoder=AutoencoderKL,clip=some/id")
    chosen = after.simulator.pretrained
    assert chosen == SimulatorModels(str(hub["AutoencoderKL"]), clip="some/id")
    assert (after.simulator.fold, after.simulator.change_scale) == (1, 1.0)
    more = runs.with_simulator_models(after, "unet=unet")
    assert more.simulator.pretrained == replace(chosen, unet=str(hub["unet"]))
    assert runs.with_simulator_models(before, "") == before


def test_the_paper_preset_names_all_parts():
    """Latents of Stable Diffusion, 16 x 16 of them; VGGT where it is installed."""
    simulator = runs.preset("paper").simulator
    assert all(asdict(simulator.pretrained).values()) and simulator.fold == 1
    assert simulator.size % (8 * 2**3) == 0  # its autoencoder and its U-Net of four resolutions
    assert ("VGGT" in simulator.pretrained.geometry) == (
        latents.importlib.util.find_spec("vggt") is not None
    )


def test_the_real_command_with_every_model(hub, tmp_path, capsys):
    """`train` up to the simulator; then a dream from its checkpoint, one reading per start."""
    out = tmp_path / "run"
    text = ",".join(f"{part}={path}" for part, path in asdict(models(hub)).items())
    command = ["train", "--preset", "debug", "--tasks", "handle-press", "--until", "simulator"]
    with pytest.raises(SystemExit) as caught:
        cli.app([*command, "--simulator-models", text, "--out", str(out)])
    assert caught.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert re.search(r"simulator: open-loop PSNR .*; \d+ of the U-Net's \d+ tensors", shown)
    run = runs.Run.open(out)
    import demos

    episodes, _, camera = demos.load(run.episodes_folder, run.config.env, run.config.tasks)
    simulator = run.simulator(camera)
    read = []
    for encoder in simulator.reference.encoders:
        encoder.model.register_forward_hook(lambda m, args, out: read.append(len(out[0])))

    class Never(NoReflector):
        threshold = dream_threshold = torch.tensor(1.0)

        def reward(self, frames, tokens, state, landmarks=None):
            return torch.zeros(len(frames))

    start = Start(episodes[0].task, episodes[0].seed)
    known = {start: (episodes[0].image[0], episodes[0].state[0])}
    world = WorldEnv(simulator, Never(), known, 2, EnvConfig())
    first, _ = world.reset(options={"starts": [start, start]})
    frames = [first["image"]] + [
        world.step(np.ones(world.action_space.shape, np.float32))[0]["image"] for _ in range(2)
    ]
    assert all(f.shape == (2, 64, 64, 3) and f.dtype == np.uint8 for f in frames)
    assert np.array_equal(frames[2][0], frames[2][1]) and not np.array_equal(frames[0], frames[2])
    assert len(read) == 2  # one first frame, two encoders
