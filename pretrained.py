"""Pretrained vision-language models of transformers, as the policy's backbone and as the reflector.

Paper's sections: "SFT" (OpenVLA-OFT: parallel decoding), "RL post-training" (LoRA of rank 32) and
"Instant reflector" (frozen vision encoder and language model, trained head).

Policy, `VLABackbone`: all K*A hidden states come out of one pass; those of a step, A * D numbers,
go to the heads.

    picture ----------> vision encoder --> image tokens --.
    instruction ------> the family's prompt --> words ----+--> language model --> h of the last K*A
    state ------------> MLP --> one token ----------------|    (LoRA in all linear layers)
    K*A placeholders --> learned tokens ------------------'

Reflector, `FrozenReader`: nothing in it is trained, so h is computed once per set of frames.

    first, previous, current picture, instruction --> prompt --> VLM --> h of the last token

A checkpoint is a folder in the hub's format (config.json, model.safetensors, files of tokenizer and
processor) or a hub id, which is downloaded once into the hub's own cache. Whatever is wrong with
one is told in one line, a `BadCheckpoint`, before a weight is loaded (`check`). A new family of
models is one row of `FAMILIES`; one that takes plain pictures needs none.

Symbols: B batch, P pictures in a prompt, N = B * P, n image tokens of a picture, L tokens of a
prompt, T extra tokens behind it, D width of the language model, K steps of a chunk, A action
dimensions, S state.

# DEVIATION: the paper's VLA is OpenVLA-OFT; here any image-text model that transformers knows, its
#   picture in one piece; because OpenVLA is code that comes with its checkpoint, and only weights
#   as safetensors are taken from there, no code and no pickle.
# DEVIATION: OpenVLA-OFT's action tokens are empty and see each other; here they are learned and see
#   what the family's mask lets them (PaliGemma: each other, the rest: those before); because a mask
#   from outside would have to be written anew for every architecture.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from fit import bf16_autocast
from tasks import METAWORLD, Robot
from vlm import words

if TYPE_CHECKING:  # for annotations only: nothing is imported before it is needed
    from transformers import PreTrainedModel


class BadCheckpoint(ValueError):
    """A pretrained model that cannot be used; one line: what, what was expected, what to do."""


@dataclass(frozen=True)
class PretrainedConfig:
    """Which model, and how it is held. The default, no checkpoint, means: none is used."""

    checkpoint: str = ""  # hub id ("owner/name") or folder
    lora_rank: int = 0  # 32 for the policy [paper]; 0: nothing in the model is trained
    bf16: bool = True  # frozen weights in bfloat16, and autocast where the device computes in it
    gradient_checkpointing: bool = True  # activations are computed again instead of kept

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(
                f"PretrainedConfig.lora_rank: got {self.lora_rank}, expected 0 or more"
            )


# ---------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """What differs between architectures: the words around a picture, and its shape. Special tokens
    stand in the words by name, as the family's own processor and chat template place them."""

    inputs: Callable[[torch.Tensor, object], dict[str, torch.Tensor]]  # pixels, config -> arguments
    picture: str = "{image}"  # {image}: its n placeholders
    prompt: str = "{bos}{pictures}\n{text}\n"  # {bos}: the tokenizer's first token
    whole_prompt: bool = False  # whether tokens of the prompt see the later ones too


def plain_picture(pixels: torch.Tensor, config) -> dict[str, torch.Tensor]:
    """(N, 3, H, W) as they are: CLIP and SigLIP with one size of picture (LLaVA, PaliGemma)."""
    return {"pixel_values": pixels}


def one_tile(pixels: torch.Tensor, config) -> dict[str, torch.Tensor]:
    """(N, 3, H, W) -> (N, 1, 3, H, W): a picture that is one tile (SmolVLM, Idefics 3)."""
    return {"pixel_values": pixels[:, None]}


def qwen_patches(pixels: torch.Tensor, config) -> dict[str, torch.Tensor]:
    """(N, 3, H, W) -> patches (N * gh * gw, 3 * time * p * p), in the order in which m x m of them
    are merged to a token, and the grid (N, 3) of time, rows and columns. A still picture is a film
    of `time` equal frames."""
    vision = config.vision_config
    p, m, time = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    n, c, h, w = pixels.shape
    gh, gw = h // p, w // p
    patches = pixels.view(n, c, gh // m, m, p, gw // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = patches[:, :, :, :, :, :, None].expand(*patches.shape[:6], time, p, p)
    grid = torch.tensor([[1, gh, gw]], device=pixels.device).expand(n, 3)
    return {"pixel_values": patches.reshape(n * gh * gw, -1), "image_grid_thw": grid}


SMOLVLM = Family(
    one_tile,
    picture="<fake_token_around_image><global-img>{image}<fake_token_around_image>",
    prompt="<|im_start|>User:{pictures}{text}<end_of_utterance>\nAssistant:",
)
QWEN = Family(
    qwen_patches,
    picture="<|vision_start|>{image}<|vision_end|>",
    prompt="<|im_start|>user\n{pictures}{text}<|im_end|>\n<|im_start|>assistant\n",
)
FAMILIES = {  # by the `model_type` of config.json
    "smolvlm": SMOLVLM,
    "idefics3": SMOLVLM,
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "paligemma": Family(plain_picture, prompt="{pictures}{bos}{text}\n", whole_prompt=True),
    "llava": Family(plain_picture, prompt="{bos}USER: {pictures}\n{text} ASSISTANT:"),
}


# ------------------------------------------------------------------- finding, checking and loading

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # either will do
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
OVERHEAD = 1.2  # times the weights: adapters, their gradients, activations [estimate]


def find(checkpoint: str, files: list[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint; a hub id is downloaded first, unless that was done before. An id
    may go on into the repository: owner/name/subfolder. files: patterns of what is downloaded."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    owner_and_name, inside = checkpoint.split("/")[:2], checkpoint.split("/")[2:]
    wanted = ["/".join([*inside, file]) for file in files]
    deeper = ["/".join([*inside, "*/*"])]
    try:  # a path that is no id is a ValueError, no access an OSError
        folder = snapshot_download(
            "/".join(owner_and_name), allow_patterns=wanted, ignore_patterns=deeper
        )
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{checkpoint}: no such folder, and no access to it on the hub "
            f"({type(error).__name__}); expected a folder in the hub's format or the id of a model "
            "on the hub; check name, network and licence, or give the path of a copy"
        ) from error
    return Path(folder, *inside)


def check(config: PretrainedConfig) -> Path:
    """The checkpoint's folder, if nothing speaks against loading it; else BadCheckpoint: a missing
    package or file, an architecture that does not read pictures and text, too little memory."""
    from transformers.models.auto import modeling_auto

    if config.lora_rank:
        _import_peft()
    folder = find(config.checkpoint)
    for names in (("config.json",), TOKENIZER, PROCESSOR):
        if not any((folder / name).is_file() for name in names):
            raise BadCheckpoint(
                f"{folder}: {' or '.join(names)} is missing; expected a checkpoint in the hub's "
                "format; download or save it again, whole"
            )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise BadCheckpoint(
            f"{folder}: unknown architecture {kind!r}; expected one of transformers that reads "
            f"pictures and text, such as {', '.join(FAMILIES)}; choose another checkpoint"
        )
    check_room(config.checkpoint, memory_needed(weight_files(folder), config.bf16))
    return folder


def check_room(what: str, needed: int) -> None:
    """Say how much memory `what` needs (bytes, an estimate) and how much there is; BadCheckpoint if
    that is too little."""
    import psutil

    free = psutil.virtual_memory().available
    told = f"{what}: needs about {needed / 2**30:.3g} GiB of memory (estimate)"
    if needed > free:
        raise BadCheckpoint(
            f"{told}; expected that the {free / 2**30:.3g} available suffice; close other programs "
            "or choose a smaller model"
        )
    print(f"{told}, {free / 2**30:.3g} are available", file=sys.stderr)


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise BadCheckpoint(
            "LoRA: the package peft is missing; expected what requirements-gpu.txt lists; "
            "run: python -m pip install --no-deps -r requirements-gpu.txt"
        ) from error
    return peft


def weight_files(folder: Path, name: str = "model") -> list[Path]:
    """The safetensors of a checkpoint, in one file or listed in an index; all of them exist.
    name: "model" in the files of transformers, "diffusion_pytorch_model" in those of diffusers."""
    index = folder / f"{name}.safetensors.index.json"
    names = weight_map(index) if index.is_file() else []
    if any(Path(file).name != file for file in names):
        raise BadCheckpoint(
            f"{index}: names {', '.join(names)}; expected files of this folder; do not "
            "use this checkpoint"
        )
    files = [folder / file for file in names or [f"{name}.safetensors"]]
    for path in files:
        if not path.is_file():
            raise BadCheckpoint(
                f"{path}: missing; expected the weights as safetensors (pickled ones, *.bin, can "
                "run code and are not read); download them again, or convert them"
            )
    return files


def weight_map(index: Path) -> list:
    """The files that an index names, each once; BadCheckpoint where it is no index."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise BadCheckpoint(
            f"{index}: no weight_map in it; expected the file of every weight; download it again"
        )
    return sorted(set(map(str, named.values())))


def memory_needed(files: list[Path], bf16: bool) -> int:
    """Bytes for the weights of these files in the width they are held in, times `OVERHEAD`; only
    the headers are read."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise BadCheckpoint(
                f"{path}: damaged or cut short ({error}); expected safetensors; download it again"
            ) from error
        count += sum(math.prod(shape) for shape in shapes)
    return round(OVERHEAD * count * (2 if bf16 else 4))


def read_json(path: Path) -> dict:
    """The content of one of a checkpoint's files; BadCheckpoint if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path}: not readable ({error}); expected JSON; download it again"
        ) from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path}: no settings by name; expected JSON; download it again")
    return content


def load(folder: Path, bf16: bool):
    """(tokenizer, image-text model with its weights, frozen); BadCheckpoint where the weights are
    not those of the architecture: transformers would fill the gaps with random numbers."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", trust_remote_code=False, local_files_only=True
        )
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(f"no weights for {sorted(info['missing_keys'])[0]}")
        if not hasattr(model.base_model, "get_image_features"):
            raise ValueError(f"{type(model).__name__} has no get_image_features")
    except (OSError, ValueError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{folder}: cannot be used ({str(error).splitlines()[0]}); expected an image-text "
            "model with its own config.json; download it again, or choose another"
        ) from error
    return tokenizer, model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------- the model


class PretrainedVLM(nn.Module):
    """An image-text model and its tokenizer: pictures, text and extra tokens -> hidden states. What
    is frozen is not in its `state_dict`: what is saved is what was trained."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        folder = check(config)
        self.config = config
        self.tokenizer, self.model = load(folder, config.bf16)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config.gradient_checkpointing:
            old = self.model.gradient_checkpointing_enable  # until transformers 6
            enable = getattr(self.model, "activation_checkpointing_enable", old)
            enable({"use_reentrant": False})
        self.family = FAMILIES.get(self.model.config.model_type, Family(plain_picture))
        self.width = self.model.get_input_embeddings().embedding_dim  # D
        mean, std = picture_statistics(folder)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        with torch.no_grad():  # n: not every configuration says it
            self.image_tokens = len(self.image_features(self.inputs(torch.zeros(1, 1, 3, 8, 8))))
        if config.lora_rank:
            add_lora(self.model, config.lora_rank)
        self.register_state_dict_post_hook(leave_out_frozen)
        self.register_load_state_dict_pre_hook(fill_in_frozen)

    @property
    def base(self) -> PreTrainedModel:
        """The model without its language-model head."""
        return self.model.base_model

    def train(self, mode: bool = True) -> PretrainedVLM:
        """As usual, but layers with gradient checkpointing, which they do in training only, always
        believe to be in it: PPO takes its gradients in evaluation mode. What is inside them, such
        as dropout, follows `mode`."""
        super().train(mode)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        return self

    def inputs(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, P, 3, H, W) float in [-0.5, 0.5] -> what the model's vision encoder takes."""
        config = self.base.config
        vision = config.vision_config
        side = getattr(vision, "image_size", None)
        if side is None:  # Qwen takes any: 8 x 8 tokens, 224 pixels with its patches of 14
            side = 8 * vision.patch_size * vision.spatial_merge_size
        pixels = enlarged(pictures.flatten(0, 1), side, self.mean, self.std)
        return self.family.inputs(pixels.to(self.model.dtype), config)

    def image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Image tokens (B * P * n, D), picture by picture."""
        return torch.cat(list(self.base.get_image_features(**inputs).pooler_output))

    def prompts(self, texts: list[str], pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (B, L) of `pictures` pictures and a text, padded on the
        left: the last token is a word in every row."""
        image = self.tokenizer.convert_ids_to_tokens(self.base.config.image_token_id)
        picture = self.family.picture.format(image=image * self.image_tokens)
        fixed = {"bos": self.tokenizer.bos_token or "", "pictures": picture * pictures}
        rows = [self.family.prompt.format(text=text, **fixed) for text in texts]
        batch = self.tokenizer(rows, padding=True, add_special_tokens=False, return_tensors="pt")
        device = self.mean.device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def forward(self, pictures, texts: list[str], extra=None) -> torch.Tensor:
        """(B, P, 3, H, W) float in [-0.5, 0.5], B texts, extra tokens (B, T, D) behind the prompt
        -> hidden states (B, L + T, D) float32."""
        ids, mask = self.prompts(texts, pictures.shape[1])
        base, is_image = self.base, ids == self.base.config.image_token_id
        with bf16_autocast(ids.device, self.config.bf16):
            # The placeholder may lie outside of the embeddings: any other token stands in for it.
            tokens = self.model.get_input_embeddings()(ids.masked_fill(is_image, 0))
            inputs = self.inputs(pictures)
            images = self.image_features(inputs).to(tokens.dtype)
            tokens = tokens.masked_scatter(is_image[..., None], images)
            if extra is not None:
                behind = (0, extra.shape[1])
                tokens = torch.cat([tokens, extra.to(tokens.dtype)], dim=1)
                ids, is_image = F.pad(ids, behind), F.pad(is_image, behind)
                mask = F.pad(mask, behind, value=1)
            more = {"token_type_ids": torch.zeros_like(ids)} if self.family.whole_prompt else {}
            if "image_grid_thw" in inputs:  # positions in time, row and column (Qwen)
                more["position_ids"], _ = base.get_rope_index(
                    ids,
                    mm_token_type_ids=is_image.int(),
                    image_grid_thw=inputs["image_grid_thw"],
                    attention_mask=mask,
                )
            hidden = base(inputs_embeds=tokens, attention_mask=mask, use_cache=False, **more)
        return hidden.last_hidden_state.float()


def enlarged(pictures, side: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) float in [-0.5, 0.5] -> (N, 3, side, side), by the model's mean and spread."""
    pixels = F.interpolate(pictures + 0.5, (side, side), mode="bicubic", antialias=True)
    return (pixels.clamp(0, 1) - mean) / std  # bicubic interpolation overshoots


def picture_statistics(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3, 1, 1) of the pixels that the model was trained on."""
    found = [read_json(folder / name) for name in PROCESSOR if (folder / name).is_file()]
    settings = next((f["image_processor"] for f in found if "image_processor" in f), found[0])
    values = (settings.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
    mean, std = (torch.tensor(value)[:, None, None] for value in values)
    return mean, std


def add_lora(model: nn.Module, rank: int) -> None:
    """W x -> W x + (alpha / rank) B A x in every linear layer; A and B are trained, and B is 0 at
    first, so that nothing changes before training. alpha and A's start as in OpenVLA-OFT."""
    peft = _import_peft()
    adapters = peft.LoraConfig(  # "all-linear" leaves out the language model's last layer
        r=rank, lora_alpha=min(rank, 16), target_modules="all-linear", init_lora_weights="gaussian"
    )
    peft.inject_adapter_in_model(adapters, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small steps are lost in bfloat16
            parameter.data = parameter.data.float()


def merge_lora(model: nn.Module) -> None:
    """W <- W + (alpha / rank) B A; the adapters are gone."""
    lora = _import_peft().tuners.lora
    for name, layer in list(model.named_modules()):
        if isinstance(layer, lora.LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())


def _frozen(vlm: nn.Module) -> dict[str, torch.Tensor]:
    named = vlm.named_parameters(remove_duplicate=False)  # tied weights have two names
    return {name: parameter for name, parameter in named if not parameter.requires_grad}


def leave_out_frozen(vlm: nn.Module, state: dict, prefix: str, _metadata) -> None:
    """What is frozen is not saved: a hook of `state_dict`."""
    for name in _frozen(vlm):
        del state[prefix + name]


def fill_in_frozen(vlm: nn.Module, state: dict, prefix: str, *_rest) -> None:
    """Nor is it missed: a hook of `load_state_dict`."""
    for name, parameter in _frozen(vlm).items():
        state[prefix + name] = parameter


# ------------------------------------------------------------------------------ policy, reflector


class VLABackbone(nn.Module):
    """A pretrained model as the policy's backbone, in the manner of OpenVLA-OFT."""

    def __init__(self, config: PretrainedConfig, chunk: int, robot: Robot = METAWORLD):
        super().__init__()
        self.vlm = PretrainedVLM(config)
        width = self.vlm.width
        self.state_token = nn.Sequential(
            nn.Linear(robot.state_dim, width), nn.GELU(), nn.Linear(width, width)
        )
        self.placeholders = nn.Parameter(0.02 * torch.randn(chunk * robot.action_dim, width))
        self.chunk, self.features = chunk, robot.action_dim * width

    def forward(self, image, tokens, state) -> torch.Tensor:
        """(B, 3, H, W) float in [-0.5, 0.5], (B, L), normalised state (B, S)
        -> a step's hidden states side by side, (B, K, A * D)."""
        texts = [f"What action should the robot take to {text}?" for text in words(tokens)]
        placeholders = self.placeholders.expand(len(image), -1, -1)  # (B, K * A, D)
        extra = torch.cat([self.state_token(state)[:, None], placeholders], dim=1)
        hidden = self.vlm(image[:, None], texts, extra)[:, -placeholders.shape[1] :]
        return hidden.reshape(len(image), self.chunk, self.features)

    def save_merged(self, folder: Path) -> None:
        """Write a full checkpoint in the hub's format, the adapters added to the weights:
        W + (alpha / rank) B A. It takes a second copy of the model in memory."""
        model = copy.deepcopy(self.vlm.model)
        if self.vlm.config.lora_rank:
            merge_lora(model)
        model.save_pretrained(folder)
        self.vlm.tokenizer.save_pretrained(folder)
        for path in find(self.vlm.config.checkpoint).glob("*processor_config.json"):
            (folder / path.name).write_bytes(path.read_bytes())


class FrozenReader(nn.Module):
    """A pretrained model as the reflector's eyes: h of the prompt's last token.

    The same frames and words have the same h: each is computed once and remembered, the oldest
    forgotten first. Training, which draws the same frames again and again, then costs little more
    than its head; in the dream nearly every frame is new."""

    question = "First, previous and current picture of a robot that should {}. Has it done so?"
    remembered = 2**15  # rows; of width 4096 half a GiB
    rows = 8  # that are computed at a time: three pictures each

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.vlm = PretrainedVLM(replace(config, gradient_checkpointing=False))
        self.features = self.vlm.width
        self._memory: dict[bytes, torch.Tensor] = {}

    def train(self, mode: bool = True) -> FrozenReader:
        """Always in evaluation mode: what is remembered must not depend on dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(B, 9, H, W) float in [-0.5, 0.5] (first, previous, current), (B, L)
        -> h (B, D), its spread brought to 1."""

        def read(some: list[int]) -> torch.Tensor:
            texts = [self.question.format(text) for text in words(tokens[some])]
            hidden = self.vlm(frames[some].unflatten(1, (3, 3)), texts)[:, -1]
            return F.layer_norm(hidden, hidden.shape[-1:])

        # The same words are the same prompt, however many columns pad them.
        keys = [digest(seen, ids[ids > 0]) for seen, ids in zip(frames, tokens, strict=True)]
        return once(self._memory, keys, read, self.rows, self.remembered).to(frames.device)


def once(memory: dict, keys: list[bytes], compute, rows: int, most: int) -> torch.Tensor:
    """`compute(row numbers)`, `rows` of them at a time, for the rows whose key is not in `memory`;
    the rest from there. Returns all rows, on the processor. `memory` keeps `most` rows, the oldest
    are forgotten first."""
    new = {key: row for row, key in enumerate(keys) if key not in memory}
    found = {key: memory[key] for key in keys if key not in new}
    missing = list(new.values())
    for first in range(0, len(missing), rows):
        some = missing[first : first + rows]
        found |= {keys[row]: x for row, x in zip(some, compute(some).cpu(), strict=True)}
    memory |= found
    while len(memory) > most:
        del memory[next(iter(memory))]
    return torch.stack([found[key] for key in keys])


def digest(*tensors: torch.Tensor) -> bytes:
    """The same for equal tensors, such as frames and words, and for no others."""
    content = b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)
    return hashlib.blake2b(content, digest_size=16).digest()
