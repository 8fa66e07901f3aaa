"""Pretrained parts of the world simulator: an autoencoder, weights to begin with, frozen features.

Paper's section: "World simulator" (latent diffusion; geometry and semantics of a reference image by
cross-attention).

    frame --------> encoder --> latent --> copied from, painted on --> decoder --> next frame
    a U-Net's weights, where their shapes fit --> the simulator's U-Net
    first frame --> CLIP ------> tokens --linear--.
               '--> geometry --> tokens --linear--+--> cross-attention

Each is named by a hub id, by an id with a folder of that repository behind it, or by a folder in
the format of diffusers or transformers; whatever is wrong with one is told in one line, a
`BadCheckpoint`, before a weight is loaded (`check_models`). Only the U-Net and the linear maps are
trained. The rest is frozen and in no checkpoint of a run, which names it.

Symbols: N pictures, H, W pixels, f pixels of a latent's side, c its channels, n tokens, D width.

# DEVIATION: the paper's geometry is VGGT's; here that where its package is installed, else a depth
#   model (its encoder) or DINOv2 / DINOv3 of transformers; because VGGT is not on PyPI.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fit import bf16_autocast
from hub import (
    LIBRARY_ERRORS,
    BadCheckpoint,
    check_download,
    complain_of,
    find,
    first_line,
    headers,
    loading,
    memory_needed,
    read_json,
    weight_files,
)
from pretrained import (
    PROCESSOR,
    digest,
    enlarged,
    keep_frozen_out,
    once,
    picture_statistics,
)


@dataclass(frozen=True)
class SimulatorModels:
    """The pretrained parts; each a hub id, perhaps with a folder ("owner/name/unet"; `hub.find`),
    or a folder on disk; "" means: none, the small preset's own."""

    autoencoder: str = ""  # AutoencoderKL or AutoencoderTiny of diffusers: the diffusion is latent
    unet: str = ""  # UNet2DConditionModel of diffusers: where training begins
    clip: str = ""  # CLIP, whose vision encoder is used
    geometry: str = ""  # see GEOMETRY

    def named(self, text: str) -> SimulatorModels:
        """With what a command line names, "autoencoder=ID_OR_FOLDER,clip=ID_OR_FOLDER"; a folder by
        a path that holds anywhere. ValueError for anything else."""
        given = {}
        for part in filter(None, text.split(",")):
            name, _, checkpoint = part.strip().partition("=")
            if name not in asdict(self) or not checkpoint:
                raise ValueError(
                    f"simulator models: got {part!r}; expected NAME=ID_OR_FOLDER, separated by "
                    f"commas, with the names {', '.join(asdict(self))}"
                )
            here = Path(checkpoint).is_dir()
            given[name] = str(Path(checkpoint).absolute()) if here else checkpoint
        return replace(self, **given)


# ----------------------------------------------------------------------- finding and checking them

GEOMETRY = ("vggt", "depth_anything", "dinov2", "dinov2_with_registers", "dinov3_vit")
KINDS = {  # what config.json may name, by part
    "autoencoder": ("AutoencoderKL", "AutoencoderTiny"),
    "unet": ("UNet2DConditionModel",),
    "clip": ("clip", "clip_vision_model"),
    "geometry": GEOMETRY,
}
FILES = ["config.json", *PROCESSOR] + [
    f"{name}{ending}"
    for name in ("model", "diffusion_pytorch_model")
    for ending in (".safetensors", "-*.safetensors", ".safetensors.index.json")
]
TRAINING = 5  # numbers that are held for a trained weight: itself, gradient, Adam's two, average


def check_part(part: str, checkpoint: str, device: str = "cpu") -> tuple[Path, list[Path], str]:
    """(folder, files of weights, kind) of one part's checkpoint; BadCheckpoint for a missing file
    or package, another architecture, no access, on the hub one that does not fit on the device."""
    name = "diffusion_pytorch_model" if part in ("autoencoder", "unet") else "model"
    judge = partial(check_download, checkpoint, name=name, bf16=False, device=device)
    folder = find(checkpoint, FILES, judge)
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(
            f"{folder}: config.json is missing; expected a checkpoint in the hub's format; name "
            "the folder that holds config.json and weights, such as owner/name/unet"
        )
    settings = read_json(folder / "config.json")
    kind = settings.get("_class_name") or settings.get("model_type")
    if kind is None and "embed_dim" in settings:  # VGGT's file has its three sizes only
        kind = "vggt"
    if kind not in KINDS[part]:
        raise BadCheckpoint(
            f"{folder}: {kind!r} cannot be the simulator's {part}; expected one of "
            f"{', '.join(KINDS[part])}; choose another checkpoint"
        )
    if kind == "vggt" and importlib.util.find_spec("vggt") is None:
        raise BadCheckpoint(
            f"{folder}: the package vggt is missing; expected it beside this one; install it from "
            "github.com/facebookresearch/vggt, or name a depth model for the geometry"
        )
    reads_pictures = part in ("clip", "geometry") and kind != "vggt"
    if reads_pictures and not any((folder / name).is_file() for name in PROCESSOR):
        raise BadCheckpoint(
            f"{folder}: {' or '.join(PROCESSOR)} is missing; expected mean and spread of the "
            "pictures; download or save the checkpoint again, whole"
        )
    if reads_pictures:
        picture_statistics(folder)  # refuses those that are none
    return folder, weight_files(folder, name), kind


def check_models(
    models: SimulatorModels, size: int, fold: int, levels: int, device: str = "cpu"
) -> tuple[int, int]:
    """Bytes that these models take in training and in a dream (estimates), if nothing speaks
    against loading them. size, fold, levels: pixels, folded cells, resolutions of the U-Net."""
    training, dreaming, factor = 0, 0, 1
    for part, checkpoint in asdict(models).items():
        if not checkpoint:
            continue
        folder, files, kind = check_part(part, checkpoint, device)
        settings = read_json(folder / "config.json")
        needed = memory_needed(files, bf16=False)
        training += needed * (TRAINING if part == "unet" else 1)
        dreaming += needed
        if part == "autoencoder":
            factor = _factor(folder, settings)
        if part == "unet":
            levels = _blocks(folder, settings)
            _check_unet(folder, settings)
        _check_weights(part, folder, files, kind)
    if size % (factor * fold * 2 ** (levels - 1)):
        raise BadCheckpoint(
            f"simulator: pictures of {size} pixels cannot be halved {levels - 1} times after an "
            f"autoencoder's {factor} and {fold} folded; expected a multiple of "
            f"{factor * fold * 2 ** (levels - 1)}; choose another size or other models"
        )
    return training, dreaming


def _check_unet(folder: Path, settings: dict) -> None:
    width = settings.get("cross_attention_dim")
    if not isinstance(width, int) or settings.get("addition_embed_type"):
        raise BadCheckpoint(
            f"{folder}: a U-Net of another kind (cross_attention_dim {width}, addition_embed_type "
            f"{settings.get('addition_embed_type')}); expected one width and no additional "
            "embedding, as in Stable Diffusion 1 and 2; choose another checkpoint"
        )


def _check_weights(part: str, folder: Path, files: list[Path], kind: str) -> None:
    """BadCheckpoint where the weights are not those of the architecture; by their headers."""
    import diffusers

    if part == "autoencoder":
        load(getattr(diffusers, kind), folder, weights=False)
    elif part == "unet":
        with torch.device("meta"):
            unet = _unet(folder, {})
        _fitting(folder, headers(files), unet)
    elif kind == "vggt":
        _vggt(folder, headers(files), torch.device("meta"))
    else:
        _encoder(folder, kind, weights=False)


def _factor(folder: Path, settings: dict) -> int:
    """Pixels of a latent's side: every block of the encoder but one halves the picture."""
    return 2 ** (_blocks(folder, settings) - 1)


def _blocks(folder: Path, settings: dict) -> int:
    """How many blocks an encoder or a U-Net has; BadCheckpoint where config.json does not tell."""
    blocks = settings.get("encoder_block_out_channels") or settings.get("block_out_channels")
    fine = isinstance(blocks, list | tuple) and all(type(x) is int and x > 0 for x in blocks)
    if not blocks or not fine:
        raise BadCheckpoint(
            f"{folder}: block_out_channels of its config.json is {blocks!r}; expected a list of "
            "whole numbers, one of each block; download it again, or choose another"
        )
    return len(blocks)


# ----------------------------------------------------------------------------------- frozen models


class Frozen(nn.Module):
    """A pretrained model that is only read: no gradients, always in evaluation mode, in no
    checkpoint. The averaged weights of `fit.fit` share it. It computes in float32: in bfloat16 a
    frame that goes through an autoencoder at every decision would lose some grey levels each time.
    """

    model: Any  # a class of diffusers or transformers

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        keep_frozen_out(self)

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def __deepcopy__(self, memo) -> Frozen:
        return self


def in_float32(x: torch.Tensor) -> AbstractContextManager:
    """Without the autocast to bfloat16 that training and imagination are in."""
    return bf16_autocast(x.device, wanted=False)


def load(kind, folder: Path, weights: bool = True) -> Any:
    """A model class of diffusers or transformers with its weights, float32; BadCheckpoint where
    they are not those of the architecture. weights=False: on the meta device, without numbers."""
    more: dict[str, Any] = {} if weights else {"device_map": {"": torch.device("meta")}}
    with loading(folder, "the weights of its own config.json"):
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **more,
        )  # fmt: skip
        complain_of(info)
    return model.float()


class Pixels:
    """No autoencoder: a frame is its own picture. See `Latents`."""

    channels, factor = 3, 1

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def decode(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures

    def known(self, frames: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        return pictures

    def keep(self, frames: torch.Tensor, pictures: torch.Tensor) -> None:
        pass


class Latents(Frozen):
    """A pretrained autoencoder: frames <-> latents, whose spread is near 1.

        z = scale * (E(o) - shift),   o = D(z / scale + shift)

    An imagined frame is remembered together with its latent (`keep`), so that the next decision
    does not encode what was decoded: after thirty such rounds little of a picture is left. Other
    frames are encoded: the carried and the recalled one of each decision, in training memory and
    next frame as well. With Stable Diffusion's autoencoder that is most of what the simulator
    computes."""

    rows = 64  # frames that are encoded at a time
    remembered = 2**15  # latents; of 16 x 16 x 4 numbers 130 MB

    def __init__(self, checkpoint: str):
        import diffusers

        folder, _, kind = check_part("autoencoder", checkpoint)
        super().__init__(load(getattr(diffusers, kind), folder))
        config = self.model.config
        self.channels, self.factor = config.latent_channels, _factor(folder, config)
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0
        self._memory: dict[bytes, torch.Tensor] = {}

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) float in [-0.5, 0.5] -> (..., c, H/f, W/f) float32: of a distribution its
        mean."""
        some = frames.flatten(0, -4).split(self.rows)
        z = torch.cat([self._encode(2 * pictures) for pictures in some])
        return (self.scale * (z - self.shift)).unflatten(0, frames.shape[:-3])

    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        with in_float32(pictures):
            output = self.model.encode(pictures.float())
        return output.latents if hasattr(output, "latents") else output.latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, c, H/f, W/f) -> (N, 3, H, W) float32, about in [-0.5, 0.5]."""
        with in_float32(latents):
            return self.model.decode(latents.float() / self.scale + self.shift).sample / 2

    def known(self, frames: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Frames (B, M, H, W, 3) uint8, the same as float pictures (B, M, 3, H, W) -> their latents
        (B, M, c, H/f, W/f): of an imagined frame the one that it was decoded from."""
        flat = pictures.flatten(0, 1)

        def encode(some: list[int]) -> torch.Tensor:
            return self.encode(flat[some])

        keys = [digest(frame) for frame in frames.flatten(0, 1)]
        z = once(self._memory, keys, encode, self.rows, self.remembered)
        return z.to(pictures.device).unflatten(0, frames.shape[:2])

    def keep(self, frames: torch.Tensor, latents: torch.Tensor) -> None:
        """Remember the latents (B, c, H/f, W/f) that frames (B, H, W, 3) uint8 come from."""
        keys = [digest(frame) for frame in frames]
        self._memory |= dict(zip(keys, latents.cpu(), strict=True))


def unet_from(checkpoint: str, ours: dict) -> tuple[nn.Module, str]:
    """(a U-Net of the checkpoint's architecture but for the settings `ours`, a line that says what
    it took over): weights whose name and shape fit are copied, the others stay as drawn."""
    from safetensors.torch import load_file

    folder, files, _ = check_part("unet", checkpoint)
    unet = _unet(folder, ours)
    own = unet.state_dict()
    weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
    fitting = _fitting(folder, weights, unet)
    unet.load_state_dict(fitting, strict=False)
    share = sum(w.numel() for w in fitting.values()) / sum(w.numel() for w in own.values())
    line = f"{len(fitting)} of the U-Net's {len(own)} tensors ({share:.0%} of its weights)"
    return unet, f"{line} begin at {checkpoint}"


def _unet(folder: Path, ours: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel

    try:
        settings = UNet2DConditionModel.load_config(folder, local_files_only=True)
        return UNet2DConditionModel.from_config(settings | ours)
    except LIBRARY_ERRORS as error:
        raise BadCheckpoint(
            f"{folder}: no U-Net can be built by its config.json ({first_line(error)}); expected "
            "that of a UNet2DConditionModel; download it again, or choose another"
        ) from error


def _fitting(folder: Path, weights: dict[str, torch.Tensor], unet: nn.Module) -> dict:
    """Those of the weights whose name and shape the U-Net has; BadCheckpoint where none has."""
    own = unet.state_dict()
    fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    if not fitting:
        raise BadCheckpoint(
            f"{folder}: not one weight fits the U-Net of its config.json; expected its own; "
            "download it again, or choose another"
        )
    return fitting


# --------------------------------------------------------------------------------------- features


class Encoder(Frozen):
    """A frozen encoder of pictures, "clip" or "geometry": picture -> n tokens of width D.

    Equal pictures have equal tokens: each picture is read once and remembered, in bfloat16, the
    oldest forgotten first. It is the first frame of an episode, so that is once per episode."""

    side = 224  # pixels that a picture is enlarged to, down to whole patches; CLIP says its own
    rows, remembered = 8, 2**10  # read at a time; kept, some MB each for large models
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, part: str, checkpoint: str):
        folder, files, kind = check_part(part, checkpoint)
        super().__init__(_read_vggt(folder, files) if kind == "vggt" else _encoder(folder, kind))
        self.kind, mean, std = kind, torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        if kind == "vggt":  # it normalises pictures itself
            self.side -= self.side % self.model.patch_size
        else:
            mean, std = picture_statistics(folder)
            config = self.model.config
            clip = part == "clip"
            self.side = config.image_size if clip else self.side - self.side % config.patch_size
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self._memory: dict[bytes, torch.Tensor] = {}
        self.width = self(torch.zeros(1, 3, 8, 8)).shape[-1]

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [-0.5, 0.5] -> (B, n, D) float32, its spread brought to 1."""

        def read(some: list[int]) -> torch.Tensor:
            with in_float32(pictures):
                pixels = enlarged(pictures[some].float(), self.side, self.mean, self.std)
                tokens = self._tokens(pixels)
                return nn.functional.layer_norm(tokens, tokens.shape[-1:]).bfloat16()

        keys = [digest(picture) for picture in pictures]
        tokens = once(self._memory, keys, read, self.rows, self.remembered)
        return tokens.to(pictures.device).float()

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.kind == "vggt":  # a film of one picture; the last layer, camera and registers too
            layers, _ = self.model(pixels[:, None])
            return layers[-1][:, 0]
        if self.kind == "depth_anything":  # what its depth is computed from
            return self.model(pixels).feature_maps[-1]
        return self.model(pixels).last_hidden_state


def _encoder(folder: Path, kind: str, weights: bool = True) -> nn.Module:
    """The encoder of pictures of a checkpoint of transformers: CLIP's without its words, a depth
    model's without neck and head."""
    from transformers import AutoModel, AutoModelForDepthEstimation, CLIPModel

    if kind == "clip":
        return load(CLIPModel, folder, weights).vision_model
    if kind == "depth_anything":
        return load(AutoModelForDepthEstimation, folder, weights).backbone
    return load(AutoModel, folder, weights)


def _read_vggt(folder: Path, files: list[Path]) -> nn.Module:
    from safetensors.torch import load_file

    weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
    return _vggt(folder, weights, torch.device("cpu"))


def _vggt(folder: Path, weights: dict[str, torch.Tensor], device: torch.device) -> nn.Module:
    """VGGT's aggregator with its weights, without the heads for cameras, depth and tracks."""
    from vggt.models.aggregator import Aggregator

    settings = read_json(folder / "config.json")
    start = "aggregator."
    own = {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}
    try:
        with device:
            sizes = {name: settings[name] for name in ("img_size", "patch_size", "embed_dim")}
            aggregator = Aggregator(**sizes)
        aggregator.load_state_dict(own)
    except LIBRARY_ERRORS as error:
        raise BadCheckpoint(
            f"{folder}: not the weights of VGGT; expected those of its own config.json; download "
            "it again, or choose another"
        ) from error
    return aggregator


class FrozenReference(nn.Module):
    """Features of the first frame, projected to the width of the cross-attention."""

    def __init__(self, models: SimulatorModels, width: int):
        super().__init__()
        wanted = {"clip": models.clip, "geometry": models.geometry}
        encoders = [Encoder(part, checkpoint) for part, checkpoint in wanted.items() if checkpoint]
        self.encoders = nn.ModuleList(encoders)
        self.projections = nn.ModuleList(nn.Linear(e.width, width) for e in encoders)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [-0.5, 0.5] -> (B, n of all encoders, width)."""
        pairs = zip(self.encoders, self.projections, strict=True)
        return torch.cat([project(encoder(image)) for encoder, project in pairs], dim=1)
