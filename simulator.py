"""The world simulator: a video diffusion model that imagines the next frame from memory and action.

Paper's section: "World simulator" (a diffusion U-Net with an action map, a memory of past frames,
and features of a reference image by cross-attention).

    memory: frames t, t-1, t/2, 0 -fold-.
    frame t, carried along       -fold-|
    real frame from the album    -fold-|
    action map of s_t and s_{t+1} -fold-+--> U-Net --> x_0 = (o_{t+1} - o_t), the change --> o_{t+1}
    noise x_tau -------------------fold-'     ^ ^
                                              | '-- action chunk, state
                                              |     (added to the time embedding)
    reference image (frame 0) --> encoder --> tokens (cross-attention at the coarsest resolution)

Symbols: o frame, s state, a chunk, tau diffusion time, F fold (F x F pixels become channels),
M memory frames.

With `SimulatorConfig.pretrained` (latents.py) the same happens in an autoencoder's latents: "pixel"
then means one of their cells, and a frame is encoded before it is folded. The U-Net can begin at a
checkpoint, and the tokens can be those of frozen encoders.

# DEVIATION: the paper fine-tunes a pretrained latent video diffusion model (EVAC); the small preset
#   trains a U-Net of diffusers from scratch on folded pixels; because no checkpoint fits on a
#   laptop's CPU, and folding is lossless. A pretrained U-Net is one for pictures: EVAC has no
#   checkpoint in the format of diffusers.
# DEVIATION: the paper samples a frame in many denoising steps; here in one by default, from the
#   noise's mean, and nine of ten training rows are that case; because a processor has time for one.
#   It is nearly a regression: the dream shows the mean of what may follow.
# DEVIATION: the paper's reference features are VGGT and CLIP; the small preset learns a small
#   encoder for them, behind the same argument (`reference_tokens`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import processes
from album import Album
from camera import Camera
from fit import bf16_autocast, device_of
from kinematics import Kinematics
from latents import FrozenReference, Latents, Pixels, SimulatorModels, check_models, unet_from
from tasks import Robot
from view import HandInView

MEMORY = 4  # M: the current frame, the one before, the one half-way back, and the first
SOURCES = MEMORY + 2  # where a pixel may be copied from: memory, carried and recalled frame
SHARPNESS = 4.0  # of the choice between sources: see `Simulator._denoise`
MARKER, NEAR = 2.0, 8.0  # pixels at 64, standard deviations: a marker; what is near the hand


@dataclass(frozen=True)
class SimulatorConfig:
    """Architecture; the defaults are the small preset's."""

    size: int = 64  # pixels
    chunk: int = 4  # K
    fold: int = 4  # F x F pixels are folded into channels: the U-Net works on size/F
    channels: tuple[int, ...] = (32, 48, 64)  # of the U-Net at size/F, size/2F, size/4F
    album: int = 2048  # real frames that it may look up
    sampling_steps: int = 1  # denoising steps per frame, 1 to 50
    change_scale: float = 4.0  # multiplies the change between frames: its spread is then near 1
    moving_weight: float = 5.0  # extra weight of pixels that change by more than 5 % of the range
    # Further weight of such a pixel, the more the nearer it is to the hand: what the hand touches
    # is few pixels, and the arm would otherwise take most of the loss.
    contact_weight: float = 20.0
    noisiest: float = 0.9  # share of training rows at the noisiest time, where one step samples
    robot: Robot = field(default_factory=Robot)
    # Pretrained models in the place of folding, fresh weights and reference encoder, where named.
    pretrained: SimulatorModels = field(default_factory=SimulatorModels)

    def __post_init__(self) -> None:
        if not 1 <= self.sampling_steps <= 50:
            raise ValueError(
                f"SimulatorConfig.sampling_steps: got {self.sampling_steps}, expected 1 to 50"
            )
        if self.size % (4 * self.fold):
            raise ValueError(
                f"SimulatorConfig: size {self.size} is not a multiple of 4 * fold = {4 * self.fold}"
            )


class ReferenceEncoder(nn.Module):
    """Reference image (B, 3, H, W) -> (B, (H/8)(W/8), width) tokens:
    what is where in the scene at the start."""

    dim = 64  # the width, unless a pretrained U-Net has its own

    def __init__(self, size: int, width: int = dim):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4), nn.SiLU(), nn.Conv2d(32, width, 3, 2, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, padding=1),
        )  # fmt: skip
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 8) ** 2, width))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.convs(image).flatten(2).transpose(1, 2) + self.position


class Simulator(nn.Module):
    """The world simulator. `loss, metrics = simulator(batch)` trains it;
    `next_frame` and `next_state` imagine."""

    frames: Latents | Pixels
    unet: Any  # diffusers' UNet2DConditionModel
    reference: FrozenReference | ReferenceEncoder

    def __init__(self, config: SimulatorConfig, camera: Camera):
        super().__init__()
        from diffusers import DDIMScheduler

        self.config, self.camera = config, camera
        self.hand = HandInView()
        self.hand.look_through(camera)
        models = config.pretrained
        check_models(models, config.size, config.fold, len(config.channels))
        self.frames = Latents(models.autoencoder) if models.autoencoder else Pixels()
        self.frozen_reference = bool(models.clip or models.geometry)
        self.unet, self.begun = self._unet()  # begun: what it took from a checkpoint, "" for none
        width = self.unet.config.cross_attention_dim
        if self.frozen_reference:
            self.reference = FrozenReference(models, width)
        else:
            self.reference = ReferenceEncoder(config.size, width)
        # One scheduler trains (add_noise) and samples (DDIM). The network predicts x_0 itself, so
        # that a single step from pure noise is already the best guess of the next frame.
        # "trailing": the first step is at the noisiest time.
        self.scheduler = DDIMScheduler(
            num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample",
            timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True,
        )  # fmt: skip
        self.kinematics = Kinematics(config.chunk, robot=config.robot)  # trained on its own, before
        # Filled before the U-Net trains.
        self.album = Album(config.album, config.size, config.robot.state_dim)

    def _unet(self) -> tuple[nn.Module, str]:
        from diffusers import UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor

        config, cells = self.config, self.config.fold**2
        ours = {
            "sample_size": config.size // (self.frames.factor * config.fold),
            # Folded: noisy change, the sources, action map (3).
            "in_channels": cells * self.frames.channels * (1 + SOURCES)
            + 3 * cells * self.frames.factor**2,
            "out_channels": (self.frames.channels + 1 + SOURCES) * cells,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": config.chunk * config.robot.action_dim
            + 2 * config.robot.state_dim,
        }
        if config.pretrained.unet:
            return unet_from(config.pretrained.unet, ours)
        unet = UNet2DConditionModel(
            **ours,
            block_out_channels=config.channels,
            # Attention, to itself and to the reference tokens, in the middle block only: on the
            # finer grids it took two fifths of the time and made no frame better [measured here].
            down_block_types=("DownBlock2D",) * len(config.channels),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D",) * len(config.channels),
            layers_per_block=1,
            # Folding has brought the neighbours together already: 1 x 1 saves a sixth of the work.
            conv_in_kernel=1,
            conv_out_kernel=1,
            attention_head_dim=4,  # diffusers' name for the number of heads
            norm_num_groups=16,
            cross_attention_dim=ReferenceEncoder.dim,
        )
        # Plain matrix products: the fused attention of torch takes 60 % of a training step on a
        # CPU, for pictures of 64 tokens [measured here].
        unet.set_attn_processor(AttnProcessor())
        return unet, ""

    def next_state(
        self, state: torch.Tensor, motion: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        """State s_t (B, S), motion m_t (B, S+3) and chunk (B, K, A), on any device
        -> s_{t+1} (B, S), see `kinematics.Kinematics`."""
        device = device_of(self)
        with torch.no_grad():
            return self.kinematics.next_state(*(x.to(device) for x in (state, motion, action)))

    # -- conditions

    def action_map(self, state: torch.Tensor, next_state: torch.Tensor) -> torch.Tensor:
        """Markers of the current and next hand position on black, (B, 3, H, W) float in [0, 1].

        Each pose is projected through the camera and drawn as
        exp(-d^2 / (2 sigma^2)), sigma = MARKER.
        Channels: current position; next position; next position times the gripper's opening.
        """
        now, following = self._blob(state, MARKER), self._blob(next_state, MARKER)
        opening = next_state[:, 3].clamp(0, 1)[:, None, None]
        return torch.stack([now, following, following * opening], dim=1)

    def _blob(self, state: torch.Tensor, sigma: float) -> torch.Tensor:
        """(B, H, W) in [0, 1]: a blob where the hand is seen; sigma in pixels at 64."""
        sigma = sigma * self.config.size / 64
        # Pixel centres.
        grid = torch.arange(self.config.size, dtype=torch.float32, device=state.device) + 0.5
        pixel = (self.hand(state) + 1) * self.config.size / 2  # (B, 2) row, column
        down = torch.exp(-((grid[None] - pixel[:, :1]) ** 2) / (2 * sigma**2))  # (B, H)
        across = torch.exp(-((grid[None] - pixel[:, 1:]) ** 2) / (2 * sigma**2))  # (B, W)
        return down[:, :, None] * across[:, None, :]

    def carried(
        self, frame: torch.Tensor, state: torch.Tensor, next_state: torch.Tensor
    ) -> torch.Tensor:
        """The frame (B, 3, H, W) as if all of it moved as the hand is seen to move.

        carried(p) = o_t(p - d),  d = project(s_{t+1}) - project(s_t), bilinear

        True of the hand and nearly so of what it pushes or holds: these need not be painted again.
        """
        size = self.config.size
        d = (self.hand(next_state) - self.hand(state)).flip(1)  # grid_sample has the column first
        line = (torch.arange(size, device=frame.device) + 0.5) * 2 / size - 1
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
        return F.grid_sample(
            frame, grid - d[:, None, None], padding_mode="border", align_corners=False
        )

    def conditions(
        self, memory, state, next_state, action, scene, owner=None, known=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the U-Net is told beside the noisy change, the same in every denoising step.

        memory: (B, M, 3, H, W) float, newest first; scene, owner: see `album.Album.recall`; known:
        latents of the memory (B, M, c, H/f, W/f), if they need not be encoded.
        Returns sources (B, M+2, cFF, h, w): what a pixel may be copied from, folded: memory, the
        current frame carried along, and the album's frame of the nearest hand, moved to where the
        hand will be; action map (B, 3(Ff)^2, h, w), folded; and vector (B, KA + 2S)."""
        fold = self.config.fold
        carried = self.carried(memory[:, 0], state, next_state)
        frame, seen_at = self.album.recall(next_state, scene, owner)
        recalled = self.carried(_to_float(frame), seen_at, next_state)
        if known is None:
            known = self.frames.encode(memory)
        moved = self.frames.encode(torch.stack([carried, recalled], dim=1))
        sources = folded(torch.cat([known, moved], dim=1), fold)
        drawn = folded(self.action_map(state, next_state), fold * self.frames.factor)
        return sources, drawn, torch.cat([action.flatten(1), state, next_state], dim=1)

    def _denoise(self, noisy, time, sources, drawn, vector, tokens) -> torch.Tensor:
        """The U-Net's guess of x_0 from the noisy change, (B, cFF, h, w) both, at time (B,);
        c = 3, or the channels of the latents. sources, drawn, vector: see `conditions`; tokens:
        see `reference_tokens`.

        For every pixel the network paints a change p and chooses, by a softmax w of the logits z,
        between painting it and copying it from one of the sources:

            w = softmax(SHARPNESS * z),    x_0 = w_paint * p + sum_m k * w_m * (source_m - o_t)

        with k = change_scale.

        A choice that is not sharp mixes a thing's old and new place, and the thing fades.

        # DEVIATION: the paper's network outputs the frame (its latent) directly; here it may copy;
        #   because the camera stands still, and what is merely repainted at every decision turns
        #   into noise after five (PSNR below that of the start frame at the end of an episode).
        """
        output = self.unet(
            torch.cat([noisy, sources.flatten(1, 2), drawn], dim=1),
            time,
            encoder_hidden_states=tokens,
            class_labels=vector,
        ).sample.float()
        # All stays folded: a folded channel is (what it is, where in the F x F pixels it is).
        c, cells = self.frames.channels, self.config.fold**2
        painted, choice = output.unflatten(1, (-1, cells)).split([c, 1 + SOURCES], dim=1)
        weight = (SHARPNESS * choice).softmax(dim=1)  # (B, 1+M+2, FF, h, w)
        copies = sources.unflatten(2, (c, cells))  # (B, M+2, c, FF, h, w)
        x_0, scaled = weight[:, :1] * painted, self.config.change_scale * weight
        for m in range(1, SOURCES):  # source 0 is o_t itself: no change
            x_0 = x_0 + scaled[:, 1 + m, None] * (copies[:, m] - copies[:, 0])
        return x_0.flatten(1, 2)

    def reference_tokens(self, first: torch.Tensor) -> torch.Tensor:
        """First frame (B, 3, H, W) float -> cross-attention tokens (B, tokens, width);
        computed once per episode."""
        return self.reference(first.to(device_of(self)))

    def first_look(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `next_frame` needs to know of first frames (B, 3, H, W) float, the same during an
        episode: (reference tokens, the album's scene distances (B, N))."""
        first = first.to(device_of(self))
        return self.reference_tokens(first), self.album.scene_distance(first)

    # -- training

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Denoising loss on {"memory" (B,M,H,W,3) uint8, "next" (B,H,W,3) uint8,
        "state", "next_state", "action", "owner" (B,) int64, the number of the row's episode}.

        x_0 = k * (o_{t+1} - o_t),   x_tau = sqrt(abar_tau) x_0 + sqrt(1 - abar_tau) eps
        loss = mean( w * (x_0 - f(x_tau, tau, conditions))^2 ),
               w = 1 + moving_weight + contact_weight * exp(-d^2 / (2 NEAR^2))
                   where |o_{t+1} - o_t| > 5 %, d the distance to the hand at t+1; elsewhere 1

        with k = change_scale. In latents o stands for E(o) in x_0, and w for its mean over the
        pixels of a cell.
        """
        memory, following = _to_float(batch["memory"]), _to_float(batch["next"])
        change = following - memory[:, 0]
        start, end = self.frames.encode(memory[:, 0]), self.frames.encode(following)
        target = folded(self.config.change_scale * (end - start), self.config.fold)
        # `noisiest` of the rows train what one-step sampling asks: tau = 999, where abar = 0, so
        # that x_tau is nothing but noise. It is replaced by its mean: the input is 0. The other
        # rows have a random tau and real noise.
        # All is drawn for the rows of all processes; each takes its own.
        rows = len(target) * processes.world()
        time = torch.randint(0, 1000, (rows,), device=target.device)
        noisiest = round(self.config.noisiest * rows)
        time[:noisiest] = 999
        noise = processes.all_rows_like(target).normal_()
        noise[:noisiest] = 0
        time, noise = processes.share(time), processes.share(noise)
        noisy = self.scheduler.add_noise(target, noise, time)
        first = memory[:, -1]
        if self.training:  # imagined memories are never perfect: train on slightly wrong ones
            amount = 0.04 * processes.share(torch.rand(rows, 1, 1, 1, 1, device=memory.device))
            grain = processes.share(processes.all_rows_like(memory).uniform_())
            memory = memory + amount * (grain - 0.5)
        # Frozen encoders read each first frame once, so as it is.
        tokens = self.reference_tokens(first if self.frozen_reference else memory[:, -1])
        scene = self.album.scene_distance(memory[:, -1])
        conditions = self.conditions(
            memory, batch["state"], batch["next_state"], batch["action"], scene, batch["owner"]
        )
        predicted = self._denoise(noisy, time, *conditions, tokens)
        moving = (change.abs().amax(1, keepdim=True) > 0.05).float()
        near = self._blob(batch["next_state"], NEAR)[:, None]
        weight = 1 + moving * (self.config.moving_weight + self.config.contact_weight * near)
        weight = F.avg_pool2d(weight, self.frames.factor)
        weight = folded(weight.expand_as(start), self.config.fold)
        loss = (weight * (predicted - target) ** 2).mean()
        return loss, {}

    # -- imagination

    @torch.no_grad()
    def next_frame(
        self, memory, state, next_state, action, look=None, generator=None
    ) -> torch.Tensor:
        """Imagine o_{t+1} = o_t + x_0 / k, with k = change_scale.

        memory: (B, M, H, W, 3) uint8, newest first (see `memory_indices`);
        state, next_state: (B, S); action: (B, K, A); all on any device; look: from `first_look`,
        if it is known already; generator: of the noise that further steps draw.
        Returns (B, H, W, 3) uint8. Sampling starts from the mean of the noise, so that one step is
        deterministic; with more steps DDIM, all of whose variance is fresh noise, draws in between.
        """
        device = device_of(self)
        frames, memory = memory, _to_float(memory.to(device))
        state, next_state, action = (x.to(device) for x in (state, next_state, action))
        tokens, scene = self.first_look(memory[:, -1]) if look is None else look
        known = self.frames.known(frames, memory)
        now = known[:, 0]
        conditions = self.conditions(memory, state, next_state, action, scene, None, known)
        x = torch.zeros_like(conditions[0][:, 0])
        self.scheduler.set_timesteps(self.config.sampling_steps)
        for time in self.scheduler.timesteps:
            with bf16_autocast(device):
                x_0 = self._denoise(x, time, *conditions, tokens)
            if time > self.scheduler.timesteps[-1]:  # the last step's x is x_0 itself
                x = self.scheduler.step(x_0, time, x, eta=1.0, generator=generator).prev_sample
        change = F.pixel_shuffle(x_0, self.config.fold) / self.config.change_scale
        frame = (self.frames.decode(now + change) + 0.5).clamp(0, 1)
        frame = (frame * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        self.frames.keep(frame, now + change)
        return frame

    def description(self) -> dict:
        """What a checkpoint needs to build this again."""
        return {"config": asdict(self.config), "camera": asdict(self.camera)}


def memory_indices(t: int) -> list[int]:
    """Frames of the history that are remembered at time t: newest first,
    the first frame last (paper: "Memory")."""
    return [t, max(t - 1, 0), t // 2, 0]


def folded(image: torch.Tensor, fold: int) -> torch.Tensor:
    """(..., c, H, W) -> (..., cFF, H/F, W/F): F x F pixels become channels. What
    `F.pixel_unshuffle` gives, in half of its time on a processor [measured here]."""
    cells = image.unflatten(-1, (-1, fold)).unflatten(-3, (-1, fold))  # (..., c, h, F, w, F)
    return cells.movedim((-3, -1), (-4, -3)).flatten(-5, -3)


def _to_float(image: torch.Tensor) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-0.5, 0.5]."""
    # Rearranged while a number is one byte and not four.
    return image.movedim(-1, -3).contiguous().float().div_(255).sub_(0.5)


def transition_batches(episodes, batch: int, seed: int, own_rollouts=None):
    """A `sample(step)` for fit.fit: transitions of all episodes, tasks drawn evenly;
    frames stay uint8 until used.

    own_rollouts(step): a list of (dream, real, begin), see dreams.OwnRollouts; if there are any,
    half of the rows remember dreamt frames and states, and are asked for the real next frame.

    # DEVIATION: the paper trains on recorded frames with one weight for all pixels; here half of
    #   the rows remember the simulator's own, and moving pixels weigh more, those by the hand most
    #   (`Simulator.forward`); because errors add up along a dream, and success is decided there.
    """
    number = {(e.task, e.seed): i for i, e in enumerate(episodes)}  # as `album.Album.fill` counts
    tasks = sorted({episode.task for episode in episodes})
    index = {
        task: [(e, e, t) for e in episodes if e.task == task for t in range(len(e))]
        for task in tasks
    }

    def sample(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, step])
        dreams = own_rollouts(step) if own_rollouts is not None else []
        picks = []
        for i in range(batch):
            if dreams and i % 2:
                seen, real, begin = dreams[rng.integers(len(dreams))]
                picks.append((seen, real, int(rng.integers(begin, len(real)))))
            else:
                rows = index[tasks[rng.integers(len(tasks))]]
                picks.append(rows[rng.integers(len(rows))])
        arrays = {
            "memory": np.stack([seen.image[memory_indices(t)] for seen, _, t in picks]),
            "next": np.stack([real.image[t + 1] for _, real, t in picks]),
            "state": np.stack([seen.state[t] for seen, _, t in picks]),
            "next_state": np.stack([seen.state[t + 1] for seen, _, t in picks]),
            "action": np.stack([real.action[t] for _, real, t in picks]),
            "owner": np.array([number[real.task, real.seed] for _, real, _ in picks]),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return sample
