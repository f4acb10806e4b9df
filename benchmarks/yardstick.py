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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from envs import EPISODE_METRICS
from evaluate import print_report, summarize
from machinery.checkpoint import save_config
from machinery.config import ConfigError, load_config
from machinery.tracking import Metrics, machine_tags
from models import Categorical, PolicyOutput, orthogonal
from task import ENV_ID, EVALUATION_SEED, OUTCOMES, TRAINING_SEEDS
from train import Rollout, collect, compute_advantages, episode_means, schedule, update


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


class StateLanders:
    """Several of them, as envs.LanderVectorEnv without its workers: states float32 (N, 8)."""

    def __init__(self, num_envs, seed, frame_skip):
        self.landers = [StateLander(frame_skip) for _ in range(num_envs)]
        self.generators = [np.random.default_rng([seed, i]) for i in range(num_envs)]
        self.states = np.zeros((num_envs, 8), np.float32)

    def _begin(self, i):
        self.states[i] = self.landers[i].reset(self.generators[i].integers(TRAINING_SEEDS))

    def reset(self):
        for i in range(len(self.landers)):
            self._begin(i)
        return self.states, {}

    def step(self, actions):
        n = len(self.landers)
        rewards, terminated, truncated = np.zeros(n, np.float32), np.zeros(n, bool), np.zeros(n, bool)
        info = {"env_frames": np.zeros(n, np.int64), "final_frames": np.zeros_like(self.states),
                "episode": {key: np.zeros(n) for key in EPISODE_METRICS}}
        for i, lander in enumerate(self.landers):
            before = lander.episode_length
            self.states[i], rewards[i], terminated[i], truncated[i] = lander.step(int(actions[i]))
            info["env_frames"][i] = lander.episode_length - before
            if terminated[i] or truncated[i]:
                info["final_frames"][i] = self.states[i]
                for key, measure in EPISODE_METRICS.items():
                    info["episode"][key][i] = measure(lander)
                self._begin(i)
        return self.states, rewards, terminated, truncated, info


class StatePolicy(nn.Module):
    """Two layers of 64 units for the actor, two for the critic; the interface of models.Policy."""

    def __init__(self):
        super().__init__()

        def layers(outputs, gain):
            return nn.Sequential(
                orthogonal(nn.Linear(8, 64)), nn.Tanh(), orthogonal(nn.Linear(64, 64)), nn.Tanh(),
                orthogonal(nn.Linear(64, outputs), gain))

        self.actor, self.critic = layers(4, 0.01), layers(1, 1.0)

    def preprocess(self, states):
        return {"states": states}

    def preprocess_stacks(self, states):
        return self.preprocess(states), torch.arange(len(states))[:, None]

    def forward(self, frame_store, frame_ids, minibatch=None):
        states = frame_store["states"][frame_ids[:, -1]]  # (B, 8)
        return PolicyOutput(Categorical(self.actor(states)), self.critic(states)[:, 0])


def train(config, folder):
    """Training as train.Trainer does it, without checkpoints; the policy."""
    ppo, env, seed = config.ppo, config.env, config.run.seed
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # networks this small gain nothing from a second
    generator, fp32 = torch.Generator().manual_seed(seed), contextlib.nullcontext()
    policy = StatePolicy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=ppo.learning_rate, eps=ppo.adam_eps)
    envs = StateLanders(env.num_envs, seed, env.frame_skip)
    states = torch.from_numpy(envs.reset()[0]).clone()  # (N, 8)
    rollout = Rollout.empty(ppo.num_steps, 1, policy.preprocess(states), torch.zeros(env.num_envs, dtype=torch.int64))
    metrics, recent, frames, late, start = Metrics(folder / "metrics.csv"), deque(maxlen=100), 0, False, time.time()
    while frames < ppo.total_frames:
        learning_rate, entropy_coef = schedule(ppo, frames, late)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        states, stats = collect(envs, policy, rollout, states, ppo.reward_scale, fp32)
        compute_advantages(rollout, ppo.gamma, ppo.gae_lambda)
        learned = update(policy, optimizer, rollout, ppo, entropy_coef, fp32, generator)
        frames += stats["env_frames"]
        recent.extend(stats["episodes"])
        episodes = episode_means(recent)
        late |= (ppo.late_return is not None and len(recent) == recent.maxlen
                 and episodes["return_mean"] >= ppo.late_return)
        metrics.append(
            {"frames": frames, "speed/total_seconds": time.time() - start, "eval/return_mean": float("nan")}
            | {f"rollout/{key}": value for key, value in episodes.items()}
            | {f"update/{key}": value for key, value in learned.items()})
    return policy


@torch.no_grad()
def score(policy, frame_skip, episodes=100):
    """The part of a report that greedy play of the evaluation's seeds determines."""
    lander, results = StateLander(frame_skip), []
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
        state, ended = lander.reset(seed), False
        while not ended:
            output = policy(*policy.preprocess_stacks(torch.from_numpy(state)[None]))
            state, _, terminated, truncated = lander.step(int(output.distribution.mode()))
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
