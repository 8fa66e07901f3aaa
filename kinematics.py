"""Forward kinematics: where a chunk of actions takes the hand.

Paper's section: "World simulator" (the next pose, drawn as the action map, by forward kinematics).

    s_t, motion m_t, chunk a_t --> network --> s_{t+1}
    s_{t-1}, target g_t, a_t   ----------->    m_{t+1} = (s_t, g_{t+1})

An action moves a target, by a known amount; the hand is pulled after it and lags, or stays behind
where something is in its way. (Meta-World keeps the target from step to step. LIBERO's controller
sets it anew at every step, from where the hand is then: there g is where the chunk alone would take
a hand that moves at once, and what the hand still carries along is in s_t - s_{t-1}.)

The target alone would be exact in the long run, the network adds the lag. It is trained on whole
episodes *open loop*, from the first state and the actions alone: that is how a dream uses it. A law
fitted to single decisions is 6 mm off after one of them, but 54 mm at the end of an episode, more
than the size of the things that the hand should meet.

What the network smooths over is contact: a hand that pushes creeps by a millimetre a decision until
the thing gives way, and open loop the likeliest single answer is that it stays. A forest of
regression trees therefore adds what the network was off by at the recorded moment most like this
one. Trees do not extrapolate: a hand that has pulled harder than any recorded one lets go.

# DEVIATION: forward kinematics is learned instead of taken from a robot model; because Meta-World
#   moves the hand by a mocap weld, whose lag no URDF describes.

Symbols: B batch, T decisions, K actions in a chunk, A action dimensions, S state dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tasks import METAWORLD, Robot

WIDTH = 192  # of the two hidden layers
# A decision changes position (metres) and gripper by about this, and any further entry of the state
# (an angle in radians) by TURN.
UNIT, TURN = (0.02, 0.02, 0.02, 0.1), 0.1
TREES = 50


def motion_dim(robot: Robot) -> int:
    """Numbers in a motion: the state one decision earlier, and the target's x, y, z."""
    return robot.state_dim + 3


def contact_dim(robot: Robot) -> int:
    """Numbers that the forest reads: see `contact_features`."""
    return 2 * robot.state_dim + 3 + 3


def motion_at_rest(state: torch.Tensor) -> torch.Tensor:
    """(..., S) -> (..., S + 3): the motion of a hand that has stood still, its target its place."""
    return torch.cat([state, state[..., :3]], dim=-1)


def next_motion(
    state: torch.Tensor, motion: torch.Tensor, action: torch.Tensor, robot: Robot = METAWORLD
) -> torch.Tensor:
    """State s_t (B, S), motion m_t (B, S+3), chunk (B, K, A) in [-1, 1] -> m_{t+1} (B, S+3).

    g <- s_t's x, y, z where the robot's target starts from the hand in each decision
    g <- clip(g + metres a_xyz, workspace), K times
    """
    target = state[:, :3] if robot.from_hand else motion[:, robot.state_dim :]
    return torch.cat([state, next_target(target, action, robot)], dim=1)


def next_target(target: torch.Tensor, action: torch.Tensor, robot: Robot) -> torch.Tensor:
    """Where the chunk (B, K, A) moves the target (B, 3), see `next_motion`."""
    low, high = (target.new_tensor(x) for x in (robot.low, robot.high))
    for step in (robot.metres * action[..., :3].clamp(-1, 1)).unbind(1):
        target = torch.clamp(target + step, low, high)
    return target


def motions_along(
    states: torch.Tensor, actions: torch.Tensor, robot: Robot = METAWORLD
) -> torch.Tensor:
    """States (T, S) or more and the chunks (T, K, A) after them -> the motion before every decision
    and that after the last, (T+1, S+3)."""
    motions = [motion_at_rest(states[:1])]
    for t in range(len(actions)):
        motions.append(next_motion(states[t : t + 1], motions[-1], actions[t : t + 1], robot))
    return torch.cat(motions)


def motion_before(episode, t: int, robot: Robot = METAWORLD) -> np.ndarray:
    """The motion before decision t of an episode (T: after its last), (S+3,) float32."""
    states, actions = torch.from_numpy(episode.state), torch.from_numpy(episode.action)
    return motions_along(states, actions[:t], robot)[-1].numpy()


def contact_features(
    state: torch.Tensor, motion: torch.Tensor, action: torch.Tensor, robot: Robot = METAWORLD
) -> torch.Tensor:
    """s_t (B, S), m_t (B, S+3), chunk (B, K, A) -> (B, 2S+6): where the hand is, how it moved, and
    how far it is pulled before and after the chunk.

    s_t,  s_t - s_{t-1},  g_t - s_t,  g_{t+1} - s_t
    """
    dim = robot.state_dim
    place, before = state[:, :3], motion[:, :dim]
    pull = motion[:, dim:] - place
    pull_after = next_motion(state, motion, action, robot)[:, dim:] - place
    return torch.cat([state, state - before, pull, pull_after], dim=1)


def answer(forest, features: np.ndarray) -> np.ndarray:
    """What a scikit-learn forest says of contact features (B, 2S+6) float32: (B, S) float64.

    forest(x) = 1/N sum_n tree_n(x)

    As its own `predict`, bit by bit; but that asks each tree by way of checks and threads, which
    take ten milliseconds together: of a single dream, as in `play`, a fifth [measured here].
    """
    trees = [estimator.tree_ for estimator in forest.estimators_]
    return sum(tree.predict(features)[..., 0] for tree in trees) / len(trees)


class Kinematics(nn.Module):
    """`loss, metrics = kinematics(batch)` trains the network, `remember` the forest;
    `next_state` imagines with both.

    A forest is not a tensor, but what it is grown from is: a checkpoint holds the recorded moments,
    and the same forest is grown again from them when it is first needed.
    """

    unit: torch.Tensor
    scales: torch.Tensor
    middle: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    moments: torch.Tensor
    recorded: torch.Tensor

    def __init__(self, chunk: int, moments: int = 20_000, robot: Robot = METAWORLD):
        """moments: how many recorded decisions the forest is grown from at most."""
        super().__init__()
        self.robot, dim = robot, robot.state_dim
        inputs = dim + motion_dim(robot) + chunk * robot.action_dim
        self.network = nn.Sequential(
            nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, dim),
        )  # fmt: skip
        self.linear = nn.Linear(inputs, dim)
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("unit", torch.tensor(UNIT + (TURN,) * (dim - len(UNIT))))
        of_action = torch.ones(chunk * robot.action_dim)
        scales = torch.cat([5 * self.unit, self.unit, self.unit[:3], of_action])
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("middle", torch.zeros(dim))
        self.register_buffer("low", torch.full((dim,), -2.0))
        self.register_buffer("high", torch.full((dim,), 2.0))
        # Rows of features and what the network was off by; of the rows the first `recorded` count.
        self.register_buffer("moments", torch.zeros(moments, contact_dim(robot) + dim))
        self.register_buffer("recorded", torch.zeros((), dtype=torch.int64))
        self._forest: Any = None  # scikit-learn's ExtraTreesRegressor

    def set_range(self, states: np.ndarray) -> None:
        """states: (N, S) that were ever seen; next states are kept inside their range, and their
        mean is the `middle` of the network's inputs."""
        self.middle.copy_(torch.from_numpy(states.mean(0)))
        self.low.copy_(torch.from_numpy(states.min(0)))
        self.high.copy_(torch.from_numpy(states.max(0)))

    def next_state(
        self, state: torch.Tensor, motion: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        """s_t (B, S), m_t (B, S+3) and chunk (B, K, A) -> s_{t+1} (B, S).

        s_{t+1} = clip(network(s_t, m_t, a_t) + unit * forest(contact features))
        """
        following = self.smooth(state, motion, action)
        if self.recorded > 0:
            features = contact_features(state, motion, action, self.robot).cpu().numpy()
            off = torch.from_numpy(answer(self._grown(), features)).to(state)
            following = following + self.unit * off
        return torch.minimum(torch.maximum(following, self.low), self.high)

    def smooth(
        self, state: torch.Tensor, motion: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        """What the network alone says, as `next_state`."""
        previous, target = motion.split([self.robot.state_dim, 3], dim=1)
        return self._smooth(state, previous, target, action)

    def _smooth(self, state, previous, target, action) -> torch.Tensor:
        """s_t and s_{t-1} (B, S), g_t (B, 3), a_t (B, K, A) -> s_{t+1} (B, S).

        s_{t+1} = clip(s_t + unit * (W z + f(z))) to the range of recorded states,
        z = (s_t - middle) / 5 unit, (s_t - s_{t-1}) / unit, (g_t - s_t) / unit, a_t
        """
        far = [state - self.middle, state - previous, target - state[:, :3], action.flatten(1)]
        z = torch.cat(far, dim=1) / self.scales
        following = torch.addcmul(state, self.unit, self.linear(z) + self.network(z))
        return torch.clamp(following, self.low, self.high)

    @torch.no_grad()
    def remember(self, episodes) -> None:
        """Grow the forest from the episodes' decisions (`demos.Episode`), once the network is
        trained:

        forest: contact features of (s_t, m_t, a_t) -> (s_{t+1} - network(s_t, m_t, a_t)) / unit
        """
        device = self.moments.device
        of_episodes = []
        for episode in episodes:
            states, actions = (
                torch.from_numpy(x).to(device) for x in (episode.state, episode.action)
            )
            now = states[:-1], motions_along(states, actions[:-1], self.robot), actions
            off = (states[1:] - self.smooth(*now)) / self.unit
            of_episodes.append(torch.cat([contact_features(*now, self.robot), off], dim=1))
        rows = torch.cat(of_episodes)
        if len(rows) > len(self.moments):
            order = np.random.default_rng(0).permutation(len(rows))[: len(self.moments)]
            rows = rows[torch.from_numpy(order).to(device)]
        self.moments.zero_()
        self.moments[: len(rows)] = rows
        self.recorded.fill_(len(rows))
        self._forest = None

    def _grown(self):
        """The forest, grown when it is first asked; the same one from the same moments."""
        from sklearn.ensemble import ExtraTreesRegressor

        if self._forest is None:
            rows = self.moments[: int(self.recorded)].cpu().numpy()
            self._forest = ExtraTreesRegressor(TREES, random_state=0, n_jobs=-1)  # of all cores
            split = contact_dim(self.robot)
            self._forest.fit(rows[:, :split], rows[:, split:])
        return self._forest

    def open_loop(self, first: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """First states (B, S) and all chunks (B, T, K, A) -> the states that follow, (B, T, S), by
        the network alone."""
        state, previous, target, path = first, first, first[:, :3], []
        for chunk in action.unbind(1):
            following = self._smooth(state, previous, target, chunk)
            target = state[:, :3] if self.robot.from_hand else target
            target = next_target(target, chunk, self.robot)
            state, previous = following, state
            path.append(state)
        return torch.stack(path, dim=1)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean error of the open-loop path on {"state" (B, T+1, S), "action" (B, T, K, A),
        "played" (B, T), 1 where the episode lasted}, in units of `UNIT`:

        loss = mean_t | s_t - f(s_0, a_0 ... a_{t-1}) | / unit
        """
        path = self.open_loop(batch["state"][:, 0], batch["action"])
        off, played = path - batch["state"][:, 1:], batch["played"]
        loss = ((off / self.unit).abs().mean(-1) * played).sum() / played.sum()
        with torch.no_grad():
            metres = (off[..., :3].norm(dim=-1) * played).sum() / played.sum()
        return loss, {"millimetres": 1000 * metres.item()}


def whole_episodes(episodes) -> dict[str, torch.Tensor]:
    """All episodes side by side, the short ones filled up with zeros: a batch for `Kinematics`."""
    longest = max(len(e) for e in episodes)
    chunk = episodes[0].action.shape[1:]
    dim = episodes[0].state.shape[1]
    state = np.zeros((len(episodes), longest + 1, dim), np.float32)
    action = np.zeros((len(episodes), longest, *chunk), np.float32)
    played = np.zeros((len(episodes), longest), np.float32)
    for i, e in enumerate(episodes):
        state[i, : len(e) + 1], action[i, : len(e)], played[i, : len(e)] = e.state, e.action, 1
    return {
        name: torch.from_numpy(x)
        for name, x in (("state", state), ("action", action), ("played", played))
    }


def episode_batches(episodes, batch: int, seed: int):
    """A `sample(step)` for fit.fit: whole episodes, drawn evenly."""
    everything = whole_episodes(episodes)

    def sample(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, step])
        rows = torch.from_numpy(rng.integers(len(episodes), size=batch))
        return {name: x[rows] for name, x in everything.items()}

    return sample
