"""The policy: a vision-language-action model that outputs
a Laplace distribution over a chunk of actions.

Paper's sections: "SFT" (OpenVLA-OFT: the whole chunk decoded in parallel, L1 regression)
and "Scale head".

    image o_t (H, W, 3) --.
    state s_t (S,) --------+--> backbone --> features --> mean head   mu_t   (K, A)
    instruction g (tokens)-'                          '-> scale head  beta_t (K, A)

    a_t ~ Laplace(mu_t, exp(beta_t))

Symbols: mu mean, beta log-scale, K actions in a chunk, A action dimensions, L instruction tokens.

What is kept from the paper: parallel decoding, L1 regression for the mean,
a second head for the log-scale.
# DEVIATION: the paper fine-tunes a 7-billion-parameter VLA; the small preset trains a 0.4 M
#   convolutional network from scratch, FiLM-conditioned on the instruction; because it must learn
#   from 5 demonstrations in a minute and a half on 2 cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import processes
from fit import device_of
from instructions import INSTRUCTIONS
from pretrained import FINGERPRINT, PretrainedConfig, VLABackbone
from tasks import Robot
from view import HandInView, from_the_hand
from vlm import (
    VOCABULARY,
    film_convolutions,
    mean_word,
    read,
    small_llava,
    spatial_softmax,
    tokenize,
)

BLOCK = 64  # rows that a policy which plays looks at together: more leave the processor's cache


@dataclass(frozen=True)
class PolicyConfig:
    """Architecture; the defaults are the small preset's."""

    # "cnn": convolutions with FiLM; "vlm": a small LLaVA of transformers; "pretrained": a large
    # model, named in `pretrained`
    backbone: str = "cnn"
    size: int = 64  # pixels of the image
    chunk: int = 4  # K
    # Channels of the first convolution (the last one has twice as many), or a quarter of the VLM's
    # width.
    width: int = 32
    narrow: bool = False  # its second and third convolution have `width` channels, not twice that
    hidden: int = 384  # width of the two-layer trunk after the image is read
    # exp(-3) = 0.05: below it PPO's ratio becomes too sensitive. exp(-0.7) = 0.5.
    # DEVIATION: the paper names no bounds of its scale; here two, and a scale beyond them gets no
    #   gradient; because imitation of few demonstrations leaves errors near 0, and most scales then
    #   stand at the lower one: so they do after SFT, and in LOOP.
    min_log_scale: float = -3.0
    max_log_scale: float = -0.7
    robot: Robot = field(default_factory=Robot)
    vocabulary: int = VOCABULARY  # tokens that it knows
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)

    def __post_init__(self) -> None:
        if self.backbone not in ("cnn", "vlm", "pretrained"):
            raise ValueError(
                f"PolicyConfig.backbone: got {self.backbone!r}, expected cnn, vlm or pretrained"
            )
        if (self.backbone == "pretrained") != bool(self.pretrained.checkpoint):
            raise ValueError(
                f"PolicyConfig: backbone {self.backbone!r} with the checkpoint "
                f"{self.pretrained.checkpoint!r}; expected both or neither"
            )


class SmallBackbone(nn.Module):
    """Four FiLM convolutions, then spatial softmax: where each feature is, seen from the hand,
    in 2 coordinates.

    Chosen because from 5 demonstrations the position of things is what must generalise: a spatial
    softmax can only report positions (and so cannot memorise textures), and FiLM lets the
    instruction choose whose.
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        width, text_dim = config.width, 64
        self.embed = nn.Embedding(config.vocabulary, text_dim, padding_idx=0)
        self.convs = film_convolutions(3, width, text_dim, config.narrow)
        self.temperature = nn.Parameter(torch.zeros(()))
        self.features = 4 * width + text_dim

    def forward(
        self, image: torch.Tensor, tokens: torch.Tensor, hand: torch.Tensor
    ) -> torch.Tensor:
        """(B, 3, H, W) float in [-0.5, 0.5], (B, L) and the hand's row and column (B, 2) in [-1, 1]
        -> (B, features)."""
        text = mean_word(self.embed, tokens)
        x = image
        for conv in self.convs:
            x = conv(x, text)
        # (B, 2*width, H/4, W/4) -> (B, 4*width)
        where = from_the_hand(spatial_softmax(x, self.temperature.exp()), hand)
        return torch.cat([where, text], dim=-1)


class VLMBackbone(nn.Module):
    """A vision-language model in the place of the convolutions: h of the prompt's last token.

    From five demonstrations and untrained weights it is the weaker choice; for one with pretrained
    weights see `pretrained.VLABackbone`.
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.features = 4 * config.width
        self.vlm = small_llava(
            3, config.size, width=self.features, layers=3, vocabulary=config.vocabulary
        )

    def forward(
        self, image: torch.Tensor, tokens: torch.Tensor, hand: torch.Tensor
    ) -> torch.Tensor:
        """As `SmallBackbone`; where the hand is, it has to see for itself."""
        return read(self.vlm, image, tokens)


class Policy(nn.Module):
    """The VLA. `loss, metrics = policy(batch)` is imitation;
    `act` plays; `distribution` is what PPO needs."""

    shift = 4  # pixels of random shift in training [measured here]
    backbone: Any  # SmallBackbone, VLMBackbone or VLABackbone
    state_mean: torch.Tensor
    state_std: torch.Tensor

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        state_dim, action_dim = config.robot.state_dim, config.robot.action_dim
        self.action_shape = (config.chunk, action_dim)  # (K, A)
        if config.backbone == "pretrained":
            # The state is one of its tokens, and each step of the chunk has features of its own.
            self.backbone = VLABackbone(config.pretrained, config.chunk, config.robot)
            inputs, outputs = self.backbone.features, action_dim
        else:
            # One trunk reads image, text and state, for the whole chunk at once.
            self.backbone = {"cnn": SmallBackbone, "vlm": VLMBackbone}[config.backbone](config)
            inputs, outputs = self.backbone.features + state_dim, config.chunk * action_dim
        self.trunk = nn.Sequential(
            nn.Linear(inputs, config.hidden),
            nn.LayerNorm(config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.LayerNorm(config.hidden),
            nn.SiLU(),
        )
        self.mean_head = nn.Linear(config.hidden, outputs)
        self.scale_head = nn.Linear(config.hidden, outputs)
        nn.init.zeros_(self.scale_head.weight)
        nn.init.constant_(self.scale_head.bias, -1.5)
        self.hand = HandInView()
        # State statistics of the demonstrations (set before training),
        # so that the trunk sees unit-variance inputs.
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))

    def set_state_statistics(self, states: np.ndarray) -> None:
        """states: (N, S) float32 of the demonstrations."""
        self.state_mean.copy_(torch.from_numpy(states.mean(0)))
        self.state_std.copy_(torch.from_numpy(states.std(0)).clamp(min=0.02))

    def distribution(
        self, image, state, tokens, moved: torch.Tensor | float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) float in [-0.5, 0.5], (B, S), (B, L)
        -> mean in (-1.2, 1.2) and log-scale, each (B, K, A): mu = 1.2 tanh(head(h)).

        The log-scale is clamped to the configured range. moved: by how much the image was shifted,
        see `random_shift`."""
        normalised = (state - self.state_mean) / self.state_std
        if self.config.backbone == "pretrained":
            features = self.backbone(image, tokens, normalised)  # (B, K, A * D)
        else:
            features = self.backbone(image, tokens, self.hand(state) + moved)
            features = torch.cat([features, normalised], dim=-1)
        hidden = self.trunk(features)
        shape = (-1, *self.action_shape)
        # Expert actions often sit exactly at the limit: a tanh that reaches 1.2
        # need not go to infinity to say 1.
        mean = 1.2 * torch.tanh(self.mean_head(hidden)).view(shape)
        log_scale = (
            self.scale_head(hidden)
            .view(shape)
            .clamp(self.config.min_log_scale, self.config.max_log_scale)
        )
        return mean, log_scale

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Imitation on {"image" (B,H,W,3) uint8, "state" (B,S) float32, "tokens" (B,L) int64,
        "action" (B,K,A) float32 in [-1, 1]}.

        The mean head is trained by L1 regression,
        the scale head by the Laplace likelihood around the *detached* mean:

            loss = |a - mu|  +  0.1 ( |a - stop_gradient(mu)| / exp(beta) + beta )

        so that the scale head learns how far the mean is off; it moves the mean only through the
        trunk that both share, with a tenth of the weight.
        """
        image = to_float(batch["image"])
        moved: torch.Tensor | float = 0.0
        if self.training:
            image, moved = random_shift(image, self.shift)
        mean, log_scale = self.distribution(image, batch["state"], batch["tokens"], moved)
        l1 = (batch["action"] - mean).abs().mean()
        error = (batch["action"] - mean.detach()).abs()
        likelihood = (error * torch.exp(-log_scale) + log_scale).mean()
        loss = l1 + 0.1 * likelihood  # 0.1: in the trunk that both share L1 must dominate
        return loss, {"l1": l1.item(), "scale": log_scale.exp().mean().item()}

    @torch.no_grad()
    def in_blocks(self, image, state, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """`distribution` for playing: some rows at a time, which stay in the processor's cache."""
        blocks = zip(image.split(BLOCK), state.split(BLOCK), tokens.split(BLOCK), strict=True)
        means, log_scales = zip(*(self.distribution(*block) for block in blocks), strict=True)
        return torch.cat(means), torch.cat(log_scales)

    @torch.no_grad()
    def act(self, observation: dict, running: np.ndarray) -> np.ndarray:
        """The mean chunk (B, K, A) float32, clipped to [-1, 1],
        where the (B,) mask `running` is set, 0 elsewhere."""
        mean, _ = self.in_blocks(*to_tensors(observation, running, device_of(self)))
        chunks = np.zeros((len(running), *mean.shape[1:]), np.float32)
        chunks[running] = mean.clamp(-1, 1).cpu().numpy()
        return chunks

    def parameter_groups(self, rate: float, adapter_rate: float) -> list[dict]:
        """For an optimizer: all that is trained at `rate`, but LoRA at `adapter_rate`."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        adapters = [p for name, p in trained.items() if "lora_" in name]
        if not adapters:
            return [{"params": list(trained.values()), "lr": rate}]
        heads = [p for name, p in trained.items() if "lora_" not in name]
        return [{"params": heads, "lr": rate}, {"params": adapters, "lr": adapter_rate}]

    def merged(self, folder: Path) -> Policy:
        """The same policy without adapters: they are added to the weights of the pretrained model,
        which is written to `folder` whole, in the hub's format."""
        self.backbone.save_merged(folder)
        large = replace(self.config.pretrained, checkpoint=str(folder), lora_rank=0)
        policy = Policy(replace(self.config, pretrained=large))
        heads = {name: x for name, x in self.state_dict().items() if "lora_" not in name}
        del heads[f"backbone.vlm.{FINGERPRINT}"]  # with the adapters added, the model is another
        policy.load_state_dict(heads)
        return policy.to(device_of(self)).eval()


def to_float(image: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-0.5, 0.5]."""
    return image.permute(0, 3, 1, 2).float().div_(255).sub_(0.5)


def random_shift(image: torch.Tensor, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift each image (B, C, H, W) by up to `pixels` in both directions,
    edges repeated: the main augmentation.

    Returns the images and by how much they moved down and to the right, (B, 2), the picture being
    [-1, 1]."""
    b, _, h, w = image.shape
    padded = F.pad(image, (pixels,) * 4, mode="replicate")
    everywhere = (b * processes.world(), 2)  # drawn for the rows of all processes
    offsets = processes.share(torch.randint(0, 2 * pixels + 1, everywhere))
    shifted = torch.stack(
        [p[:, r : r + h, c : c + w] for p, (r, c) in zip(padded, offsets.tolist(), strict=True)]
    )
    moved = (pixels - offsets) * torch.tensor([2 / h, 2 / w])
    return shifted, moved.to(image.device)


def to_tensors(
    observation: dict, running: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `running` rows of an environment's observation
    as (image float, state, tokens) on `device` for `Policy.distribution`."""
    image = torch.from_numpy(observation["image"][running]).to(device)
    texts = [text for text, on in zip(observation["instruction"], running, strict=True) if on]
    state = torch.from_numpy(observation["state"][running]).to(device)
    return to_float(image), state, tokenize(texts).to(device)


def laplace_log_prob(
    action: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """log p(a) = -|a - mu| / exp(beta) - beta - log 2, elementwise
    (the tests compare it with torch.distributions)."""
    return -(action - mean).abs() * torch.exp(-log_scale) - log_scale - math.log(2)


def mean_chunks(policy: Policy, episodes) -> list[np.ndarray]:
    """The mean chunk on every frame of every episode but the last: arrays (T, K, A) float32 in
    [-1, 1]."""
    chunks = []
    for episode in processes.share(episodes):
        chunks.append(policy.act(*seen_along(episode)))
    return processes.gather(chunks)


def seen_along(episode) -> tuple[dict, np.ndarray]:
    """What a policy sees before each of an episode's T decisions, as T slots: (observation, the
    mask (T,) of all)."""
    observation = {
        "image": episode.image[:-1],
        "state": episode.state[:-1],
        "instruction": [episode.instruction] * len(episode),
    }
    return observation, np.ones(len(episode), bool)


def imitation_batches(episodes, batch: int, seed: int):
    """A `sample(step)` for fit.fit: decisions of the episodes up to the first success,
    tasks drawn evenly.

    Each decision is paired with one of its task's wordings at random, so that the policy does not
    depend on one.
    """
    tasks = sorted({episode.task for episode in episodes})
    by_task = [[e for e in episodes if e.task == task] for task in tasks]
    columns = [  # of each task, its decisions one after the other: (M, H, W, 3), (M, S), (M, K, A)
        {
            name: torch.from_numpy(
                np.concatenate([getattr(e, name)[: e.until_success] for e in group])
            )
            for name in ("image", "state", "action")
        }
        for group in by_task
    ]
    wordings = [tokenize(INSTRUCTIONS[task]) for task in tasks]  # (3, L) each

    def sample(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, step])
        which = rng.integers(len(tasks), size=batch)
        rows = [int(rng.integers(len(columns[t]["image"]))) for t in which]
        data = {
            name: torch.stack([columns[t][name][r] for t, r in zip(which, rows, strict=True)])
            for name in ("image", "state", "action")
        }
        data["tokens"] = torch.stack(
            [wordings[t][int(rng.integers(len(wordings[t])))] for t in which]
        )
        return data

    return sample
