"""Decisions per second of the landers alone, random actions, no network: the usual wrappers against envs.py.

    python benchmarks/rendering.py [--seconds 5] [--rounds 3]

Same decisions, same action repeat, same frame size and stack. The ways take turns, so that a machine that slows down
slows all of them; each figure is the median of its rounds, each ratio is to the first row of the same run.

Where EnvPool is installed (benchmarks/requirements.txt), its own LunarLander-v3 is measured too: as it is, with state
vectors and no picture, which shows what physics costs in C++; and with its `render()`, which draws other pixels than
gymnasium's.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import wrappers
from gymnasium.vector import AsyncVectorEnv

from camera import frame_planes, shrink
from envs import make_vector_env
from frames import FrameStack
from task import ACTIONS, ENV_ID

try:
    import envpool
except ImportError:
    envpool = None

STACK = 4


class RepeatAction(gym.Wrapper):
    def __init__(self, env, times):
        super().__init__(env)
        self.times = times

    def step(self, action):
        total = 0.0
        for _ in range(self.times):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def wrapped_lander(frame_skip, factor, color):
    """What one gets from gymnasium's own wrappers; the frame is rendered once per decision, not per physics step."""
    cv2.setNumThreads(1)
    env = RepeatAction(gym.make(ENV_ID, render_mode="rgb_array"), frame_skip)
    env = wrappers.ResizeObservation(wrappers.AddRenderObservation(env), (400 // factor, 600 // factor))
    return wrappers.FrameStackObservation(env if color else wrappers.GrayscaleObservation(env), STACK)


def wrapper_stack(frame_skip, factor, color, num_envs=16):
    return AsyncVectorEnv(
        [partial(wrapped_lander, frame_skip, factor, color)] * num_envs, context="forkserver", shared_memory=True)


def ours(num_envs, num_workers, frame_skip, factor, color):
    return make_vector_env(
        num_envs, num_workers, frame_skip=frame_skip, frame_stack=STACK, shrink_factor=factor, color=color)


class EnvPoolLanders:
    """EnvPool's LunarLander-v3 in the same decisions; `drawn`: with frame stacks of its own renderer's pictures."""

    def __init__(self, drawn, num_envs, frame_skip, factor, color):
        render_mode = "rgb_array" if drawn else None
        self.envs = envpool.make_gymnasium("LunarLander-v3", num_envs=num_envs, render_mode=render_mode)
        self.drawn, self.frame_skip, self.factor, self.color = drawn, frame_skip, factor, color
        self.action_space, self.ids = gym.spaces.MultiDiscrete([len(ACTIONS)] * num_envs), np.arange(num_envs)
        shape = (frame_planes(color), 400 // factor, 600 // factor)
        self.stacks = [FrameStack(STACK, shape) for _ in range(num_envs)]

    def reset(self, seed):
        self.envs.reset()

    def step(self, actions):
        for _ in range(self.frame_skip):
            self.envs.step(actions)  # an episode that ends begins anew at the next step
        if self.drawn:
            for stack, picture in zip(self.stacks, self.envs.render(env_ids=self.ids), strict=True):
                stack.push(shrink(picture, self.factor, self.color))

    def close(self, terminate):
        self.envs.close()


WAYS = {
    "gymnasium's wrappers, 16 workers of 1 lander": wrapper_stack,
    "envs.py, 16 workers of 1 lander": partial(ours, 16, 16),
    "envs.py, 2 workers of 16 landers": partial(ours, 32, 2),
}
if envpool:
    WAYS["EnvPool, 16 landers, no pictures: state vectors"] = partial(EnvPoolLanders, False, 16)
    WAYS["EnvPool, 16 landers, other pixels: its own render()"] = partial(EnvPoolLanders, True, 16)


def decisions_per_second(envs, shape, seconds, rng):
    decisions, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        envs.step(rng.integers(len(ACTIONS), size=shape))
        decisions += int(np.prod(shape))
    return decisions / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| frames | action repeat | how | decisions/s | ratio |\n| --- | --- | --- | --- | --- |")
    for factor, color in ((8, False), (4, True)):
        for frame_skip in (4, 1):
            rates = {}
            ways = {how: make(frame_skip=frame_skip, factor=factor, color=color) for how, make in WAYS.items()}
            for envs in ways.values():
                envs.reset()
            for _ in range(args.rounds):
                for how, envs in ways.items():
                    shape = envs.action_space.shape
                    rates.setdefault(how, []).append(decisions_per_second(envs, shape, args.seconds, rng))
            for envs in ways.values():
                envs.close(terminate=True)
            first = statistics.median(next(iter(rates.values())))
            for how, measured in rates.items():
                rate = statistics.median(measured)
                size = f"{600 // factor}x{400 // factor} {'colour' if color else 'gray'}"
                print(f"| {size} | {frame_skip} | {how} | {rate:,.0f} | {rate / first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
