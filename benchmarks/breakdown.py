"""Where the time of one training update goes, part by part, and how little it could be.

    python benchmarks/breakdown.py [--config configs/cnn.yaml] [--seconds 5] [section.key=value ...]

Each part is measured by itself, for as many decisions as one update has: physics, and physics with drawing, in
env.num_workers processes at once that talk to nobody; the same landers behind their workers, whose surplus is waking
and transport; `collect` on landers that answer at once, which is inference; `update`. The floor beside it: gymnasium's
own LunarLander.step, and nothing else, on every core; the network's multiply-adds at the fastest that this machine
multiplies matrices of the same type. Random actions; a policy that crashes less often resets less often.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, before torch is loaded

import argparse
import multiprocessing
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gymnasium as gym
import numpy as np

from envs import EnvGroup
from lander import Lander
from task import ACTIONS, ENV_ID

CORES = len(os.sched_getaffinity(0))


def rate(work, seconds):
    """Calls of `work` per second, after one to warm up."""
    work()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        count += 1
    return count / (time.perf_counter() - start)


class Blind(Lander):
    """A lander that nobody sees."""

    def begin_picture(self):
        self.blank = np.zeros(self.stack.frames[: self.stack.planes].shape, np.uint8)

    def picture(self):
        return self.blank


def plays_blind(landers, settings, seconds, seed):
    """Decisions per second of landers stepped in turn in this process, unseen."""
    fleet, rng = [Blind(**settings) for _ in range(landers)], np.random.default_rng(seed)
    for lander in fleet:
        lander.reset(rng.integers(2**31))

    def decide():
        for lander in fleet:
            if any(lander.step(int(rng.integers(len(ACTIONS))))[2:]):
                lander.reset(rng.integers(2**31))

    return landers * rate(decide, seconds)


def plays(landers, settings, seconds, seed):
    """Decisions per second of a group of landers in this process."""
    group, rng = EnvGroup(landers, 0, seed, **settings), np.random.default_rng(seed)
    group.reset()
    return landers * rate(lambda: group.step(rng.integers(len(ACTIONS), size=landers)), seconds)


def steps(seconds, seed):
    """gymnasium's own steps per second in this process, resets not counted."""
    env, rng, spent, count = gym.make(ENV_ID).unwrapped, np.random.default_rng(seed), 0.0, 0
    while spent < seconds:
        env.reset(seed=int(rng.integers(2**31)))
        actions, ended, start = rng.integers(len(ACTIONS), size=1000), False, time.perf_counter()
        for action in actions:
            ended = env.step(action)[2]
            count += 1
            if ended:
                break
        spent += time.perf_counter() - start
    return count / spent


def at_once(work, processes):
    """The sum of what `work`, given a seed, returns in so many processes at the same time."""
    with multiprocessing.get_context("forkserver").Pool(processes) as pool:
        return sum(pool.map(work, range(processes), chunksize=1))


class Canned:
    """Landers that answer at once, with the frames that real ones showed before."""

    def __init__(self, envs):
        self.frames = np.array(envs.step(np.zeros(envs.num_envs, int))[0])
        self.rewards, self.never = np.zeros(envs.num_envs, np.float32), np.zeros(envs.num_envs, bool)

    def step(self, actions):
        return self.frames, self.rewards, self.never, self.never, {"env_frames": np.zeros(len(actions), int)}


def peak(torch, dtype, seconds, size=2048):
    """Multiply-adds per second of the fastest of a few square matrix products of `dtype`, all threads."""
    speeds = []
    for side in (size // 2, size):
        a = torch.randn(side, side, dtype=dtype)
        speeds.append(side**3 * rate(lambda a=a: a @ a, seconds / 2))
    return max(speeds)


def main():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from machinery.config import ConfigError, load_config
    from train import Trainer, collect, compute_advantages, update

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).parent.parent / "configs" / "cnn.yaml")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, [*args.overrides, "run.device=cpu"])
    except ConfigError as error:
        sys.exit(f"breakdown.py: {error}")
    env, ppo, seconds = config.env, config.ppo, args.seconds
    decisions = env.num_envs * ppo.num_steps
    if env.id != ENV_ID or env.continuous:
        sys.exit(f"breakdown.py: it measures {ENV_ID} with discrete actions, not {args.config}")
    settings = env.settings()
    del settings["env_id"]
    group = env.num_envs // env.num_workers

    own = at_once(partial(steps, seconds), CORES)
    blind, drawn = (
        decisions / at_once(partial(play, group, settings, seconds), env.num_workers) for play in (plays_blind, plays))

    with closing(Trainer(config)) as trainer:
        rng = np.random.default_rng(0)
        stepped = ppo.num_steps / rate(
            lambda: trainer.envs.step(rng.integers(len(ACTIONS), size=env.num_envs)), seconds)
        whole = 1 / rate(trainer.iterate, seconds)
        frames, canned = trainer.frames, Canned(trainer.envs)
        torch.set_num_threads(1)  # as while collecting
        inference = partial(
            collect, canned, trainer.policy, trainer.rollout, frames, ppo.reward_scale, trainer.autocast)
        inferred = 1 / rate(inference, seconds)
        torch.set_num_threads(trainer.gauge.num_threads)
        compute_advantages(trainer.rollout, ppo.gamma, ppo.gae_lambda)
        learn = partial(
            update, trainer.policy, trainer.optimizer, trainer.rollout, ppo, ppo.entropy_coef, trainer.autocast,
            trainer.generator)
        learned = 1 / rate(learn, seconds)
        operations = []
        for part in (inference, learn):
            with FlopCounterMode(display=False) as counter:
                part()
            operations.append(counter.get_total_flops() / 2)
        with trainer.autocast:
            dtype = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype  # that of a matrix product in the network
        fastest = peak(torch, dtype, seconds)

    floors = {"inference": operations[0] / fastest, "learning": operations[1] / fastest}
    floors["physics"] = decisions * env.frame_skip / own
    parts = {
        "physics": blind, "drawing": drawn - blind, "waking workers, transport": stepped - drawn, "inference": inferred,
        "learning": learned}
    total, least = sum(parts.values()), sum(floors.values())
    kind = str(dtype).removeprefix("torch.")
    print(f"One update of {Path(args.config).stem}: {decisions:,} decisions of {env.frame_skip} frames on {CORES} "
          f"cores. Floor: {own:,.0f} steps, or {fastest / 1e9:,.0f} G multiply-adds in {kind}, a second.\n")
    print("| part | seconds | share | floor, seconds | times the floor |\n| --- | --- | --- | --- | --- |")
    for part, spent in parts.items():
        floor = f"{floors[part]:.3f} | {spent / floors[part]:.1f}" if part in floors else "- | -"
        print(f"| {part} | {spent:.3f} | {spent / total:.0%} | {floor} |")
    print(f"| sum of the parts | {total:.3f} | 100% | {least:.3f} | {total / least:.1f} |")
    print(f"| measured as a whole | {whole:.3f} | | | {whole / least:.1f} |")


if __name__ == "__main__":
    main()
