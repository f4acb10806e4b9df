"""Many environments played in a few worker processes, seen as frames: the vector environment that train.py learns from.

    from envs import make_vector_env
    envs = make_vector_env(num_envs=32, num_workers=2, seed=1)
    frames, _ = envs.reset()                                        # uint8 (N, K, H, W)
    frames, rewards, terminated, truncated, info = envs.step(actions)   # actions int64 (N,)

N is the number of environments, K that of stacked frames times planes (3 in colour, 1 in gray). LunarLander-v3 has a
fast class of its own (lander.py); every other environment is seen through its own `render()` (frames.py).

Nothing here imports torch: AsyncVectorEnv's workers start by importing this module.
"""

import os
from functools import partial

import cv2
import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space, write_to_shared_memory

from frames import RenderedEnv, frame_planes
from machinery.workers import Workers, check_shared_memory, end_with, sendable_errors, spread, unpinned_cores
from task import ENV_ID, TRAINING_SEEDS, find_task


def env_class(env_id, rendered=False):
    """The class that plays an environment: LunarLander-v3's fast one, unless it shall be `rendered` by its own code."""
    if env_id != ENV_ID:
        return RenderedEnv
    from lander import Lander, RenderedLander  # and Box2D with them

    return RenderedLander if rendered else Lander


def make_env(env_id=ENV_ID, rendered=False, **settings):
    """One environment, ready to be reset. settings: as its env_class takes them; machinery.config.Env.settings."""
    kind = env_class(env_id, rendered)
    return kind(env_id, **settings) if kind is RenderedEnv else kind(**settings)


class FrameStacks(gym.spaces.Box):
    """The stacks of M landers, each uint8 (K, H, W). Where gymnasium expects an observation, they come as a list."""


@write_to_shared_memory.register(FrameStacks)
def _(space, index, stacks, shared_memory):
    """Each stack goes straight to its place; joined to one array first, as for a Box, they would be copied thrice."""
    gathered = np.frombuffer(shared_memory.get_obj(), np.uint8).reshape(-1, *space.shape)
    for place, stack in zip(gathered[index], stacks, strict=True):
        place[:] = stack


class EnvGroup(gym.Env):
    """Several environments stepped in turn: the environment that one worker of AsyncVectorEnv plays.

    A worker costs two context switches a step however little it does, so each worker plays M environments. The group
    resets by itself in the step that ends an episode: the observation is then the first of the next episode, and the
    last one of a truncated episode travels in `info["final_frames"]`.
    """

    def __init__(self, num_envs, first_env, seed, make_env=make_env, **settings):
        cv2.setNumThreads(0)  # the cores belong to the workers' own processes
        self.envs = [make_env(**settings) for _ in range(num_envs)]
        self.first_env, self.seed = first_env, seed
        self.generators = [self._generator(i) for i in range(num_envs)]
        task = self.envs[0].task
        if task.continuous:
            self.action_space = gym.spaces.Box(-1, 1, (num_envs, len(task.actions)), np.float32)
        else:
            self.action_space = gym.spaces.MultiDiscrete([len(task.actions)] * num_envs)
        self.observation_space = FrameStacks(0, 255, (num_envs, *self.frames[0].shape), np.uint8)

    def _generator(self, i):
        """A generator for each, so that episodes do not depend on how the environments are spread over workers."""
        return np.random.default_rng([self.seed, self.first_env + i])

    @property
    def frames(self):
        """The stack that each of them shows, M times uint8 (K, H, W)."""
        return [env.stack.frames for env in self.envs]

    def _begin(self, i):
        self.envs[i].reset(self.generators[i].integers(TRAINING_SEEDS))

    @sendable_errors
    def restore(self, state, first_env=0):
        """Restore this group's part of a FrameVectorEnv.state whose first one is number `first_env`; the frames."""
        own = state[self.first_env - first_env :][: len(self.envs)]
        for i, (episodes, actions) in enumerate(own):
            self.generators[i] = self._generator(i)
            self.generators[i].integers(TRAINING_SEEDS, size=episodes - 1)  # seeds of episodes that are over
            self._begin(i)
            for action in actions:
                self.envs[i].step(action)
        return self.frames

    @sendable_errors
    def reset(self, *, seed=None, options=None):
        for i in range(len(self.envs)):
            self._begin(i)
        return self.frames, {}

    @sendable_errors
    def step(self, actions):
        """One decision each. Returns frames, M times uint8 (K, H, W), and rewards, terminated, truncated, each (M,).

        info: env_frames (M,), environment steps played. If an episode ended, also episode, a dict of the `metrics` of
        its class, (M,), 0 where none did; if one was truncated, final_frames, uint8 (M, K, H, W), its last stack.
        """
        m = len(self.envs)
        rewards, terminated, truncated = np.zeros(m, np.float32), np.zeros(m, bool), np.zeros(m, bool)
        info = {"env_frames": np.zeros(m, np.int64)}
        for i, env in enumerate(self.envs):
            length = env.episode_length
            rewards[i], terminated[i], truncated[i] = env.play(actions[i])
            info["env_frames"][i] = env.episode_length - length
        # Drawing all of them after playing all of them keeps each part's code in the processor's cache.
        for env, view in zip(self.envs, self.envs[0].views(self.envs), strict=True):
            env.observe(*view)
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            info["episode"] = {key: np.zeros(m) for key in self.envs[0].metrics}
        if truncated.any():
            info["final_frames"] = np.zeros_like(np.stack(self.frames))
        for i in ended:
            for key, measure in self.envs[i].metrics.items():
                info["episode"][key][i] = measure(self.envs[i])
            if truncated[i]:
                info["final_frames"][i] = self.envs[i].stack.frames
            self._begin(i)
        return self.frames, rewards, terminated, truncated, info


class FrameVectorEnv(VectorEnv):
    """num_envs environments along one axis, whichever worker plays them.

    Frames are uint8 (N, K, H, W), valid until the next step. Rewards, endings and what `info` holds are (N, ...), as
    in EnvGroup.step. After a WorkerError it can only be closed.
    """

    def __init__(self, make_groups, first_env=0):
        self.workers, self.first_env = Workers(make_groups), first_env
        m, *frames = self.workers.single_observation_space.shape
        self.num_envs = m * self.workers.num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, tuple(frames), np.uint8)
        actions = self.workers.single_action_space  # of the M environments of one worker
        self.single_action_space = (
            gym.spaces.Box(-1, 1, actions.shape[1:], np.float32) if isinstance(actions, gym.spaces.Box)
            else gym.spaces.Discrete(actions.nvec[0]))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        # state[n]: the episodes that environment n has begun, and the actions of the current one. Its future depends on
        # nothing else, where chance comes from the seed alone. A Box2D world cannot be stored, but playing the actions
        # again from the episode's seed is bit-exact. The record is kept here, so that a checkpoint needs no answer from
        # a worker that may have died.
        self.state = [[0, []] for _ in range(self.num_envs)]

    def reset(self, *, seed=None, options=None):
        """Begin the next episode of each. ValueError for a seed, since that of make_vector_env tells them all."""
        if seed is not None or options:
            raise ValueError("seed and options belong to make_vector_env, not to reset")
        for record in self.state:
            record[:] = record[0] + 1, []
        with self.workers.worker_errors(self.workers.long_timeout) as timeout:
            self.workers.reset_async()
            return _one_axis(self.workers.reset_wait(timeout)[0]), {}

    def step(self, actions):
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"actions of shape {np.shape(actions)}, not {self.action_space.shape}")
        with self.workers.worker_errors(self.workers.timeout) as timeout:
            self.workers.step_async(np.reshape(actions, self.workers.action_space.shape))
            frames, rewards, terminated, truncated, info = map(_one_axis, self.workers.step_wait(timeout))
        for record, action, ended in zip(self.state, actions.tolist(), terminated | truncated, strict=True):
            if ended:
                record[:] = record[0] + 1, []
            else:
                record[1].append(action)
        return frames, rewards, terminated, truncated, info

    def restore(self, state):
        """Put the environments into a `state` of this object; their frames, uint8 (N, K, H, W)."""
        self.state = [[episodes, list(actions)] for episodes, actions in state]
        with self.workers.worker_errors(self.workers.long_timeout) as timeout:
            self.workers.call_async("restore", self.state, self.first_env)
            return np.concatenate(self.workers.call_wait(timeout))

    def close_extras(self, **_):
        self.workers.close()


def _one_axis(batch):
    """(workers, M, ...) -> (N, ...), of an array or of each in a dict; gymnasium's masks `_key` are left out."""
    if isinstance(batch, dict):
        return {key: _one_axis(value) for key, value in batch.items() if not key.startswith("_")}
    return batch.reshape(-1, *batch.shape[2:])


def _make_group(trainer, *args, **settings):
    """The EnvGroup of a worker, and of the trainer, whose pid is `trainer`: there it tells the spaces."""
    end_with(trainer)
    return EnvGroup(*args, **settings)


def make_vector_env(num_envs, num_workers, seed=0, first_env=0, *, env_id=ENV_ID, frame_skip=4, frame_stack=4,
                    shrink_factor=4, color=True, **settings):
    """A FrameVectorEnv of num_envs environments in num_workers processes.

    They are numbered from first_env on; the episodes of each depend on its number and on `seed` alone. settings: what
    else the class of that environment takes, see env_class. Call it from the main thread: on Linux the workers end with
    the thread that started them.
    """
    m, left = divmod(num_envs, num_workers)
    if left:
        raise ValueError(f"{num_envs} environments cannot be shared out evenly among {num_workers} workers")
    settings |= {
        "seed": seed, "env_id": env_id, "frame_skip": frame_skip, "frame_stack": frame_stack,
        "shrink_factor": shrink_factor, "color": color}
    firsts = [first_env + w * m for w in range(num_workers)]
    groups = [partial(_make_group, os.getpid(), m, first_env=first, **settings) for first in firsts]
    height, width = find_task(env_id, settings.get("options", {})).viewport
    picture = frame_planes(color) * (height // shrink_factor) * (width // shrink_factor)
    check_shared_memory(num_envs * frame_stack * picture)
    unpinned_cores()
    envs = FrameVectorEnv(groups, first_env)
    spread(envs.workers.processes)
    return envs
