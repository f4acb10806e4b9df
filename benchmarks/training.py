"""Whole training on equal work, side by side: Stable-Baselines3, a single-file PPO in the usual style, and train.py.

    pip install -r benchmarks/requirements.txt
    python benchmarks/training.py [--updates 3] [--rounds 3]

All play 16 landers x 128 decisions of 4 frames, see 4 stacked 75x50 gray pictures through the Nature CNN (Mnih et al.
2015) with 256 units, and make 4 passes in minibatches of 512. The first two use gymnasium's wrappers in one process per
lander, as their users do, and 32-bit floats. Each turn is a new process that makes one update to warm up and is timed
over the next ones; the ways take turns, so that a machine that slows down slows all; figures are medians of the rounds,
ratios are to the first row. Memory is the peak of the whole process tree, shared pages counted once. A decision counts
as 4 frames; only an episode's last may have fewer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import psutil
import torch
from pydantic import Field
from rendering import wrapped_lander, wrapper_stack
from torch import nn
from torch.distributions import Categorical

from layers import channels_last, orthogonal, take, view_ids
from machinery.config import load_config
from models import POLICIES, Policy, PolicyOutput
from models import Categorical as Distribution
from train import Trainer

LANDERS, STEPS, FRAME_SKIP, FACTOR, EPOCHS, MINIBATCH, UNITS = 16, 128, 4, 8, 4, 512, 256
BATCH = LANDERS * STEPS


def nature_cnn():
    """uint8 / 255 (B, 4, 50, 75) -> (B, 256)."""
    return nn.Sequential(
        orthogonal(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(), orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
        orthogonal(nn.Conv2d(64, 64, 3)), nn.ReLU(), nn.Flatten(), orthogonal(nn.Linear(64 * 2 * 5, UNITS)), nn.ReLU())


def stable_baselines3():
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import SubprocVecEnv

    envs = SubprocVecEnv([partial(wrapped_lander, FRAME_SKIP, FACTOR, False)] * LANDERS)
    model = PPO("CnnPolicy", envs, n_steps=STEPS, batch_size=MINIBATCH, n_epochs=EPOCHS, device="cpu",
                policy_kwargs={"features_extractor_kwargs": {"features_dim": UNITS}})
    while True:
        model.learn(BATCH, reset_num_timesteps=False)
        yield


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nature_cnn()
        self.actor, self.critic = orthogonal(nn.Linear(UNITS, 4), 0.01), orthogonal(nn.Linear(UNITS, 1), 1.0)

    def act(self, x, action=None):
        hidden = self.network(x / 255.0)
        chances = Categorical(logits=self.actor(hidden))
        action = chances.sample() if action is None else action
        return action, chances.log_prob(action), chances.entropy(), self.critic(hidden)


def single_file():
    """One loop over plain tensors, as single-file implementations have it."""
    envs, agent = wrapper_stack(FRAME_SKIP, FACTOR, False, LANDERS), Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    obs = torch.zeros(STEPS, LANDERS, *envs.single_observation_space.shape)
    actions, logprobs, rewards, dones, values = torch.zeros(5, STEPS, LANDERS)
    next_obs, next_done = torch.Tensor(envs.reset(seed=1)[0]), torch.zeros(LANDERS)
    while True:
        for step in range(STEPS):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprobs[step], _, value = agent.act(next_obs)
            actions[step], values[step] = action, value.flatten()
            seen, reward, terminated, truncated, _ = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward)
            next_obs, next_done = torch.Tensor(seen), torch.Tensor(np.logical_or(terminated, truncated))
        with torch.no_grad():
            next_value, advantages, last = agent.act(next_obs)[3].flatten(), torch.zeros(STEPS, LANDERS), 0
            for t in reversed(range(STEPS)):
                alive = 1.0 - (next_done if t == STEPS - 1 else dones[t + 1])
                following = next_value if t == STEPS - 1 else values[t + 1]
                last = rewards[t] + 0.99 * following * alive - values[t] + 0.99 * 0.95 * alive * last
                advantages[t] = last
            returns = advantages + values
        b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(), logprobs.flatten()
        b_advantages, b_returns, indices = advantages.flatten(), returns.flatten(), np.arange(BATCH)
        for _ in range(EPOCHS):
            np.random.shuffle(indices)
            for start in range(0, BATCH, MINIBATCH):
                mb = indices[start : start + MINIBATCH]
                _, logprob, entropy, value = agent.act(b_obs[mb], b_actions.long()[mb])
                ratio, advantage = (logprob - b_logprobs[mb]).exp(), b_advantages[mb]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
                value_loss = 0.5 * ((value.flatten() - b_returns[mb]) ** 2).mean()
                optimizer.zero_grad()
                (policy_loss - 0.01 * entropy.mean() + 0.5 * value_loss).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        yield


class NatureCNN(Policy):
    """The same network as a policy of this repository: pictures in, no eye, no mirror."""

    class Options(Policy.Options):
        name: Literal["nature"] = Field("nature")

    def __init__(self, options, spaces):
        super().__init__(options, spaces)
        self.network = nature_cnn()
        self.actor, self.critic = orthogonal(nn.Linear(UNITS, 4), 0.01), orthogonal(nn.Linear(UNITS, 1), 1.0)

    def forward(self, frame_store, frame_ids, minibatch=None):
        pictures = take(frame_store["pictures"], view_ids(frame_ids).flatten())
        pictures = channels_last(pictures.view(len(frame_ids), -1, *self.picture_size)).div_(255)  # (B, 4, h, w)
        hidden = self.network(pictures).float()
        return PolicyOutput(Distribution(self.actor(hidden)), self.critic(hidden)[:, 0])


POLICIES["nature"] = NatureCNN


def ours():
    config = load_config(None, [
        "model.name=nature", "model.eye=none", "model.mirror=false", "env.color=false", f"env.shrink_factor={FACTOR}",
        f"env.frame_skip={FRAME_SKIP}", f"env.num_envs={LANDERS}", f"ppo.num_steps={STEPS}",
        f"ppo.update_epochs={EPOCHS}", f"ppo.num_minibatches={BATCH // MINIBATCH}", "run.device=cpu"])
    trainer = Trainer(config)
    while True:
        trainer.iterate()
        yield


WAYS = {
    "Stable-Baselines3 PPO, SubprocVecEnv": stable_baselines3,
    "single-file PPO, AsyncVectorEnv": single_file,
    "train.py": ours,
}


def turn(way, updates):
    """Decisions per second and peak memory in bytes of one way in a process of its own."""
    # What train.py sets for itself, before torch is loaded; the others' users do not.
    environment = os.environ | ({"OMP_WAIT_POLICY": "PASSIVE"} if way == "train.py" else {})
    process = subprocess.Popen(
        [sys.executable, __file__, "--way", way, "--updates", str(updates)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0

    def watch():
        nonlocal peak
        while process.poll() is None:
            total = 0
            try:
                root = psutil.Process(process.pid)
                for part in [root, *root.children(recursive=True)]:
                    try:
                        total += part.memory_full_info().pss
                    except (psutil.NoSuchProcess, psutil.ZombieProcess):
                        continue
            except psutil.NoSuchProcess:
                break
            peak = max(peak, total)
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(f"{way}: ended with {process.returncode}; its own words are above")
    return BATCH * updates / json.loads(output.splitlines()[-1])["seconds"], peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3, help="timed updates of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # what a turn's own process does
    args = parser.parse_args()
    if args.way:
        training = WAYS[args.way]()
        next(training)
        start = time.perf_counter()
        for _ in range(args.updates):
            next(training)
        print(json.dumps({"seconds": time.perf_counter() - start}))
        return
    turns = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, measured in turns.items():
            measured.append(turn(way, args.updates))
    print("| whole training | decisions/s | frames/s | seconds per million frames | peak memory | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = None
    for way, measured in turns.items():
        rate, memory = (statistics.median(values) for values in zip(*measured, strict=True))
        first = first or rate
        frames = FRAME_SKIP * rate
        print(f"| {way} | {rate:,.0f} | {frames:,.0f} | {1e6 / frames:,.0f} | {memory / 2**30:.1f} GiB | "
              f"{rate / first:.1f} |")


if __name__ == "__main__":
    main()
