"""Does the dream tell better actions from worse ones? The instrument nearest to what LOOP uses.

Paper's section: "RL post-training": the advantage of a rollout is its return against the others of
its group. Agreement (trust.py) compares *starts*; a dream can be right about most starts and still
know nothing of what a slightly different action does there. Then LOOP learns from noise.

                                         .--> in the dream, then the mean policy --> R_gn
    moment g of a recorded real episode -+    the same N x D draws of noise
                                         '--> in reality,   then the mean policy --> r_gn

                    sum_gn (R_gn - R_g.) (r_gn - r_g.)
    within = -----------------------------------------------,    R_g. the mean of group g
             sqrt( sum (R_gn - R_g.)^2  sum (r_gn - r_g.)^2 )

1: the dream ranks the branches of every moment as reality does; 0: its advantages are noise.

Symbols: G moments, N branches of each, D noisy decisions, R reward in [0, 1] at the end of a dream,
r real success (0 or 1). Nothing here trains.
"""

from __future__ import annotations

import numpy as np
import torch

from demos import Episode
from dreams import moment
from evaluate import wilson_share
from policy import Policy
from ppo import Explorer, LoopConfig, play_branches
from tasks import Start
from vecenv import VecRealEnv, stopped_by_the_oracle
from worldenv import WorldEnv

DRAWS = 1000  # of the bootstrap
FEWEST = 5  # groups that vary, for an interval


def branch_truth(
    world: WorldEnv,
    env: VecRealEnv,
    policy: Policy,
    episodes: list[Episode],
    loop: LoopConfig,
    groups: int,
    seed: int = 0,
) -> dict:
    """Branch from `groups` moments of recorded episodes, in the dream and in reality.

    episodes: real ones that simulator and reflector have not seen (the policy has imitated their
    successes), their tasks taken in turn; loop: its rollouts, branch and noise. Returns "groups",
    "rollouts", "noisy_decisions", "agreement": share of branches {"share", "low", "high"} (Wilson;
    branches of one moment are not independent, so it is somewhat too narrow), "mixed": share of
    moments from which some branches succeed in reality and some do not, "within": {"value", "low",
    "high"} with a bootstrap interval over moments, None where fewer than FEWEST moments vary.
    """
    rng = np.random.default_rng(seed)
    moments = draw_moments(episodes, groups, rng)
    n = min(loop.rollouts, env.num_envs)
    noisy = loop.branch or world.config.horizon  # plain LOOP's noise does not end
    generator = torch.Generator().manual_seed(seed)
    # Of some groups at a time, each (groups, N): imagined success, the return of LOOP but for its
    # time penalty (R at the stop, 0 without one), real success.
    played = []
    at_once = env.num_envs // n
    for first in range(0, groups, at_once):
        some = moments[first : first + at_once]
        recorder = Recorder(policy, loop.noise, loop.branch > 0, generator, loop.held)
        states = [moment(e, t, world.config.robot) for e, t in some for _ in range(n)]
        success, rewards, _ = play_branches(world, states, recorder.act, noisy, policy)
        states = [state for state in real_states(env, some) for _ in range(n)]
        truly, _, _ = play_branches(env, states, recorder.again, noisy, policy)
        played.append([x.reshape(-1, n) for x in (success, rewards * success, truly)])
    imagined, dreamt, real = (np.concatenate(x) for x in zip(*played, strict=True))
    return {
        "groups": groups,
        "rollouts": n,
        "noisy_decisions": noisy,
        "agreement": wilson_share(int((imagined == real).sum()), real.size),
        "mixed": float((real.any(1) & ~real.all(1)).mean()),
        "within": within_interval(dreamt, real.astype(np.float64), rng),
    }


def draw_moments(episodes: list[Episode], count: int, rng) -> list[tuple[Episode, int]]:
    """(episode, decision before its first success), both uniform, the tasks in turn."""
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    moments = []
    for i in range(count):
        of_task = [e for e in episodes if e.task == tasks[i % len(tasks)]]
        episode = of_task[rng.integers(len(of_task))]
        moments.append((episode, int(rng.integers(max(1, episode.until_success)))))
    return moments


class Recorder(Explorer):
    """Noise that can be played `again`, decision by decision, in another environment with as many
    slots: there the policy answers to what it sees there, as it does in LOOP, and the push that is
    added to its answer is the same."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.pushes: list[np.ndarray] = []  # of each decision, (B, K, A); 0 in slots that rested
        self.replayed = 0

    def act(self, observation: dict, running: np.ndarray) -> np.ndarray:
        chunks = super().act(observation, running)
        self.pushes.append(chunks - self.policy.act(observation, running))
        return chunks

    def again(self, observation: dict, running: np.ndarray) -> np.ndarray:
        """The mean policy's chunks and the push of the same decision, clipped to [-1, 1]; no push
        where the other environment had ended."""
        chunks = self.policy.act(observation, running)
        if self.replayed < len(self.pushes):
            chunks[running] += self.pushes[self.replayed][running]
        self.replayed += 1
        return chunks.clip(-1, 1)


def real_states(env: VecRealEnv, moments: list[tuple[Episode, int]]) -> list[tuple]:
    """Replay every episode up to its moment: states for `env.set_states`, which the oracle stops.

    The replay itself it does not stop, no more than it did the recording: a success within a chunk
    may be over at its end."""
    starts = [Start(e.task, e.seed) for e, _ in moments]
    env.reset(options={"starts": starts, "stop_on_success": False})
    states: list[tuple] = [()] * len(moments)
    for now in range(1 + max(t for _, t in moments)):
        actions = np.zeros(env.action_space.shape, np.float32)
        for slot, (episode, t) in enumerate(moments):
            if t == now:
                states[slot] = stopped_by_the_oracle(env.get_states([slot])[0])
                env.done[slot] = True
            elif t > now:
                actions[slot] = episode.action[now]
        if not env.done.all():
            env.step(actions)
    return states


def within(dreamt: np.ndarray, real: np.ndarray) -> float | None:
    """The correlation above of (G, N) dreamt and real returns; None where either never varies
    inside a group."""
    a = dreamt - dreamt.mean(1, keepdims=True)
    b = real - real.mean(1, keepdims=True)
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread > 1e-12 else None


def within_interval(dreamt: np.ndarray, real: np.ndarray, rng) -> dict | None:
    """`within` with the 95 % interval of a bootstrap over groups; None where fewer than FEWEST
    groups vary in one of the worlds: drawing these few anew says nothing of others."""
    vary = min(int((np.ptp(world, axis=1) > 0).sum()) for world in (dreamt, real))
    value = within(dreamt, real)
    if value is None or vary < FEWEST:
        return None
    picks = (rng.integers(len(real), size=len(real)) for _ in range(DRAWS))
    drawn = [x for p in picks if (x := within(dreamt[p], real[p])) is not None]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}
