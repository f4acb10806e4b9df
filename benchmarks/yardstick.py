"""What the same PPO reaches on the state vector: how much of the task is control, and what is the price of seeing.

    python benchmarks/yardstick.py --config configs/cnn.yaml [run.seed=1] [ppo.gamma=0.99]
    python benchmarks/yardstick.py --config configs/cnn_wind.yaml --states 4     # the newest four, as frames in a stack

A measure to hold results against, never a way to train one: the state vector is what the policies here must do without.
train.py's own collect, compute_advantages, update and schedule run on an environment's own observations in place of
frames, with two small networks in place of a policy, in the weather or the environment that the config says. Writes
runs/yardstick-sSEED/metrics.csv and report.json, of evaluation.episodes greedy ones; plot.py draws them like others.
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

from envs import EnvGroup
from evaluate import print_report, summarize, whole
from frames import FrameStack, RenderedEnv
from lander import RenderedLander
from layers import orthogonal
from machinery.checkpoint import save_config
from machinery.config import ConfigError, load_config
from machinery.tracking import Metrics, machine_tags
from models import LOG_STD, Categorical, DiagonalGaussian, PolicyOutput
from task import ENV_ID, EVALUATION_SEED
from train import Rollout, collect, compute_advantages, episode_means, schedule, update


class LastObservation(gym.ObservationWrapper):
    """Keeps the newest observation, float32 (D,)."""

    def observation(self, observation):
        self.newest = np.asarray(observation, np.float32).ravel()
        return observation


class StateSeen:
    """Mixed into a RenderedEnv: nothing is rendered, and the stack is of states, float32 (states * D,)."""

    def __init__(self, states, **settings):
        super().__init__(**settings)
        self.env.reset(seed=0)
        self.stack = FrameStack(states, self.env.newest.shape, np.float32)

    def make_env(self):
        return LastObservation(gym.make(self.env_id, **self.options))

    def pass_time(self):
        pass

    def picture(self):
        return self.env.newest


class StateEnv(StateSeen, RenderedEnv):
    pass


class StateLander(StateSeen, RenderedLander):
    pass


def make_state_env(env_id, **settings):
    return StateLander(**settings) if env_id == ENV_ID else StateEnv(env_id=env_id, **settings)


class StateEnvs(EnvGroup):
    """Several of them, as envs.FrameVectorEnv without its workers: states float32 (N, D)."""

    def __init__(self, *args, **settings):
        super().__init__(*args, make_env=make_state_env, **settings)

    def reset(self):
        return np.stack(super().reset()[0]), {}

    def step(self, actions):
        states, *rest = super().step(actions)
        return np.stack(states), *rest


class StatePolicy(nn.Module):
    """Two layers of 64 units for the actor, two for the critic; the interface of models.Policy."""

    def __init__(self, inputs, task):
        super().__init__()

        def layers(outputs, gain):
            return nn.Sequential(
                orthogonal(nn.Linear(inputs, 64)), nn.Tanh(), orthogonal(nn.Linear(64, 64)), nn.Tanh(),
                orthogonal(nn.Linear(64, outputs), gain))

        self.actor, self.critic = layers(len(task.actions), 0.01), layers(1, 1.0)
        self.log_std = nn.Parameter(torch.full((len(task.actions),), LOG_STD)) if task.continuous else None

    def preprocess(self, states):
        return {"states": states}

    def preprocess_stacks(self, states):
        return self.preprocess(states), torch.arange(len(states))[:, None]

    def forward(self, frame_store, frame_ids, minibatch=None):
        states = frame_store["states"][frame_ids[:, -1]]  # (B, D)
        actor, value = self.actor(states), self.critic(states)[:, 0]
        distribution = Categorical(actor) if self.log_std is None else DiagonalGaussian(actor, self.log_std)
        return PolicyOutput(distribution, value)


def train(config, states, folder):
    """Training as train.Trainer does it, without checkpoints; the policy."""
    ppo, env, seed = config.ppo, config.env, config.run.seed
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # networks this small gain nothing from a second
    generator, fp32 = torch.Generator().manual_seed(seed), contextlib.nullcontext()
    envs = StateEnvs(env.num_envs, 0, seed, states=states, **env.settings())
    observations = torch.from_numpy(envs.reset()[0])  # (N, D)
    policy = StatePolicy(observations.shape[1], env.task)
    optimizer = torch.optim.Adam(policy.parameters(), lr=ppo.learning_rate, eps=ppo.adam_eps)
    example_actions = torch.from_numpy(np.zeros(envs.action_space.shape, envs.action_space.dtype))
    rollout = Rollout.empty(ppo.num_steps, 1, policy.preprocess(observations), example_actions)
    metrics, recent, frames, late, start = Metrics(folder / "metrics.csv"), deque(maxlen=100), 0, False, time.time()
    while frames < ppo.total_frames:
        learning_rate, entropy_coef = schedule(ppo, frames, late)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        observations, stats = collect(envs, policy, rollout, observations, ppo.reward_scale, fp32)
        compute_advantages(rollout, ppo.gamma, ppo.gae_lambda)
        learned = update(policy, optimizer, rollout, ppo, entropy_coef, fp32, generator)
        frames += stats["env_frames"]
        recent.extend(stats["episodes"])
        episodes = episode_means(recent, envs.envs[0].metrics)
        late |= (ppo.late_return is not None and len(recent) == recent.maxlen
                 and episodes["return_mean"] >= ppo.late_return)
        metrics.append(
            {"frames": frames, "speed/total_seconds": time.time() - start, "eval/return_mean": float("nan")}
            | {f"rollout/{key}": value for key, value in episodes.items()}
            | {f"update/{key}": value for key, value in learned.items()})
    return policy


@torch.no_grad()
def score(policy, env, episodes):
    """The part of a report that greedy play of the evaluation's seeds determines, in `env` of make_state_env."""
    results = []
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
        state, ended = env.reset(seed), False
        while not ended:
            output = policy(*policy.preprocess_stacks(torch.from_numpy(state)[None]))
            state, _, terminated, truncated = env.step(output.distribution.mode()[0].tolist())
            ended = terminated or truncated
        results.append((env.episode_return, env.episode_length, env.outcome()))
    return summarize(env.task, *map(np.array, zip(*results, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).parent.parent / "configs" / "cnn.yaml")
    parser.add_argument("--states", type=whole(1, 64), default=1, help="how many of the newest states a decision sees")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        sys.exit(f"yardstick.py: {error}")
    folder = Path("runs") / (config.run.name or f"yardstick-s{config.run.seed}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"yardstick.py: {folder}: {error.strerror}; choose another run.name, or delete it")
    save_config(config, folder / "config.yaml")
    (folder / "machine.json").write_text(json.dumps(machine_tags(1), indent=2) + "\n")
    start = time.perf_counter()
    policy = train(config, args.states, folder)
    seen = "state vector" if args.states == 1 else f"{args.states} state vectors"
    episodes = config.evaluation.episodes
    if not episodes:
        return
    report = {"checkpoint": "none", "policy": seen, "mode": "greedy", "episodes": episodes, "seed": EVALUATION_SEED}
    report |= score(policy, make_state_env(states=args.states, **config.env.settings()), episodes)
    report |= {"seconds": time.perf_counter() - start, "env": config.env.described()}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


if __name__ == "__main__":
    main()
