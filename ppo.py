"""LOOP: leave-one-out PPO on rollouts in any environment, imagined or real.
The algorithm of the paper.

Paper's section: "RL post-training". What is kept and what is not:

    1. kept     N = 8 rollouts per group, one scalar return R_n per rollout,
                and the leave-one-out baseline
    2. kept     no critic, no whitening of advantages, clip eps = 0.1
    3. kept     the ratio from the log-probabilities of the Laplace policy, r = 1 at the first step
    4. departs  *branching*: see `branch_rollouts`; with `branch=0` rollouts are the paper's
                (`plain_rollouts`), and `train --plain` takes back the penalty of 5 and all of 7
    5. departs  the return may carry a small time penalty, so that a group in which all succeed
                still has spread; and it is 0 where nothing stopped the episode
    6. departs  every weight of the small policy is trained with one rate (no LoRA: there is no
                large backbone); a pretrained one has LoRA and two rates, as in the paper
    7. departs  the policy's scale is multiplied by `noise`; an iteration learns from `decisions`
                rows at the most, and ends early at `max_kl`

Leave-one-out on three numbers: returns (1, 0, 0.5) have baselines (0.25, 0.75, 0.5), the means of
the other two, and so advantages (0.75, -0.75, 0). They sum to zero: a group can only redistribute
credit.

Symbols: G groups, N rollouts per group, K steps per chunk, A action dimensions, D decisions that
carry noise.

Several processes share the groups of an iteration, then all hold all rollouts and share the rows of
each minibatch: processes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import processes
from fit import clip_gradients, device_of
from policy import BLOCK, Policy, laplace_log_prob, to_float, to_tensors
from resume import Keeper, set_training_state, training_state
from tasks import Start


@dataclass(frozen=True)
class LoopConfig:
    """The RL settings; the defaults paid in the real simulator (results/RECIPE.md).

    # DEVIATION: the paper explores at the policy's own scale, learns from every decision and makes
    #   all passes; here `noise`, `time_penalty`, `decisions` and `max_kl`; because a small policy
    #   is sure of itself: at its own scale few groups have spread, and Adam's steps are wide.
    """

    iterations: int = 10
    groups: int = 32  # G, groups per iteration
    rollouts: int = 8  # N [paper]
    # noisy decisions after the branching point;
    # 0: noise in every decision from the start [paper: 0]
    branch: int = 3
    # one draw for all noisy decisions of a branch: an offset that is held, no jolts [paper: False]
    held: bool = False
    noise: float = 2.0  # multiplies the policy's scale while exploring [paper: 1]
    time_penalty: float = 0.1  # R_n = R at the stop * (1 - time_penalty * T / horizon) [paper: 0]
    clip: float = 0.1  # eps [paper]
    epochs: int = 4  # passes over an iteration's decisions
    minibatch: int = 1024  # decisions
    # At most so many noisy decisions of an iteration are learned from, drawn at random [paper:
    # all]. The default's 32 x 8 x 3 = 768 are fewer.
    decisions: int = 1024
    learning_rate: float = 4e-5  # at 1e-4 Adam's first steps already clip 60 % of the ratios
    # of LoRA on a pretrained backbone [paper]; the heads then have `learning_rate` [paper: 1e-5]
    adapter_rate: float = 1e-4
    # no further pass in an iteration when the approximate KL before a pass's steps exceeds this
    max_kl: float = 0.05

    def __post_init__(self) -> None:
        if self.rollouts < 2:
            raise ValueError(
                f"LoopConfig.rollouts: got {self.rollouts}, expected 2 or more "
                "(leave-one-out needs others)"
            )


# The paper's loop, but for the 0 of `_returns` and the rows that `update` leaves out.
PLAIN: dict[str, Any] = {
    "branch": 0, "noise": 1.0, "time_penalty": 0.0, "decisions": 1_000_000, "max_kl": 1000.0,
}  # fmt: skip


@dataclass
class Rollouts:
    """The noisy decisions of one iteration, flattened to M rows in the order in which they were
    taken, and the returns of the groups."""

    image: np.ndarray  # (M, H, W, 3) uint8
    state: np.ndarray  # (M, S) float32
    tokens: torch.Tensor  # (M, L) int64
    sample: torch.Tensor  # (M, K, A) what was drawn, before clipping to the action range
    log_prob: torch.Tensor  # (M,) under the policy that drew it
    member: np.ndarray  # (M,) index of the rollout (group * N + n) that the decision belongs to
    decision: np.ndarray  # (M,) its number among the noisy decisions of that rollout
    returns: np.ndarray  # (G, N) float32
    success: np.ndarray  # (G, N) bool
    # share of successes of the mean policy from the starts (nan for plain rollouts)
    mean_success: float
    decisions: int  # decisions played in all


# ----------------------------------------------------------------------------------- pure functions


def leave_one_out(returns: torch.Tensor) -> torch.Tensor:
    """Advantages (G, N) from returns (G, N).

    b_n = 1/(N-1) * sum_{j != n} R_j,    A_n = R_n - b_n
    """
    n = returns.shape[1]
    baseline = (returns.sum(1, keepdim=True) - returns) / (n - 1)
    return returns - baseline


def chunk_log_prob(
    sample: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, shared: bool
) -> torch.Tensor:
    """log-probability (M,) of drawn chunks (M, K, A).

    Independent noise (paper): log p = sum over K and A of the Laplace log-density.
    Shared noise: one draw moves the whole chunk, so what was drawn is the chunk's mean over K, and
    log p = sum over A of log Laplace(mean_K(a); mean_K(mu), mean_K(exp(beta))).
    """
    if shared:
        sample, mean = sample.mean(1), mean.mean(1)
        log_scale = torch.logsumexp(log_scale, dim=1) - math.log(log_scale.shape[1])
    return laplace_log_prob(sample, mean, log_scale).flatten(1).sum(1)


def clipped_loss(
    log_prob_new, log_prob_old, advantage, clip: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """PPO's objective over M decisions; all arguments (M,).

    r = exp(log p_new - log p_old),    L = -min(r A, clip(r, 1 - eps, 1 + eps) A)
    """
    log_ratio = log_prob_new - log_prob_old
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    with torch.no_grad():
        info = {
            "ratio": ratio.mean().item(),
            "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
            # KL = mean(r - 1 - log r), the estimator that is never negative
            "kl": (ratio - 1 - log_ratio).mean().item(),
        }
    return loss, info


# ----------------------------------------------------------------------------------------- rollouts


class Explorer:
    """Draws noisy chunks from the policy and remembers what PPO needs:
    `act(observation, running)`."""

    def __init__(
        self,
        policy: Policy,
        noise: float,
        shared: bool,
        generator: torch.Generator,
        held: bool = False,
        together: int = 1,
    ):
        """noise: times the policy's scale; shared: one draw for a chunk; held: one for all chunks
        of a slot from the first call on (its log-probability is taken as if it were drawn anew),
        and neighbouring slots hold opposite draws: what a push and the opposite push have in common
        is no reason for either, and leave-one-out then cancels it. together: neighbouring slots
        (the rollouts of a group) that several processes share out as one; see `_uniform`."""
        self.policy, self.noise, self.shared, self.generator = policy, noise, shared, generator
        self.held, self.together = held, together
        self.rows: list[tuple] = []
        self._first: torch.Tensor | None = None  # (W * B, 1 or K, A), what is held

    @torch.no_grad()
    def act(self, observation: dict, running: np.ndarray) -> np.ndarray:
        """Noisy chunks (B, K, A) in [-1, 1] where the (B,) mask `running` is set, 0 elsewhere."""
        chunks = np.zeros((len(running), *self.policy.action_shape), np.float32)
        u = self._uniform(running, 1 if self.shared else chunks.shape[1])
        if not running.any():  # all rest here, while other processes still draw
            return chunks
        image, state, tokens = to_tensors(observation, running, device_of(self.policy))
        mean, log_scale = self.policy.in_blocks(image, state, tokens)
        log_scale = log_scale + math.log(self.noise)
        # a ~ Laplace(mu, b), b = noise * exp(beta):
        #     a = mu + b * sign(u) * -log(1 - |u|), u uniform in (-1, 1)
        draw = (-u.sign() * torch.log1p(-u.abs().clamp(max=1 - 1e-6))).to(mean.device)
        sample = mean + log_scale.exp() * draw
        log_prob = chunk_log_prob(sample, mean, log_scale, self.shared)
        rows = np.flatnonzero(running)
        self.rows.append(
            (
                observation["image"][rows],
                observation["state"][rows],
                tokens.cpu(),
                sample.cpu(),
                log_prob.cpu(),
                rows,
                np.full(len(rows), len(self.rows)),
            )
        )
        chunks[rows] = sample.clamp(-1, 1).cpu().numpy()
        return chunks

    def _uniform(self, running: np.ndarray, k: int) -> torch.Tensor:
        """(b, k, A) in (-1, 1) for the b running slots.

        Drawn on the processor: the same noise for a seed whatever the device. Drawn for the slots
        of all processes, of which each takes its own: the same noise for any number of them. (So
        every process has to call this equally often; once, if the noise is held.)"""
        own = processes.slots_of(processes.rank(), len(running), self.together)[running]
        if self.held:
            if self._first is None:
                count = len(running) * processes.world()
                self._first = self._draw(count, k)
                self._first[1::2] = -self._first[: count - 1 : 2]
            return self._first[own]
        everywhere = processes.over_slots(running, self.together)
        draws = self._draw(int(everywhere.sum()), k)
        return draws[everywhere.cumsum()[own] - 1]

    def _draw(self, count: int, k: int) -> torch.Tensor:
        return 2 * torch.rand((count, k, self.policy.action_shape[1]), generator=self.generator) - 1

    def finish(self, returns, success, mean_success: float, decisions: int) -> Rollouts:
        """All that `act` has noted, with the groups' returns (G, N) float32 and success (G, N)
        bool."""
        columns = list(zip(*self.rows, strict=True))
        image, state, member, decision = (np.concatenate(columns[i]) for i in (0, 1, 5, 6))
        tokens, sample, log_prob = (torch.cat(columns[i]) for i in (2, 3, 4))
        drawn = (image, state, tokens, sample, log_prob, member, decision)
        return Rollouts(*drawn, returns, success, mean_success, decisions)


def _to_the_end(
    env, observation, act, count: int, together: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step until all are done;
    (success at the stop (count,), reward there (count,), decisions taken (count,)).

    together: decisions in which `act` needs every process, so that none may stop before."""
    together = together if processes.world() > 1 else 0
    success, reward = np.zeros(count, bool), np.zeros(count, np.float32)
    length = np.zeros(count, np.int64)
    step = 0
    while step < together or not env.done.all():
        running = ~env.done[:count]
        observation, rewards, terminations, _, _ = env.step(act(observation, step))
        success |= running & terminations[:count]
        reward = np.where(running, rewards[:count], reward)
        length += running
        step += 1
    return success, reward, length


def plain_rollouts(
    env, policy: Policy, starts: list[Start], config: LoopConfig, generator
) -> Rollouts:
    """The paper's rollouts: N from each of the G starts, every decision drawn,
    independent noise over the chunk."""
    n, groups = config.rollouts, len(starts)
    explorer = Explorer(policy, config.noise, shared=False, generator=generator, together=n)
    everyone = [s for s in starts for _ in range(n)]
    observation, _ = env.reset(seed=_own_seed(generator), options={"starts": everyone})
    act, horizon = lambda o, _: explorer.act(o, ~env.done), env.config.horizon
    success, reward, length = _to_the_end(env, observation, act, groups * n, together=horizon)
    returns = _returns(success, reward, length, horizon, config)
    shape = (groups, n)
    return explorer.finish(
        returns.reshape(shape), success.reshape(shape), math.nan, int(length.sum())
    )


def branch_rollouts(
    env, policy: Policy, starts: list[Start], config: LoopConfig, generator
) -> Rollouts:
    """Branching: what a world model can do and a robot cannot.

        start --mean policy--> t0 --N branches: noise in `branch` decisions-->
            mean policy to the end --> R_n

    # DEVIATION: the paper draws every decision of an episode; here the mean policy plays from the
    #   start to a uniformly drawn decision t0, and N branches from that one state carry noise in
    #   their first `branch` decisions only, one draw per decision shared over the chunk; because
    #   one scalar per episode must otherwise tell apart some 350 noise dimensions (22 decisions x
    #   16), and only 20-40 % of groups have spread.
    """
    n, groups = config.rollouts, len(starts)
    observation, _ = env.reset(seed=_own_seed(generator), options={"starts": starts})
    trail: list[list] = [
        [] for _ in starts
    ]  # per group, the state before each decision of the mean policy

    def remember_and_act(observation: dict, step: int) -> np.ndarray:
        running = np.flatnonzero(~env.done).tolist()
        for slot, state in zip(running, env.get_states(running), strict=True):
            trail[slot].append(state)
        return policy.act(observation, ~env.done)

    trunk_success, _, trunk_length = _to_the_end(env, observation, remember_and_act, groups)
    everywhere = groups * processes.world()
    fraction = processes.share(torch.rand(everywhere, generator=generator).numpy())
    # t0 = floor(u T), u uniform in [0, 1), T the decisions of the mean policy
    t0 = np.minimum((fraction * trunk_length).astype(np.int64), trunk_length - 1)

    explorer = Explorer(policy, config.noise, True, generator, config.held, together=n)
    states = [trail[g][t0[g]] for g in range(groups) for _ in range(n)]
    noisy = min(config.branch, env.config.horizon)
    success, reward, length = play_branches(
        env, states, explorer.act, noisy, policy, together=0 if config.held else noisy
    )
    returns = _returns(success, reward, length + t0.repeat(n), env.config.horizon, config)
    shape = (groups, n)
    return explorer.finish(
        returns.reshape(shape),
        success.reshape(shape),
        float(trunk_success.mean()),
        int(length.sum() + trunk_length.sum()),
    )


def _own_seed(generator: torch.Generator) -> int:
    """A seed for what the environment of this process may draw."""
    return int(torch.randint(2**31, (), generator=generator)) + processes.rank()


def play_branches(
    env, states: list, noisy, decisions: int, policy: Policy, together: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From each of B states: `noisy` chunks in the first decisions, then the mean policy;
    (success, reward, length), and `together`, as `_to_the_end`."""
    observation = env.set_states(states)

    def noise_first(observation: dict, step: int) -> np.ndarray:
        return (noisy if step < decisions else policy.act)(observation, ~env.done)

    return _to_the_end(env, observation, noise_first, len(states), together)


def _returns(success, reward, length, horizon: int, config: LoopConfig) -> np.ndarray:
    """(n,) float32 from success (n,) bool, reward (n,) in [0, 1] and T (n,), decisions so far."""
    # R_n = R at the stop * (1 - time_penalty * T / horizon), and 0 where nothing stopped it.
    # DEVIATION: the paper's return is the reflector's value whether or not it stops; here 0 where
    #   it does not; because calibrated values below the threshold are noise, a group that is never
    #   stopped differs by nothing else, and Adam makes full steps of it [measured here:
    #   results/attempts.md, LIBERO].
    return (success * reward * (1 - config.time_penalty * length / horizon)).astype(np.float32)


def everyones(own: Rollouts) -> Rollouts:
    """The rollouts of all processes from those of this one, as one process would have recorded
    them: the rows by decision, then by member."""
    if processes.world() == 1:
        return own
    parts = processes.each(own)
    n = own.returns.shape[1]
    member = np.concatenate(
        [processes.slots_of(r, p.returns.size, n)[p.member] for r, p in enumerate(parts)]
    )
    decision = np.concatenate([p.decision for p in parts])
    order = np.lexsort((member, decision))
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in parts])[order]
        for name in ("image", "state")
    }
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(p, name) for p in parts])[torch.from_numpy(order)]
        for name in ("tokens", "sample", "log_prob")
    }
    groups: dict[str, Any] = {  # process r has the groups r, r + W ...
        name: np.stack([getattr(p, name) for p in parts], axis=1).reshape(-1, n)
        for name in ("returns", "success")
    }
    return Rollouts(
        **arrays,
        **tensors,
        **groups,
        member=member[order],
        decision=decision[order],
        mean_success=float(np.mean([p.mean_success for p in parts])),
        decisions=sum(p.decisions for p in parts),
    )


# ------------------------------------------------------------------------------------------- update


def minibatch_loss(
    policy: Policy,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    mb: torch.Tensor,
    config: LoopConfig,
) -> tuple[torch.Tensor, dict[str, float]]:
    """`clipped_loss` of the rows mb (B,) of the rollouts, and the mean "scale" of the policy."""
    device = device_of(policy)
    at = mb.numpy()  # numpy would take a tensor of one row for a number, and drop the dimension
    mean, log_scale = policy.distribution(
        to_float(torch.from_numpy(rollouts.image[at]).to(device)),
        torch.from_numpy(rollouts.state[at]).to(device),
        rollouts.tokens[mb].to(device),
    )
    # p_new(a) = Laplace(a; mu_new, noise * exp(beta_new))
    drawn, wide = rollouts.sample[mb].to(device), log_scale + math.log(config.noise)
    new = chunk_log_prob(drawn, mean, wide, shared=config.branch > 0)
    old, advantage = rollouts.log_prob[mb].to(device), advantage[mb].to(device)
    loss, info = clipped_loss(new, old, advantage, config.clip)
    return loss, info | {"scale": log_scale.detach().exp().mean().item()}


def backward(
    policy: Policy,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    blocks: tuple[torch.Tensor, ...],
    weight: float,
    config: LoopConfig,
) -> dict[str, float]:
    """Adds the gradient of weight * `minibatch_loss` of all rows of the blocks, one block (B,) at a
    time: what a backward pass has to remember stays small, and in the processor's cache.
    Returns weight * ("loss" and the metrics)."""
    total: dict[str, float] = {}
    rows = sum(len(block) for block in blocks)
    for block in blocks:
        loss, info = minibatch_loss(policy, rollouts, advantage, block, config)
        share = weight * len(block) / rows
        (share * loss).backward()
        for name, x in {"loss": loss.item(), **info}.items():
            total[name] = total.get(name, 0.0) + share * x
    return total


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    config: LoopConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """One iteration's passes over the noisy decisions. Returns metrics, which
    `report.RL_METRICS` explains; `first_ratio` must be 1."""
    advantage = leave_one_out(torch.from_numpy(rollouts.returns)).flatten()[
        torch.from_numpy(rollouts.member)
    ]
    # DEVIATION: the paper's loss is a mean over all decisions; here those of advantage 0 are left
    #   out (all of a group without spread, and any rollout that returns what the others do on
    #   average), and gradients longer than 1 are cut to that; because such rows carry no gradient:
    #   the fewer groups have spread, the shorter would a step be.
    rows = torch.nonzero(advantage.abs() > 1e-6).flatten()
    if len(rows) > config.decisions:
        rows = rows[torch.randperm(len(rows), generator=generator)[: config.decisions]]
    spread = float((np.ptp(rollouts.returns, axis=1) > 1e-6).mean())
    metrics = {"groups_with_spread": spread, "return": float(rollouts.returns.mean())}
    # mixed = mean over groups of (0 < successes < N). Returns differ a little wherever rollouts
    # stop, so there is spread where all of a group succeed; but what works it does not say.
    mixed = float((rollouts.success.any(1) & ~rollouts.success.all(1)).mean())
    metrics |= {
        "mixed": mixed,
        "success": float(rollouts.success.mean()),
        "mean_policy_success": rollouts.mean_success,
    }
    trained = [p for p in policy.parameters() if p.requires_grad]
    # Without any signal no step is made:
    # Adam's momentum of earlier iterations must not move weights.
    for number in range(1, 1 + (config.epochs if len(rows) else 0)):
        order = rows[torch.randperm(len(rows), generator=generator)]
        passed: list[dict] = []  # of the minibatches of this pass
        for mb in order.split(config.minibatch):
            own = processes.share(mb)
            weight = len(own) / len(mb)
            # Without a row of its own a process takes any, with weight 0: all make the same steps.
            own = own if len(own) else mb[:1]
            optimizer.zero_grad(set_to_none=True)
            # As many blocks in every process: a sharded model needs all of them for each.
            blocks = own.tensor_split(math.ceil(len(mb) / processes.world() / BLOCK))
            info = backward(policy, rollouts, advantage, blocks, weight, config)
            passed.append(processes.add_up(trained, info))
            clip_gradients(trained, passed[-1]["loss"], "LOOP")
            optimizer.step()
        metrics.setdefault("first_ratio", passed[0]["ratio"])
        # Of this pass, each measured before its step: the very first are 0.
        metrics |= {
            name: float(np.mean([info[name] for info in passed]))
            for name in ("clip_fraction", "kl", "scale")
        }
        metrics["epochs"] = number
        if metrics["kl"] > config.max_kl:
            break
    return metrics


# Why outcomes are not mixed: where rollouts are hardly ever stopped, or nearly always.
NEVER = "eta is too high in dreams, or the policy never succeeds"
ALWAYS = "eta is too low in dreams, the dream says yes to everything, or nothing is left to learn"


def no_signal(metrics: dict[str, float]) -> str | None:
    """One plain sentence, cause and remedy, when an iteration could teach nothing or hardly
    anything, else None. metrics: of `update`; those of earlier versions have no "mixed"."""
    mixed, stopped = metrics.get("mixed", 1.0), metrics.get("success", 0.0) >= 0.5
    first = metrics.get("first_ratio", 1.0)
    if abs(first - 1) > 0.02:
        return (
            f"first ratio {first:.3f}, expected 1: the policy computes otherwise where it learns "
            "than where it drew; a pretrained one in bfloat16 rounds so (`PretrainedConfig.bf16`), "
            "any other has a mistake in the code"
        )
    if metrics["groups_with_spread"] < 0.05:
        return (
            f"no signal: in {1 - metrics['groups_with_spread']:.0%} of groups all rollouts "
            f"{'succeed' if stopped else 'fail'} alike, so every advantage is 0; use starts of "
            "mixed outcome, more noise, or a policy that succeeds at times "
            f"({ALWAYS if stopped else NEVER})"
        )
    if mixed < 0.05:
        few = f"outcomes are mixed in {mixed:.0%} of groups only"
        if metrics["success"] > 0.8:
            return (
                f"always stopped: {few}; {ALWAYS}; explore more, so that the reflector sees "
                "failures; `python cli.py trust RUN` shows which"
            )
        if metrics["success"] < 0.2:
            return (
                f"never stopped: {few}; {NEVER}; explore more, so that the reflector sees "
                "successes and the policy imitates them"
            )
        return f"the start decides: {few}; use more noise, or starts in between"
    if metrics.get("clip_fraction", 0.0) > 0.5:
        return (
            "steps too large: more than half of the ratios are clipped; "
            "lower the learning rate or the epochs"
        )
    return None


def loop(
    env,
    policy: Policy,
    draw_starts: Callable[[int, int], list[Start]],
    config: LoopConfig,
    seed: int,
    on_iteration: Callable[[int, dict], bool | None] | None = None,
    keeper: Keeper | None = None,
) -> list[dict]:
    """Post-train `policy` in place; returns the metrics of every iteration. draw_starts(iteration,
    G) gives the starts; on_iteration gets the metrics, and ends the training by returning True.
    keeper: writes the state after an iteration; where it has found one, the next one follows."""
    generator = torch.Generator()
    groups = policy.parameter_groups(config.learning_rate, config.adapter_rate)
    optimizer = torch.optim.Adam(groups, fused=True)
    rollout = branch_rollouts if config.branch else plain_rollouts
    history: list[dict] = []
    ended = False
    if keeper is not None and keeper.steps:
        state = keeper.restore()
        set_training_state(state, policy, optimizer)
        history, ended = state["history"], state["ended"]
    processes.equalize([p for p in policy.parameters() if p.requires_grad])
    policy.eval()
    for iteration in range(len(history), 0 if ended else config.iterations):
        # Seeded anew, so that an iteration needs no generator's state from those before.
        generator.manual_seed(1000 * seed + iteration)
        starts = processes.share(draw_starts(iteration, config.groups))
        rollouts = everyones(rollout(env, policy, starts, config, generator))
        metrics = update(policy, optimizer, rollouts, config, generator)
        history.append(metrics | {"decisions": rollouts.decisions})
        ended = bool(on_iteration is not None and on_iteration(iteration, history[-1]))
        if keeper is not None and keeper.due(iteration + 1, last=ended):
            own = {"history": history, "ended": ended}
            keeper.write(iteration + 1, {**training_state(policy, optimizer), **own})
        if ended:
            break
    return history
