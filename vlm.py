"""Words and pictures: the tokenizer, convolutions that read an instruction, and two small
vision-language models around a language model of transformers.

`KeypointVLM` (the reflector) has a convolutional vision encoder that reports where things are;
`small_llava` (the policy's `backbone="vlm"`) is transformers' LLaVA with CLIP's vision encoder.
Only their sizes are ours, so that they train from scratch on a processor.

Symbols: B batch, C channels of a picture (3 per frame), L instruction tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from instructions import METAWORLD_INSTRUCTIONS
from libero_tasks import LIBERO_INSTRUCTIONS
from view import from_the_hand

TOKENS = 24  # L: instructions are padded or cut to this many tokens (the longest here has 19)
IMAGE_TOKENS = 4  # of `KeypointVLM`: what the picture says, in so many words


def words_of(instructions: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Every word of {task: wordings}, sorted."""
    return sorted(
        {w for texts in instructions.values() for t in texts for w in re.findall(r"[a-z]+", t)}
    )


def build_tokenizer():
    """A word-level tokenizer over every word of the instructions (0 pads, 1 is unknown): those of
    Meta-World, then those that only LIBERO has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = words_of(METAWORLD_INSTRUCTIONS)
    words += [word for word in words_of(LIBERO_INSTRUCTIONS) if word not in words]
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: i + 2 for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("removed"), pre_tokenizers.Whitespace()]
    )
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=0, pad_token="[PAD]")
    return tokenizer


_TOKENIZER = build_tokenizer()
# How many tokens a network knows: those of Meta-World's instructions, or those of LIBERO's as well.
VOCABULARY = 2 + len(words_of(METAWORLD_INSTRUCTIONS))
LIBERO_VOCABULARY = _TOKENIZER.get_vocab_size()


def tokenize(texts: list[str] | tuple[str, ...]) -> torch.Tensor:
    """Instructions -> token ids (B, L) int64, padded with 0."""
    return torch.tensor([_ids(text) for text in texts], dtype=torch.int64)


@lru_cache(maxsize=1024)
def _ids(text: str) -> tuple[int, ...]:
    """Of one instruction; the few of a run are asked for at every decision of every slot."""
    return tuple(_TOKENIZER.encode(text).ids)


def without_padding(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L) without the last columns that pad every row, (B, longest): to a language model
    they say nothing, and cost as much as words."""
    return tokens[:, : max(1, int((tokens > 0).sum(1).max()))]


def words(tokens: torch.Tensor) -> list[str]:
    """Token ids (B, L) -> the instructions again, in lower case and without punctuation."""
    return [_TOKENIZER.decode([i for i in row if i]) for row in tokens.tolist()]


# ----------------------------------------------------------------------------------- convolutions


class FiLMConv(nn.Module):
    """Convolution, GroupNorm, feature-wise scale and shift from the instruction, SiLU."""

    def __init__(self, channels_in: int, channels: int, stride: int, text_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.film = nn.Linear(text_dim, 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Feature maps (B, C, H, W) and words (B, D) -> (B, C', H/stride, W/stride):

        SiLU((1 + gamma) norm(conv(x)) + delta),   (gamma, delta) = W text
        """
        gamma, delta = self.film(text).chunk(2, dim=1)
        x = self.conv(x)
        # (1 + gamma) (w n + b) + delta  =  scale n + shift,   n: normalised
        scale = (1 + gamma) * self.norm.weight
        shift = (1 + gamma) * self.norm.bias + delta
        # A GroupNorm knows a scale for each channel, not for each picture's: with all pictures'
        # channels side by side it does the whole in one pass, a tenth of a training step less
        # [measured here].
        side_by_side, groups = x.flatten(0, 1)[None], len(x) * self.norm.num_groups
        normed = F.group_norm(side_by_side, groups, scale.flatten(), shift.flatten(), self.norm.eps)
        return F.silu(normed).view_as(x)


def film_convolutions(channels: int, width: int, text_dim: int) -> nn.ModuleList:
    """Pictures of `channels` channels -> feature maps (B, 2 * width, H/4, W/4), in four steps."""
    return nn.ModuleList(
        [
            FiLMConv(channels, width, 2, text_dim),
            FiLMConv(width, width, 2, text_dim),
            FiLMConv(width, width, 1, text_dim),
            FiLMConv(width, 2 * width, 1, text_dim),
        ]
    )


def mean_word(embed: nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L), 0 pads -> the mean embedding of the words, (B, D)."""
    mask = (tokens > 0).unsqueeze(-1)
    return (embed(tokens) * mask).sum(1) / mask.sum(1).clamp(min=1)


def spatial_softmax(x: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """Feature maps (B, C, H, W) -> the expected row and column of each, (B, 2C) in [-1, 1]."""
    b, c, h, w = x.shape
    attention = (x.flatten(2) * sharpness).softmax(-1).view(b, c, h, w)
    rows = torch.linspace(-1, 1, h, device=x.device)
    columns = torch.linspace(-1, 1, w, device=x.device)
    row = (attention.sum(3) * rows).sum(-1)
    column = (attention.sum(2) * columns).sum(-1)
    return torch.cat([row, column], dim=1)


class Keypoints(nn.Module):
    """Pictures of C channels, words (B, D) -> where `features` learned features are, (B, 2F): rows,
    then columns, in [-1, 1]."""

    def __init__(self, channels: int, features: int, text_dim: int):
        super().__init__()
        self.convs = film_convolutions(channels, features // 2, text_dim)
        self.log_sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, picture: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = picture
        for conv in self.convs:
            x = conv(x, text)
        return spatial_softmax(x, self.log_sharpness.exp())


class KeypointVLM(nn.Module):
    """Vision encoder, projector, language model, as in LLaVA:

        picture --FiLM convolutions--> keypoints --+--projector--> image tokens --.
        numbers -----------------------------------'                              |
        instruction -----------------------------------> word embeddings ---------+--> Llama --> h

    A keypoint says where a feature is, seen from the hand (spatial softmax), how strong there, and
    how strong on average. The language model is transformers' Llama, two layers.
    """

    def __init__(self, channels: int, width: int, numbers: int, vocabulary: int = VOCABULARY):
        """numbers: how many plain numbers beside the picture (proprioception) it reads;
        vocabulary: how many tokens it knows."""
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        keypoints = width // 2
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.convs = film_convolutions(channels, keypoints // 2, width)
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        self.projector = nn.Sequential(
            nn.Linear(4 * keypoints + numbers, 2 * width), nn.LayerNorm(2 * width), nn.SiLU(),
            nn.Linear(2 * width, IMAGE_TOKENS * width),
        )  # fmt: skip
        self.llama = LlamaModel(
            LlamaConfig(
                vocab_size=1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
                bos_token_id=None, eos_token_id=None,
                attn_implementation="eager",  # fused attention is slow on a CPU at this size
            )
        )  # fmt: skip

    def forward(
        self,
        picture: torch.Tensor,
        tokens: torch.Tensor,
        numbers: torch.Tensor,
        hand: torch.Tensor,
    ) -> torch.Tensor:
        """(B, C, H, W) float in [-0.5, 0.5], tokens (B, L), numbers (B, N) near [-1, 1], the hand's
        row and column (B, 2) in [-1, 1] -> h of the last token, (B, width)."""
        x, text = picture, mean_word(self.words, tokens)
        for conv in self.convs:
            x = conv(x, text)
        where = from_the_hand(spatial_softmax(x, self.log_sharpness.exp()), hand)
        what = torch.cat([where, x.amax((2, 3)), x.mean((2, 3)), numbers], dim=1)
        image = self.projector(what).unflatten(1, (IMAGE_TOKENS, -1))
        # Words first, image last: the last token is an image token, whatever the padding.
        mask = torch.cat([tokens > 0, tokens.new_ones(len(tokens), IMAGE_TOKENS).bool()], dim=1)
        mask = mask.long()
        prompt = torch.cat([self.words(tokens), image], dim=1)
        hidden = self.llama(
            inputs_embeds=prompt,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # padding takes no position
            use_cache=False,
        )
        return hidden.last_hidden_state[:, -1].float()


# ------------------------------------------------------------------------------------------- LLaVA


class ConvStem(nn.Sequential):
    """Patch embedding by three strided convolutions in the place of CLIP's single one.

    # DEVIATION: CLIP cuts the picture into patches with one linear map; here convolutions do it
    #   (Xiao et al. 2021, "Early convolutions help transformers see better"); because from a few
    #   thousand frames and untrained weights the linear map does not learn within minutes.
    """

    def __init__(self, channels: int, width: int):
        super().__init__(
            nn.Conv2d(channels, width // 4, 3, 2, padding=1), nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 3, 2, padding=1), nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, 2, padding=1),
        )  # fmt: skip

    @property
    def weight(self) -> torch.Tensor:
        """CLIP's embedding asks its patch embedding for the dtype of its weight."""
        return self[0].get_parameter("weight")


def small_llava(channels: int, size: int, width: int, layers: int, vocabulary: int = VOCABULARY):
    """A LlavaModel with untrained weights: pictures of `channels` channels, size x size pixels in
    patches of 8 x 8; `layers` vision layers of `width`, and two of the language model.

    The token after the vocabulary's is the placeholder that image features replace."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, image_size=size, patch_size=8, num_channels=channels,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary + 1, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    llava = LlavaModel(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=vocabulary,
            vision_feature_layer=-1,  # LLaVA leaves out the last layer of a pretrained encoder
            attn_implementation="eager",  # fused attention is slow on a CPU at this size
        )
    )
    # Where the embeddings hang changed between versions of transformers.
    tower = getattr(llava.vision_tower, "vision_model", llava.vision_tower)
    tower.embeddings.patch_embedding = ConvStem(channels, width)
    return llava


def read(llava, picture: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The last token's hidden state h (B, width), which has read everything.

    picture: (B, C, H, W) float in [-0.5, 0.5]; tokens: (B, L) int64 from `tokenize`.
    """
    config = llava.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    # The prompt: padding, image placeholders, instruction. All padding goes to the very left:
    # the last token is then always a word, and the distance from image to words (rotary
    # positions) does not depend on the padding.
    image_token = llava.config.text_config.vocab_size - 1
    placeholders = torch.full((len(tokens), patches), image_token, device=tokens.device)
    ids = torch.cat([placeholders, tokens], dim=1)
    ids = ids.gather(1, (ids > 0).long().argsort(dim=1, stable=True))
    mask = (ids > 0).long()
    hidden = llava(
        input_ids=ids, pixel_values=4 * picture, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hidden[:, -1].float()
