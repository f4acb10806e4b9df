"""What the same PPO reaches on the state vector: how much of the task is control, and what is the price of seeing.

    python benchmarks/yardstick.py --config configs/cnn.yaml [run.seed=1] [ppo.gamma=0.995]

A measure to hold results against, never a way to train one: the state vector is what the policies here must do without.
train.py's own collect, compute_advantages, update and schedule run on eight numbers in place of frames, with two small
networks in place of a policy. Writes runs/yardstick-sSEED/metrics.csv and report.json, which plot.py draws like others.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import nn

from checkpoint import save_config
from config import ConfigError, load_config
from envs import ENV_ID, EVALUATION_SEED, OUTCOMES, TRAINING_SEEDS
from evaluate import print_report, summarize
from models import orthogonal
from tracking import Metrics, machine_tags
from train import Rollout, collect, compute_advantages, schedule, update


class StateLander:
    """One lander played in decisions, seen as its state vector, float32 (8,)."""

    def __init__(self, frame_skip):
        self.env, self.frame_skip = gym.make(ENV_ID), frame_skip

    def reset(self, seed):
        self.episode_return, self.episode_length = 0.0, 0
        return self.env.reset(seed=int(seed))[0]

    def step(self, action):
        reward = 0.0
        for _ in range(self.frame_skip):
            state, step_reward, terminated, truncated, _ = self.env.step(action)
            reward += float(step_reward)
            self.episode_length += 1
            if terminated or truncated:
                break
        self.episode_return += reward
        return state, reward, terminated, truncated and not terminated

    def outcome(self):
        """As envs.Lander's, but tells a rest from all else only."""
        return OUTCOMES.index("rest" if not self.env.unwrapped.lander.awake else "crash")


class StateLanders(gym.Env):
    """Several of them as one environment of AsyncVectorEnv, much as envs.LanderGroup: states (M, 8)."""

    def __init__(self, landers, first_index, seed, frame_skip):
        self.landers = [StateLander(frame_skip) for _ in range(landers)]
        self.generators = [np.random.default_rng([seed, first_index + i]) for i in range(landers)]
        self.states = np.zeros((landers, 8), np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.states.shape, np.float32)
        self.action_space = gym.spaces.MultiDiscrete([4] * landers)

    def _begin(self, i):
        self.states[i] = self.landers[i].reset(self.generators[i].integers(TRAINING_SEEDS))

    def reset(self, *, seed=None, options=None):
        for i in range(len(self.landers)):
            self._begin(i)
        return self.states, {}

    def step(self, actions):
        m = len(self.landers)
        rewards, terminated, truncated = np.zeros(m, np.float32), np.zeros(m, bool), np.zeros(m, bool)
        frames = np.zeros(m, np.int64)
        ended = {key: np.zeros(m) for key in ("episode_return", "episode_length", "episode_outcome")}
        final = np.zeros_like(self.states)
        for i, lander in enumerate(self.landers):
            before = lander.episode_length
            self.states[i], rewards[i], terminated[i], truncated[i] = lander.step(int(actions[i]))
            frames[i] = lander.episode_length - before
            if terminated[i] or truncated[i]:
                final[i] = self.states[i]
                for key in ended:
                    value = getattr(lander, key, None)
                    ended[key][i] = lander.outcome() if value is None else value
                self._begin(i)
        info = ended if (terminated | truncated).any() else {}
        return self.states, rewards, terminated, truncated, info | {"env_frames": frames, "final_frames": final}


class StatePolicy(nn.Module):
    """Two layers of 64 units for the actor, two for the critic; the interface of models.Policy."""

    stack = 1

    def __init__(self):
        super().__init__()

        def layers(outputs, gain):
            return nn.Sequential(
                orthogonal(nn.Linear(8, 64)), nn.Tanh(), orthogonal(nn.Linear(64, 64)), nn.Tanh(),
                orthogonal(nn.Linear(64, outputs), gain))

        self.actor, self.critic = layers(4, 0.01), layers(1, 1.0)

    def look(self, states):
        return {"states": states}

    def see(self, states):
        return self.look(states), torch.arange(len(states))[:, None]

    def forward(self, seen, stacks):
        states = seen["states"][stacks[:, -1]]  # (B, 8)
        return self.actor(states), self.critic(states)[:, 0]


def train(config, folder):
    """Training as train.Trainer does it, without checkpoints; the policy."""
    ppo, env, seed = config.ppo, config.env, config.run.seed
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # networks this small gain nothing from a second
    generator, fp32 = torch.Generator().manual_seed(seed), contextlib.nullcontext()
    policy, landers = StatePolicy(), env.num_envs // env.num_workers
    optimizer = torch.optim.Adam(policy.parameters(), lr=ppo.learning_rate, eps=ppo.adam_eps)
    groups = [partial(StateLanders, landers, w * landers, seed, env.frame_skip) for w in range(env.num_workers)]
    envs = AsyncVectorEnv(groups, copy=False, context="forkserver", autoreset_mode=AutoresetMode.DISABLED)
    states = torch.from_numpy(envs.reset()[0]).flatten(0, 1).clone()  # (N, 8)
    rollout = Rollout.empty(ppo.num_steps, env.num_envs, 1, policy.look(states))
    metrics, recent, frames, late, start = Metrics(folder / "metrics.csv"), deque(maxlen=100), 0, False, time.time()
    while frames < ppo.total_frames:
        learning_rate, entropy_coef = schedule(ppo, frames, late)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        states, stats = collect(envs, policy, rollout, states, ppo.reward_scale, fp32)
        advantages, returns = compute_advantages(rollout, ppo.gamma, ppo.gae_lambda)
        learned = update(policy, optimizer, rollout, advantages, returns, ppo, entropy_coef, fp32, generator)
        frames += stats["env_frames"]
        recent.extend(stats["episodes"])
        return_mean = float(np.mean([episode[0] for episode in recent])) if recent else float("nan")
        late |= ppo.late_return is not None and len(recent) == recent.maxlen and return_mean >= ppo.late_return
        landed = [episode[2] == OUTCOMES.index("rest") for episode in recent]
        metrics.append(
            {"frames": frames, "rollout/return_mean": return_mean, "rollout/landed_rate": float(np.mean(landed or [0])),
             "speed/total_seconds": time.time() - start, "eval/return_mean": float("nan")}
            | {f"update/{key}": value for key, value in learned.items()})
    envs.close()
    return policy


@torch.no_grad()
def score(policy, frame_skip, episodes=100):
    """The part of a report that greedy play of the evaluation's seeds determines."""
    lander, results = StateLander(frame_skip), []
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
        state, ended = lander.reset(seed), False
        while not ended:
            logits, _ = policy(*policy.see(torch.from_numpy(state)[None]))
            state, _, terminated, truncated = lander.step(int(logits.argmax()))
            ended = terminated or truncated
        results.append((lander.episode_return, lander.episode_length, lander.outcome()))
    return summarize(*map(np.array, zip(*results, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).parent.parent / "configs" / "cnn.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        sys.exit(f"yardstick.py: {error}")
    folder = Path("runs") / (config.run.name or f"yardstick-s{config.run.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").unlink(missing_ok=True)
    save_config(config, folder / "config.yaml")
    (folder / "machine.json").write_text(json.dumps(machine_tags(1), indent=2) + "\n")
    start = time.perf_counter()
    policy = train(config, folder)
    report = {"checkpoint": "none", "policy": "state vector", "mode": "greedy", "episodes": 100}
    report |= {"seed": EVALUATION_SEED} | score(policy, config.env.frame_skip)
    report |= {"seconds": time.perf_counter() - start}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


if __name__ == "__main__":
    main()
