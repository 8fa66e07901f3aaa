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

A checkpoint is a folder in the hub's format or a hub id (hub.py). Whatever is wrong with one is
told in one line, a `BadCheckpoint`, before a weight is loaded (`check`). A new family of models is
one row of `FAMILIES`; one that takes plain pictures and plain words needs none.

Symbols: B batch, P pictures in a prompt, N = B * P, n image tokens of a picture, L tokens of a
prompt, T extra tokens behind it, D width of the language model, K steps of a chunk, A action
dimensions, S state.

# DEVIATION: the paper's VLA is OpenVLA-OFT; here an image-text model of transformers, its picture
#   in one piece; because OpenVLA is code that comes with its checkpoint, and only weights as
#   safetensors are taken from there, no code and no pickle.
# DEVIATION: OpenVLA-OFT's action tokens are empty and see each other; here they are learned and see
#   what the family's mask lets them (PaliGemma: each other, the rest: those before); because a mask
#   from outside would have to be written anew for every architecture.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fit import bf16_autocast
from hub import (
    LIBRARY_ERRORS,
    OVERHEAD,
    BadCheckpoint,
    check_download,
    check_room,
    complain_of,
    find,
    first_line,
    headers,
    loading,
    memory_needed,
    read_json,
    weight_files,
)
from tasks import METAWORLD, Robot
from vlm import words

if TYPE_CHECKING:  # for annotations only: nothing is imported before it is needed
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PretrainedConfig:
    """Which model, and how it is held. The default, no checkpoint, means: none is used."""

    checkpoint: str = ""  # hub id ("owner/name", "owner/name@revision") or folder
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
    spelled: tuple[str, ...] = ()  # tags that some of its tokenizers have no token for
    whole_prompt: bool = False  # whether tokens of the prompt see the later ones too
    whole_picture: bool = False  # whether image tokens see the later ones of their picture

    def write(self, text: str, pictures: int, image: str, bos: str) -> str:
        """The prompt. image: a picture's n placeholders; bos: as in `prompt`."""
        shown = self.picture.format(image=image) * pictures
        return self.prompt.format(bos=bos, pictures=shown, text=text)


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
    spelled=("<global-img>",),
)
QWEN = Family(
    qwen_patches,
    picture="<|vision_start|>{image}<|vision_end|>",
    prompt="<|im_start|>user\n{pictures}{text}<|im_end|>\n<|im_start|>assistant\n",
)
QWEN_2 = replace(
    QWEN, prompt=f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{QWEN.prompt}"
)
FAMILIES = {  # by the `model_type` of config.json
    "smolvlm": SMOLVLM,
    # {bos}: that of Llama, or of the first SmolVLM, which is of this type too.
    "idefics3": replace(SMOLVLM, prompt="{bos}User:{pictures}{text}<end_of_utterance>\nAssistant:"),
    "qwen2_vl": QWEN_2,
    "qwen2_5_vl": QWEN_2,
    "qwen3_vl": QWEN,
    "paligemma": Family(plain_picture, prompt="{pictures}{bos}{text}\n", whole_prompt=True),
    "gemma3": Family(
        plain_picture,
        picture="\n\n<start_of_image>{image}<end_of_image>\n\n",
        prompt="{bos}<start_of_turn>user\n{pictures}{text}<end_of_turn>\n<start_of_turn>model\n",
        whole_picture=True,
    ),
    "llava": Family(
        plain_picture, picture="{image}\n", prompt="{bos}USER: {pictures}{text} ASSISTANT:"
    ),
}


# ------------------------------------------------------------------- finding, checking and loading

FINGERPRINT = "fingerprint"  # in a `state_dict`, of the frozen weights (`keep_frozen_out`)
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # either will do
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def check(config: PretrainedConfig, device: str = "cpu") -> int:
    """Bytes that the model takes on the device (an estimate), if nothing speaks against loading it;
    else BadCheckpoint: a missing package or file, too little memory, an architecture that does not
    read pictures and text, weights that are missing or another's. No weight is read."""
    judge = partial(
        check_download, config.checkpoint, name="model", bf16=config.bf16, device=device
    )
    files = weight_files(check_files(config, judge))
    needed = memory_needed(files, config.bf16)
    check_room(config.checkpoint, round(needed / OVERHEAD), say=False)  # it is loaded there first
    check_room(config.checkpoint, needed, device)
    PretrainedVLM(replace(config, lora_rank=0), weights=False)
    return needed


def check_files(config: PretrainedConfig, judge: Callable[[Path], None] | None = None) -> Path:
    """The checkpoint's folder, if it has files and architecture that are wanted. judge: `find`."""
    from transformers.models.auto import modeling_auto

    if config.lora_rank:
        _import_peft()
    folder = find(config.checkpoint, judge=judge)
    for names in (("config.json",), TOKENIZER, PROCESSOR):
        if not any((folder / name).is_file() for name in names):
            raise BadCheckpoint(
                f"{folder}: {' or '.join(names)} is missing; expected a checkpoint in the hub's "
                "format; download or save it again, whole"
            )
    kind = read_json(folder / "config.json").get("model_type")
    known = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known:
        raise BadCheckpoint(
            f"{folder}: unknown architecture {kind!r}; expected one of transformers that reads "
            f"pictures and text, such as {', '.join(FAMILIES)}; choose another checkpoint"
        )
    return folder


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise BadCheckpoint(
            "LoRA: the package peft is missing; expected what requirements-gpu.txt lists; "
            "run: python -m pip install --no-deps -r requirements-gpu.txt"
        ) from error
    return peft


def load(folder: Path, bf16: bool, weights: bool = True):
    """(tokenizer, image-text model with its weights, frozen); BadCheckpoint where the weights are
    not those of the architecture. weights=False: on the meta device, by the files' headers."""
    from transformers import AutoTokenizer

    dtype = torch.bfloat16 if bf16 else torch.float32
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    with loading(folder, "an image-text model with its own config.json"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", trust_remote_code=False, local_files_only=True
        )
        model, info = _model(folder, weights, told)
        complain_of(info)
        if not hasattr(model.base_model, "get_image_features"):
            raise ValueError(f"{type(model).__name__} has no get_image_features")
    return tokenizer, model.eval().requires_grad_(False)


def _model(folder: Path, weights: bool, told: dict[str, Any]):
    """(model, loading info)."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
    from transformers import AutoModelForImageTextToText as Auto

    own: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if weights:
        return Auto.from_pretrained(folder, use_safetensors=True, **own, **told)
    config = AutoConfig.from_pretrained(folder, **own)
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    state = headers(weight_files(folder))
    return kind.from_pretrained(None, config=config, state_dict=state, device_map="meta", **told)


# ------------------------------------------------------------------------------------- the model


class PretrainedVLM(nn.Module):
    """An image-text model and its tokenizer: pictures, text and extra tokens -> hidden states. What
    is frozen is not in its `state_dict`: what is saved is what was trained."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: PretrainedConfig, weights: bool = True):
        """weights=False: on the meta device, without numbers; BadCheckpoint as from `check`."""
        super().__init__()
        folder = check_files(config)
        self.config = config
        if weights:  # a model that goes on to a GPU is in the machine's memory first
            held = memory_needed(weight_files(folder), config.bf16) / OVERHEAD
            check_room(config.checkpoint, round(held), say=False)
        self.tokenizer, self.model = load(folder, config.bf16, weights)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config.gradient_checkpointing:
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new, old
            name = next(name for name in names if hasattr(self.model, name))
            getattr(self.model, name)({"use_reentrant": False})
            # It also made the inputs ask for gradients, which only reentrant checkpoints need.
            self.model.disable_input_require_grads()
        kind = self.model.config.model_type
        self.family = FAMILIES.get(kind, Family(plain_picture))
        self.width = self.model.get_input_embeddings().embedding_dim  # D
        mean, std = picture_statistics(folder)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if not weights:
            self.to("meta")
        # Qwen's eyes read numbers. That an architecture of a row can be fed is tested.
        self.image_tokens = self._tokens_of_a_picture() if weights or kind not in FAMILIES else 0
        self._check_tokens(folder)
        if config.lora_rank:
            add_lora(self.model, config.lora_rank)
        if weights:
            keep_frozen_out(self)

    @torch.no_grad()
    def _tokens_of_a_picture(self) -> int:
        """n, by trial: not every configuration says it. BadCheckpoint where the architecture wants
        its pictures in another form."""
        try:
            taken = inspect.signature(self.base.forward).parameters
            if self.family not in FAMILIES.values() and any("token_type" in name for name in taken):
                raise ValueError("it wants to be told which tokens are a picture's")
            picture = torch.zeros(1, 1, 3, 8, 8, device=self.mean.device)
            seen = self.base.get_image_features(**self.inputs(picture))
            features = torch.cat(list(seen.pooler_output))
            if features.shape != (len(features), self.width):
                raise ValueError(f"its image tokens are {tuple(features.shape)}")
            self.base.config.image_token_id  # noqa: B018 (prompts need it)
        except LIBRARY_ERRORS as error:
            raise BadCheckpoint(
                f"{self.config.checkpoint}: the architecture {self.model.config.model_type!r} does "
                f"not take plain pictures ({first_line(error)}) and needs a row in "
                f"pretrained.FAMILIES; expected one of {', '.join(FAMILIES)}; choose another "
                "checkpoint, or write the row"
            ) from error
        return len(features)

    def _check_tokens(self, folder: Path) -> None:
        """BadCheckpoint where a special token of the prompt is none of the tokenizer's: it would be
        read as text, and a picture would find no place."""
        tokenizer, family = self.tokenizer, self.family
        with loading(folder, "the tokenizer of its own config.json"):
            number = self.base.config.image_token_id
            image = tokenizer.convert_ids_to_tokens(number)
            if image is None:
                raise ValueError(f"its tokenizer has no token {number}, an image token's number")
            if tokenizer.pad_token is None:
                raise ValueError("its tokenizer has neither pad_token nor eos_token")
            special = {image, *re.findall("<[^<>]+>", family.picture + family.prompt)}
            for word in sorted(special.difference(family.spelled)):
                # Twice: an ordinary word would not be found where nothing parts it from the next.
                ids = tokenizer(2 * word, add_special_tokens=False)["input_ids"]
                if tokenizer.convert_ids_to_tokens(ids) != [word, word]:
                    raise ValueError(f"{word} is no special token of its tokenizer")

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
        if side is None:  # Qwen takes any: 8 x 8 tokens, 224 or 256 pixels
            side = 8 * vision.patch_size * vision.spatial_merge_size
        pixels = enlarged(pictures.flatten(0, 1), side, self.mean, self.std)
        return self.family.inputs(pixels.to(self.model.dtype), config)

    def prompts(self, texts: list[str], pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (B, L) of `pictures` pictures and a text, padded on the
        left: the last token is a word in every row."""
        image = self.tokenizer.convert_ids_to_tokens(self.base.config.image_token_id)
        fixed = {"image": image * self.image_tokens, "bos": self.tokenizer.bos_token or ""}
        rows = [self.family.write(text, pictures, **fixed) for text in texts]
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
            seen = base.get_image_features(**inputs)  # picture by picture, n of each
            images = torch.cat(list(seen.pooler_output)).to(tokens.dtype)
            tokens = tokens.masked_scatter(is_image[..., None], images)
            if extra is not None:
                behind = (0, extra.shape[1])
                tokens = torch.cat([tokens, extra.to(tokens.dtype)], dim=1)
                ids, is_image = F.pad(ids, behind), F.pad(is_image, behind)
                mask = F.pad(mask, behind, value=1)
            more: dict[str, Any] = {}
            if self.family.whole_prompt:
                more["token_type_ids"] = torch.zeros_like(ids)
            if self.family.whole_picture:
                more["token_type_ids"] = is_image.long()
            if "image_grid_thw" in inputs:  # positions in time, row and column (Qwen)
                more["position_ids"], _ = base.get_rope_index(
                    ids,
                    mm_token_type_ids=is_image.int(),
                    image_grid_thw=inputs["image_grid_thw"],
                    attention_mask=mask,
                )
            reader: Any = base
            if hasattr(seen, "deepstack_features"):  # Qwen 3 adds them to its first layers' states
                # Of a layer one tensor, or in newer versions of transformers one for each picture.
                layers = [torch.cat(list(layer)) for layer in seen.deepstack_features]
                lower = [layer.view(-1, images.shape[1]) for layer in layers]
                more |= {"visual_pos_masks": is_image, "deepstack_visual_embeds": lower}
                reader = base.language_model
            hidden = reader(inputs_embeds=tokens, attention_mask=mask, use_cache=False, **more)
        return hidden.last_hidden_state.float()


def enlarged(pictures, side: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) float in [-0.5, 0.5] -> (N, 3, side, side), by the model's mean and spread."""
    pixels = F.interpolate(pictures + 0.5, (side, side), mode="bicubic", antialias=True)
    return (pixels.clamp(0, 1) - mean) / std  # bicubic interpolation overshoots


def picture_statistics(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3, 1, 1) of the pixels that the model was trained on."""
    found = [read_json(folder / name) for name in PROCESSOR if (folder / name).is_file()]
    settings = next((f["image_processor"] for f in found if "image_processor" in f), found[0])
    if not isinstance(settings, dict):
        settings = dict.fromkeys(("image_mean", "image_std"))
    values: list[Any] = [settings.get(name, [0.5] * 3) for name in ("image_mean", "image_std")]
    if not all(map(_three_numbers, values)) or min(values[1]) <= 0:
        raise BadCheckpoint(
            f"{folder}: image_mean is {values[0]!r} and image_std {values[1]!r}; expected three "
            f"numbers each, the latter above 0, in {' or '.join(PROCESSOR)}; download it again"
        )
    mean, std = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in values)
    return mean, std


def _three_numbers(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return all(type(x) in (int, float) and abs(x) < 1e6 for x in value)  # no bool, no NaN


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


def keep_frozen_out(vlm: nn.Module) -> None:
    """From now on `state_dict` has a fingerprint, (16,) uint8, in the place of what is frozen, and
    `load_state_dict` refuses another's: adapters and heads mean nothing on other weights, such as
    those of a later revision on the hub. (It has the first numbers of each weight.)"""
    samples = [digest(p.flatten()[:64].bfloat16().float()) for p in _frozen(vlm).values()]
    content = hashlib.blake2b(b"".join(sorted(samples)), digest_size=16).digest()
    vlm.fingerprint = torch.tensor(list(content), dtype=torch.uint8)
    vlm.register_state_dict_post_hook(_leave_out_frozen)
    vlm.register_load_state_dict_pre_hook(_fill_in_frozen)


def _leave_out_frozen(vlm: Any, state: dict, prefix: str, _metadata) -> None:
    for name in _frozen(vlm):
        del state[prefix + name]
    state[prefix + FINGERPRINT] = vlm.fingerprint


def _fill_in_frozen(vlm: Any, state: dict, prefix: str, *_rest) -> None:
    kept = state.pop(prefix + FINGERPRINT, None)  # a merged policy comes without
    if kept is not None and not torch.equal(kept.cpu(), vlm.fingerprint):
        raise BadCheckpoint(
            "the frozen weights are not those that this was trained on; "
            "expected the same model; name its revision (owner/name@revision), or train again"
        )
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
