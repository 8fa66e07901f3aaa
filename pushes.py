"""Does the dream push the way reality does? An instrument that costs no real episode.

Paper's section: "RL post-training" moves the mean of the policy towards the noise that paid. Every
exploration episode of this project is such a trial in reality: the mean policy up to a decision,
from there one *push*, the same in every chunk (`LateExplorer`), and a true outcome. Here the same
push is made from the same moment in the dream, and both outcomes are regressed on the pushes:

    y_i = c + b . u_i,    (c, b) = argmin  sum_i (y_i - c - b . u_i)^2 + |b|^2

b is the direction in which reality, or the dream, would move the mean of the policy. Where the
dream's b is another one, LOOP in the dream leads away from success, and more imagined rollouts only
make that certain [measured here: results/attempts.md].

Symbols: u (A,) a push in units of the policy's scale, y success (0 or 1), b the change of the
success rate per unit, A action dimensions. Nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import processes
from demos import Episode, play
from dreams import moment
from evaluate import wilson_share
from fit import device_of
from policy import Policy, seen_along, to_tensors
from ppo import Explorer, play_branches
from tasks import Start
from worldenv import WorldEnv

DECISIONS_AFTER_SUCCESS = 3  # decisions, so that the reflector sees frames after success
LARGEST = 4.0  # scales; the few larger pushes count as this: Laplace noise has long tails
CLEAR = 2.0  # standard errors from 0: an effect whose sign is known,
FEWEST = 20  # if so many pushes of the task or more have shown it


class LateExplorer(Explorer):
    """For one batch of exploration episodes: the mean policy for 1 to horizon / 2 decisions
    (uniform, drawn for each slot), from there one push, the same in every chunk to the end. (LOOP's
    own branches draw anew in each of their few noisy decisions.)

    # DEVIATION: the paper explores with the policy's Laplace noise in every decision; here with one
    #   held draw, late and `noise` times as wide (1.5; LIBERO: 0.5); because jolts cancel out, and
    #   a push that is held moves things by centimetres: there simulator and reflector see what
    #   success depends on.
    """

    def __init__(self, policy: Policy, noise: float, horizon: int, generator: torch.Generator):
        super().__init__(policy, noise, shared=True, generator=generator, held=True)
        self.horizon, self.decision = horizon, 0

    def draw(self, running: np.ndarray) -> None:
        """When each slot's push begins, and the pushes: once a batch, in every process, as also one
        that plays none of its starts has to draw."""
        everywhere = len(running) * processes.world()
        draws = processes.share(torch.rand(everywhere, generator=self.generator).numpy())
        self.begins = draws * self.horizon / 2
        self._uniform(running, 1)

    def act(self, observation: dict, running: np.ndarray) -> np.ndarray:
        if self.decision == 0:
            self.draw(running)
        late = running & (self.begins <= self.decision)
        self.decision += 1
        chunks = self.policy.act(observation, running)
        if late.any():
            chunks[late] = super().act(observation, late)[late]
            self.rows.clear()  # nothing learns from these by PPO
        return chunks


def explored(
    env, policy: Policy, starts: list[Start], noise: float, generator: torch.Generator
) -> list[Episode]:
    """Real episodes of the policy with a push from `starts`, as many at a time as all processes
    have slots. env: vecenv.VecRealEnv."""
    episodes, slots = [], env.num_envs * processes.world()
    for first in range(0, len(starts), slots):
        explorer = LateExplorer(policy, noise, env.config.horizon, generator)
        some = starts[first : first + slots]
        episodes += play(env, some, explorer.act, "exploration", DECISIONS_AFTER_SUCCESS)
        if explorer.decision == 0:  # it had no start of this batch, and stays in step
            explorer.draw(np.zeros(env.num_envs, bool))
    return episodes


@dataclass
class Push:
    """One recorded trial."""

    episode: Episode
    decision: int  # the first that was pushed
    size: np.ndarray  # (A,) float32, u


def recover_pushes(policy: Policy, episodes: list[Episode]) -> list[Push]:
    """The pushes of exploration episodes that `policy` played; episodes without one, or that had
    succeeded before it, are left out."""
    found = []
    for episode in episodes:
        parts = policy.in_blocks(*to_tensors(*seen_along(episode), device_of(policy)))
        mean, scale = parts[0].cpu().numpy(), parts[1].exp().cpu().numpy()  # (T, K, A)
        pushed = np.abs(episode.action - mean.clip(-1, 1)).max((1, 2)) > 1e-3
        decision = int(pushed.argmax())
        if pushed.any() and decision < episode.until_success:
            found.append(Push(episode, decision, _size(episode.action, mean, scale, decision)))
    return found


def _size(action: np.ndarray, mean: np.ndarray, scale: np.ndarray, decision: int) -> np.ndarray:
    # a = clip(mu + s u): u is what the actions that were not clipped say;
    # without any in a dimension, what the limit has left of it: it leads to the same action.
    u = ((action - mean) / scale)[decision:].reshape(-1, action.shape[-1])
    free = np.abs(action[decision:]).reshape(u.shape) < 1
    known = np.ma.array(u, mask=~free & free.any(0))
    return np.asarray(np.ma.median(known, axis=0), np.float32)


def dream_pushes(world: WorldEnv, policy: Policy, pushes: list[Push]) -> np.ndarray:
    """(n,) bool: the reflector's verdict on each push, made from the same real moment in the dream.
    The policy answers to what it sees there."""
    at_once = world.num_envs
    some = [pushes[first : first + at_once] for first in range(0, len(pushes), at_once)]
    return np.concatenate([_dream_batch(world, policy, batch) for batch in some])


def _dream_batch(world: WorldEnv, policy: Policy, pushes: list[Push]) -> np.ndarray:
    device = device_of(policy)
    sizes = torch.from_numpy(np.stack([push.size for push in pushes])).to(device)  # (b, A)

    def pushed(observation: dict, running: np.ndarray) -> np.ndarray:
        mean, log_scale = policy.in_blocks(*to_tensors(observation, running, device))
        size = sizes[running[: len(pushes)]][:, None]  # the same in every step of the chunk
        chunks = np.zeros(world.action_space.shape, np.float32)
        chunks[running] = (mean + log_scale.exp() * size).clamp(-1, 1).cpu().numpy()
        return chunks

    states = [moment(push.episode, push.decision, world.config.robot) for push in pushes]
    success, _, _ = play_branches(world, states, pushed, world.config.horizon, policy)
    return success


def effects(sizes: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """b (A,) of the regression above, and its standard errors (A,). sizes (n, A), outcomes (n,)."""
    x = np.c_[np.ones(len(sizes)), sizes.clip(-LARGEST, LARGEST)].astype(np.float64)
    penalty = np.diag([0.0] + [1.0] * sizes.shape[1])
    inverse = np.linalg.inv(x.T @ x + penalty)
    b = inverse @ x.T @ outcomes
    left = outcomes - x @ b
    variance = (left**2).sum() / max(1, len(x) - x.shape[1])
    return b[1:], np.sqrt(variance * np.diag(inverse))[1:]


def push_report(world: WorldEnv, policy: Policy, episodes: list[Episode]) -> dict | None:
    """Recorded pushes, made again in the dream.

    episodes: exploration episodes of `policy`. Returns "pushes": how many; "agreement": share of
    them whose outcomes are the same {"share", "low", "high"} (Wilson); "tasks": {task: {"n",
    "real", "dream", "lie": {"effect": [A], "error": [A]}}}, the last of the differences dream less
    reality, push by push; "effects": tasks times A; "clear": how many real ones are more than CLEAR
    standard errors from 0, of tasks with FEWEST pushes or more; "same_sign": how many of these have
    the dream's sign too; "differ": how many lies are clear (by chance one in twenty).
    None where no episode holds a push.
    """
    pushes = recover_pushes(policy, episodes)
    if not pushes:
        return None
    real = np.array([push.episode.succeeded for push in pushes])
    dreamt = dream_pushes(world, policy, pushes)
    task_of = np.array([push.episode.task for push in pushes])
    sizes = np.stack([push.size for push in pushes])
    tasks, clear, same, differ = {}, 0, 0, 0
    for task in dict.fromkeys(task_of.tolist()):
        u, y, dream = (x[task_of == task] for x in (sizes, real.astype(float), dreamt))
        sides = {"real": effects(u, y), "dream": effects(u, dream), "lie": effects(u, dream - y)}
        enough = len(u) >= FEWEST
        known, wrong = (enough & (np.abs(b) > CLEAR * e) for b, e in (sides["real"], sides["lie"]))
        clear += int(known.sum())
        same += int((known & (sides["real"][0] * sides["dream"][0] > 0)).sum())
        differ += int(wrong.sum())
        named = {n: {"effect": b.tolist(), "error": e.tolist()} for n, (b, e) in sides.items()}
        tasks[task] = {"n": len(u), **named}
    return {
        "pushes": len(pushes),
        "agreement": wilson_share(int((real == dreamt).sum()), len(pushes)),
        "tasks": tasks,
        "effects": len(tasks) * sizes.shape[1],
        "clear": clear,
        "same_sign": same,
        "differ": differ,
    }
