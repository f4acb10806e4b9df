"""LunarLander-v3 seen as frames (camera.py draws them): action repeat, frame stack, many landers per worker.

    from envs import make_vector_env
    envs = make_vector_env(num_envs=32, num_workers=2, seed=1)
    frames, _ = envs.reset()                                        # uint8 (N, K, H, W)
    frames, rewards, terminated, truncated, info = envs.step(actions)   # actions int64 (N,)

N is the number of landers, K that of stacked frames times planes (3 in colour, 1 in gray). The picture is the one that
a viewer of a 50-frames-a-second video sees: engine particles age once per *physics* step, drawn or not, exactly as if
`render()` had been called on each of them. `RenderedLander` below is the other half of that promise: it turns the
unmodified `render()` into the same observation, and tests/test_envs.py holds the two together bit for bit.

Nothing here imports torch: AsyncVectorEnv's workers start by importing this module.
"""

import atexit
import ctypes
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from functools import partial, wraps
from multiprocessing import resource_tracker

import cv2
import gymnasium as gym
import numpy as np
from Box2D import b2_dynamicBody, b2BodyDef, b2CircleShape, b2FixtureDef
from gymnasium.envs.box2d.lunar_lander import (
    FPS,
    LEG_DOWN,
    MAIN_ENGINE_POWER,
    MAIN_ENGINE_Y_LOCATION,
    SCALE,
    SIDE_ENGINE_AWAY,
    SIDE_ENGINE_HEIGHT,
    SIDE_ENGINE_POWER,
    VIEWPORT_H,
    VIEWPORT_W,
    LunarLander,
)
from gymnasium.error import AlreadyPendingCallError
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, write_to_shared_memory

from camera import Camera, frame_planes, shrink, views
from task import ACTIONS, CALM, ENV_ID, LANDED, OUTCOMES, THRUSTS, TIME_LIMIT, TRAINING_SEEDS

PARTICLE_AGEING = 0.15  # what render() takes from each particle's time to live

# Metric: function that reads an episode's number from a Lander whose episode has ended. The mean over the last 100
# episodes is logged as rollout/METRIC.
EPISODE_METRICS = {
    "return_mean": lambda lander: lander.episode_return,  # the environment's own undiscounted sum of rewards
    "length_mean": lambda lander: lander.episode_length,  # physics steps
    "landed_rate": lambda lander: lander.outcome() == LANDED,
}


class FrameStack:
    """The last `length` frames of one episode, oldest first; an episode's first frame fills the stack.

    Frames are uint8 (C, H, W), the stack is uint8 (length * C, H, W).
    """

    def __init__(self, length, shape):
        self.length, self.planes, self.next = length, shape[0], 0
        self.strip = np.zeros((2 * length, *shape), np.uint8)

    @property
    def frames(self):
        return self.strip[self.next : self.next + self.length].reshape(-1, *self.strip.shape[2:])

    def fill(self, frame):
        self.strip[:] = frame
        return self.frames

    def push(self, frame):
        # Written twice, `length` apart, so that the last `length` frames always lie in a row and none needs to move.
        self.strip[self.next] = self.strip[self.next + self.length] = frame
        self.next = (self.next + 1) % self.length
        return self.frames


def gust(index):
    """The strength of wind or turbulence at a physics step, -1 to 1, as LunarLander.step has it: it never repeats."""
    return math.tanh(math.sin(0.02 * index) + math.sin(math.pi * 0.01 * index))


def draw_weather(options, seed):
    """The weather of the episode of `seed`: options as task.CALM, whose ranges [low, high] are drawn from.

    Each option has a draw of its own, range or not, so that one that becomes a range changes no other.
    """
    draws = np.random.default_rng([seed, 1]).random(len(options))
    return {
        key: value[1] - draw * (value[1] - value[0]) if isinstance(value, list) else value
        for draw, (key, value) in zip(draws.tolist(), options.items(), strict=True)}


class LeanLunarLander(LunarLander):
    """LunarLander-v3 for training: the motion and rewards of gymnasium's own `step`, bit for bit, in half the time.

    Box2D does the physics as ever. Only Python around it is spared: checks, small arrays, keyword arguments, and the
    state vector (which nothing here may see: observations are None). Reported scores never come from this class;
    tests/test_envs.py compares it with the unmodified environment, random numbers and flames included.
    """

    MAIN_FLAME, SIDE_FLAME = 3.5, 0.7  # densities

    def __init__(self, continuous=False):
        super().__init__(render_mode="rgb_array", continuous=continuous)
        self.flames = {density: b2BodyDef(type=b2_dynamicBody, fixtures=b2FixtureDef(
            shape=b2CircleShape(radius=2 / SCALE), density=density, friction=0.1, restitution=0.3,
            categoryBits=0x0100, maskBits=0x001)) for density in (self.MAIN_FLAME, self.SIDE_FLAME)}

    def thrust(self, action):
        """(power of the main engine, of the side engines, which of these: -1 left, 1 right), powers 0 or 0.5 to 1."""
        if not self.continuous:
            return float(action == 2), float(action in (1, 3)), action - 2
        main, side = (min(max(float(value), -1.0), 1.0) for value in action)
        return (main + 1) * 0.5 if main > 0 else 0.0, abs(side) if abs(side) > 0.5 else 0.0, math.copysign(1.0, side)

    def fire(self, density, power, push_x, push_y, x, y):
        """A flame of that density at (x, y), and its recoil on the lander."""
        self.flames[density].position = x, y
        particle = self.world.CreateBody(self.flames[density])
        particle.ttl = power
        self.particles.append(particle)
        particle.ApplyLinearImpulse((push_x, push_y), (x, y), True)
        self.lander.ApplyLinearImpulse((-push_x, -push_y), (x, y), True)

    def step(self, action):
        """One physics step. Returns None, reward, terminated, False, {}."""
        body, random = self.lander, self.np_random.random
        if self.enable_wind and not any(leg.ground_contact for leg in self.legs):
            body.ApplyForceToCenter((gust(self.wind_idx) * self.wind_power, 0.0), True)
            body.ApplyTorque(gust(self.torque_idx) * self.turbulence_power, True)
            self.wind_idx += 1
            self.torque_idx += 1
        # What uniform(-1, 1) gives, in a third of its time; both are drawn at every step, used or not.
        along, across = (2 * random() - 1) / SCALE, (2 * random() - 1) / SCALE
        main, side, direction = self.thrust(action)
        if main or side:
            sin, cos = math.sin(body.angle), math.cos(body.angle)
            x, y = body.position.tuple
        if main:
            down = MAIN_ENGINE_Y_LOCATION / SCALE + 2 * along
            push_x, push_y = sin * down - cos * across, -cos * down - sin * across
            self.fire(self.MAIN_FLAME, main, push_x * MAIN_ENGINE_POWER * main, push_y * MAIN_ENGINE_POWER * main,
                      x + push_x, y + push_y)
        if side:
            out = 3 * across + direction * SIDE_ENGINE_AWAY / SCALE
            push_x, push_y = sin * along - cos * out, -cos * along - sin * out
            self.fire(self.SIDE_FLAME, side, push_x * SIDE_ENGINE_POWER * side, push_y * SIDE_ENGINE_POWER * side,
                      x + push_x - sin * 17 / SCALE, y + push_y + cos * SIDE_ENGINE_HEIGHT / SCALE)
        self.world.Step(1.0 / FPS, 6 * 30, 2 * 30)

        (x, y), (speed_x, speed_y) = body.position.tuple, body.linearVelocity.tuple
        width, height = VIEWPORT_W / SCALE / 2, VIEWPORT_H / SCALE / 2
        x, y = (x - width) / width, (y - (self.helipad_y + LEG_DOWN / SCALE)) / height
        speed_x, speed_y = speed_x * width / FPS, speed_y * height / FPS
        left, right = self.legs
        shaping = (
            -100 * math.sqrt(x * x + y * y) - 100 * math.sqrt(speed_x * speed_x + speed_y * speed_y)
            - 100 * abs(body.angle) + 10 * left.ground_contact + 10 * right.ground_contact)
        reward = 0.0 if self.prev_shaping is None else shaping - self.prev_shaping - main * 0.30 - side * 0.03
        self.prev_shaping = shaping
        if not body.awake:
            return None, 100.0, True, False, {}
        if self.game_over or abs(x) >= 1.0:
            return None, -100.0, True, False, {}
        return None, reward, False, False, {}


class Lander:
    """One LunarLander-v3 played in decisions of `frame_skip` physics steps, seen through a Camera.

    continuous: an action is two thrusts, float32 (2,), in place of a number from 0 to 3. weather: some of task.CALM's
    options; a range [low, high] is drawn from anew for each episode.
    """

    def __init__(self, frame_skip, frame_stack, shrink_factor, color, continuous=False, **weather):
        self.continuous, self.weather = continuous, CALM | weather
        self.env = self.make_env()
        self.lander = self.env.unwrapped
        self.frame_skip = frame_skip
        self.camera = Camera(shrink_factor, color)
        shape = (frame_planes(color), VIEWPORT_H // shrink_factor, VIEWPORT_W // shrink_factor)
        self.stack = FrameStack(frame_stack, shape)

    def reset(self, seed):
        """Begin the episode of `seed`; the stack of its first frame, uint8 (K, H, W)."""
        for option, value in draw_weather(self.weather, int(seed)).items():
            setattr(self.lander, option, value)
        self.env.reset(seed=int(seed))
        self.episode_return, self.episode_length = 0.0, 0
        self.begin_picture()
        self.pass_time()
        return self.stack.fill(self.picture())

    def step(self, action):
        """Repeat `action` for frame_skip physics steps or to the episode's end.

        Returns the stack, uint8 (K, H, W), the sum of rewards, terminated, truncated.
        """
        ended = self.play(action)
        return self.observe(), *ended

    def play(self, action):
        """`step` without a frame: the sum of rewards, terminated, truncated."""
        if self.continuous:
            action = np.asarray(action, np.float32)
        else:
            assert 0 <= action < len(ACTIONS), action
        reward = 0.0
        for _ in range(self.frame_skip):
            _, step_reward, terminated, truncated, _ = self.env.step(action)
            self.pass_time()
            reward += float(step_reward)
            self.episode_length += 1
            if terminated or truncated:
                break
        self.episode_return += reward
        # If both happen in one step, termination wins, so that no value is bootstrapped.
        return reward, terminated, truncated and not terminated

    def observe(self, *view):
        """The stack with the frame of now, uint8 (K, H, W); for its `view`, see `picture`."""
        return self.stack.push(self.picture(*view))

    def make_env(self):
        return gym.wrappers.TimeLimit(LeanLunarLander(self.continuous), TIME_LIMIT)

    def begin_picture(self):
        self.camera.start(self.lander)

    def pass_time(self):
        """What one `render()` call does to the flames besides drawing them."""
        particles = self.lander.particles
        for particle in particles:
            particle.ttl -= PARTICLE_AGEING
        while particles and particles[0].ttl < 0:
            self.lander.world.DestroyBody(particles.pop(0))

    def picture(self, view=None):
        """The small frame of now; `view`, if it is known already, is that of `views`."""
        return self.camera.frame(self.lander, view or views([self.lander])[0])

    def outcome(self):
        """How the episode just ended: an index into OUTCOMES. For reports only; no policy sees it."""
        body, half_width = self.lander.lander, VIEWPORT_W / SCALE / 2  # metres
        if not body.awake:
            return OUTCOMES.index("rest")
        if self.lander.game_over:
            return OUTCOMES.index("crash")
        return OUTCOMES.index("out_of_sight" if abs(body.position.x - half_width) >= half_width else "time")


class RenderedLander(Lander):
    """The same observations the long way: the unmodified environment, one `render()` per physics step.

    This is what scores and videos come from. `on_frame`, if set, is called with each full frame, uint8 (400, 600, 3).
    """

    on_frame = None

    def make_env(self):
        return gym.make(ENV_ID, render_mode="rgb_array", continuous=self.continuous, disable_env_checker=True)

    def begin_picture(self):
        pass

    def pass_time(self):
        self.full_frame = self.env.render()
        if self.on_frame:
            self.on_frame(self.full_frame)

    def picture(self):
        return shrink(self.full_frame, self.camera.factor, self.camera.color)


class FrameStacks(gym.spaces.Box):
    """The stacks of M landers, each uint8 (K, H, W). Where gymnasium expects an observation, they come as a list."""


@write_to_shared_memory.register(FrameStacks)
def _(space, index, stacks, shared_memory):
    """Each stack goes straight to its place; joined to one array first, as for a Box, they would be copied thrice."""
    gathered = np.frombuffer(shared_memory.get_obj(), np.uint8).reshape(-1, *space.shape)
    for place, stack in zip(gathered[index], stacks, strict=True):
        place[:] = stack


class EnvError(Exception):
    """An exception of a worker's environment, named: its own class may be one that cannot be sent to the trainer."""


def _sendable_errors(method):
    """Exceptions cross from worker to trainer by pickle, which those that hold a foreign object do not survive."""
    @wraps(method)
    def call(*args, **settings):
        try:
            return method(*args, **settings)
        except Exception as error:
            raise EnvError(f"{type(error).__name__}: {error}") from error
    return call


class LanderGroup(gym.Env):
    """Several landers stepped in turn: the environment that one worker of AsyncVectorEnv plays.

    A worker costs two context switches a step however little it does, so each worker plays M landers. The group resets
    by itself in the step that ends an episode: the observation is then the first of the next episode, and the last one
    of a truncated episode travels in `info["final_frames"]`.
    """

    def __init__(self, num_envs, first_env, seed, **lander_settings):
        cv2.setNumThreads(0)  # the cores belong to the workers' own processes
        self.landers = [Lander(**lander_settings) for _ in range(num_envs)]
        self.first_env, self.seed = first_env, seed
        self.generators = [self._generator(i) for i in range(num_envs)]
        if lander_settings.get("continuous"):
            self.action_space = gym.spaces.Box(-1, 1, (num_envs, len(THRUSTS)), np.float32)
        else:
            self.action_space = gym.spaces.MultiDiscrete([len(ACTIONS)] * num_envs)
        self.observation_space = FrameStacks(0, 255, (num_envs, *self.frames[0].shape), np.uint8)

    def _generator(self, i):
        """A generator per lander, so that episodes do not depend on how landers are spread over workers."""
        return np.random.default_rng([self.seed, self.first_env + i])

    @property
    def frames(self):
        """The stack that each lander shows, M times uint8 (K, H, W)."""
        return [lander.stack.frames for lander in self.landers]

    def _begin(self, i):
        self.landers[i].reset(self.generators[i].integers(TRAINING_SEEDS))

    @_sendable_errors
    def restore(self, state, first_env=0):
        """Restore this group's part of a LanderVectorEnv.state whose first lander is number `first_env`; the frames."""
        own = state[self.first_env - first_env :][: len(self.landers)]
        for i, (episodes, actions) in enumerate(own):
            self.generators[i] = self._generator(i)
            self.generators[i].integers(TRAINING_SEEDS, size=episodes - 1)  # seeds of episodes that are over
            self._begin(i)
            for action in actions:
                self.landers[i].step(action)
        return self.frames

    @_sendable_errors
    def reset(self, *, seed=None, options=None):
        for i in range(len(self.landers)):
            self._begin(i)
        return self.frames, {}

    @_sendable_errors
    def step(self, actions):
        """One decision each. Returns frames, M times uint8 (K, H, W), and rewards, terminated, truncated, each (M,).

        info: env_frames (M,), physics steps played. If an episode ended, also episode, a dict of the EPISODE_METRICS
        (M,), 0 where none did; if one was truncated, final_frames, uint8 (M, K, H, W), its last stack.
        """
        m = len(self.landers)
        rewards, terminated, truncated = np.zeros(m, np.float32), np.zeros(m, bool), np.zeros(m, bool)
        info = {"env_frames": np.zeros(m, np.int64)}
        for i, lander in enumerate(self.landers):
            length = lander.episode_length
            rewards[i], terminated[i], truncated[i] = lander.play(actions[i])
            info["env_frames"][i] = lander.episode_length - length
        # Drawing all of them after playing all of them keeps each part's code in the processor's cache.
        for lander, view in zip(self.landers, views([lander.lander for lander in self.landers]), strict=True):
            lander.observe(view)
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            info["episode"] = {key: np.zeros(m) for key in EPISODE_METRICS}
        if truncated.any():
            info["final_frames"] = np.zeros(self.observation_space.shape, np.uint8)
        for i in ended:
            for key, measure in EPISODE_METRICS.items():
                info["episode"][key][i] = measure(self.landers[i])
            if truncated[i]:
                info["final_frames"][i] = self.landers[i].stack.frames
            self._begin(i)
        return self.frames, rewards, terminated, truncated, info


def _make_group(trainer, *args, **settings):
    """The LanderGroup of a worker, and of the trainer, whose pid is `trainer`: there it tells the spaces."""
    if os.getpid() != trainer and sys.platform == "linux":
        # PR_SET_PDEATHSIG: not even a frozen worker outlives its trainer, or the thread of it that started the worker.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != trainer:  # it has died already
            os._exit(1)
    return LanderGroup(*args, **settings)


class WorkerError(Exception):
    """A worker died, froze or raised; says which, and why."""


class Workers(AsyncVectorEnv):
    """AsyncVectorEnv that says what went wrong in which worker, and can be closed whatever happened."""

    timeout = 15.0  # seconds; a step takes hundredths of one
    long_timeout = 180.0  # seconds; to start, or to play the landers' episodes again, takes a few

    def __init__(self, make_groups):
        try:
            # copy=False: the caller copies what it keeps. spawn: forking a process whose libraries have started
            # threads can hang; and a worker is a child of the trainer itself, as it is not with forkserver.
            # DISABLED: a LanderGroup resets by itself.
            with (_time_limit(self.long_timeout, self._kill), _main_script_hidden(), _input_hidden(),
                  _interrupt_blocked()):
                super().__init__(make_groups, copy=False, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        except BaseException as error:
            if not getattr(self, "processes", None):  # it failed in the trainer itself
                if isinstance(error, OSError):
                    raise WorkerError(f"workers' shared memory: {error.strerror}") from error
                raise
            cause = self.cause(error, self.long_timeout)
            self._kill()
            if not isinstance(error, Exception):  # a signal
                raise
            raise WorkerError(f"{cause}; it could not start, and what it said itself is above") from error
        # multiprocessing joins its processes at exit, and waits for a frozen one for ever.
        processes = self.processes
        self._at_exit = atexit.register(lambda: _kill(processes))

    @contextmanager
    def worker_errors(self, timeout):
        """Whatever goes wrong in a worker becomes a WorkerError that names it."""
        try:
            yield timeout
        except AlreadyPendingCallError:  # a step was interrupted, and its answers would pass for the next one's
            raise
        except Exception as error:
            raise WorkerError(self.cause(error, timeout)) from error

    def cause(self, error, timeout):
        """Which worker is to blame for `error`, and how."""
        for i, (process, pipe) in enumerate(zip(self.processes, self.parent_pipes, strict=True)):
            told = error if isinstance(error, EnvError) else f"{type(error).__name__}: {error}"
            if pipe is None:  # gymnasium has taken its error message
                return f"worker {i} raised {told}"
            if process.pid is None:
                return f"worker {i} was not started: {told}"
            # Between the end of its pipe and its own end a process may take a second, for the libraries it has loaded.
            ending = isinstance(error, (EOFError, ConnectionError)) and pipe.poll(0)
            process.join(timeout=5 if ending else 0.1)
            if not process.is_alive():
                return f"worker {i} died, exit code {process.exitcode}"
        silent = [i for i, pipe in enumerate(self.parent_pipes) if not pipe.poll(0)]
        return f"worker {', '.join(map(str, silent))} did not answer for {timeout:.0f} s"

    def close_extras(self, **_):
        """Kill the workers: they hold nothing that is not known here, and one that died or froze cannot be asked."""
        self._kill()
        atexit.unregister(getattr(self, "_at_exit", None))
        for pipe in getattr(self, "parent_pipes", ()):
            if pipe:
                pipe.close()

    def _kill(self):
        _kill(getattr(self, "processes", ()))


def _kill(processes):
    started = [process for process in processes if process.pid]
    for process in started:
        process.kill()
    for process in started:
        process.join(timeout=5)


class LanderVectorEnv(VectorEnv):
    """num_envs landers along one axis, whichever worker plays them.

    Frames are uint8 (N, K, H, W), valid until the next step. Rewards, endings and what `info` holds are (N, ...), as
    in LanderGroup.step. After a WorkerError it can only be closed.
    """

    def __init__(self, make_groups, first_env=0):
        self.workers, self.first_env = Workers(make_groups), first_env
        m, *frames = self.workers.single_observation_space.shape
        self.num_envs = m * self.workers.num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, tuple(frames), np.uint8)
        continuous = isinstance(self.workers.single_action_space, gym.spaces.Box)
        self.single_action_space = (
            gym.spaces.Box(-1, 1, (len(THRUSTS),), np.float32) if continuous else gym.spaces.Discrete(len(ACTIONS)))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        # state[n]: the episodes that lander n has begun, and the actions of the current one. Its future depends on
        # nothing else. A Box2D world cannot be stored, but playing the actions again from the episode's seed is
        # bit-exact. The record is kept here, so that a checkpoint needs no answer from a worker that may have died.
        self.state = [[0, []] for _ in range(self.num_envs)]

    def reset(self, *, seed=None, options=None):
        for lander in self.state:
            lander[:] = lander[0] + 1, []
        with self.workers.worker_errors(self.workers.long_timeout) as timeout:
            self.workers.reset_async()
            return _one_axis(self.workers.reset_wait(timeout)[0]), {}

    def step(self, actions):
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"actions of shape {np.shape(actions)}, not {self.action_space.shape}")
        with self.workers.worker_errors(self.workers.timeout) as timeout:
            self.workers.step_async(np.reshape(actions, self.workers.action_space.shape))
            frames, rewards, terminated, truncated, info = map(_one_axis, self.workers.step_wait(timeout))
        for lander, action, ended in zip(self.state, actions.tolist(), terminated | truncated, strict=True):
            if ended:
                lander[:] = lander[0] + 1, []
            else:
                lander[1].append(action)
        return frames, rewards, terminated, truncated, info

    def restore(self, state):
        """Put the landers into a `state` of this environment; their frames, uint8 (N, K, H, W)."""
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


def unpinned_cores():
    """The cores that this process was given, sorted; where OpenMP has pinned this thread to one, it is set free.

    As OMP_PROC_BIND, OMP_PLACES and GOMP_CPU_AFFINITY ask for, OpenMP pins the thread that loads it, as `import torch`
    does, to the first of its places. What that thread starts afterwards, workers among it, would share that core.
    """
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return list(range(os.cpu_count()))
    allowed = os.sched_getaffinity(0)
    cores = set(allowed)
    with suppress(OSError, AttributeError):  # no /proc; an OpenMP that knows no places
        with open("/proc/self/maps") as maps:
            found = {re.search(r"/.*/lib[gi]?omp\d*[-.].*", line) for line in maps}
        for library in [ctypes.CDLL(path) for path in {match[0] for match in found if match}]:
            for place in range(library.omp_get_num_places()):
                numbers = (ctypes.c_int * library.omp_get_place_num_procs(place))()
                library.omp_get_place_proc_ids(place, numbers)
                cores.update(numbers)
        if cores != allowed:
            os.sched_setaffinity(0, cores)  # places may name cores that there are not, or that are not ours
    return sorted(os.sched_getaffinity(0))


def _spread(processes):
    """Give each worker a core of its own, where they share the cores evenly, and let none push the trainer from its.

    Left to itself, the kernel often wakes two workers on the same core and moves one of them a millisecond too late; or
    the first that is woken takes the trainer's core before it has woken the others.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):
        if len(processes) % len(cores) == 0:
            with suppress(OSError):  # it has died, which its next step will tell
                os.sched_setaffinity(process.pid, {cores[i % len(cores)]})
        with suppress(OSError):  # or this is not allowed here
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))  # it waits its turn when it wakes


@contextmanager
def _time_limit(seconds, kill):
    """Call `kill` after so many seconds, or at once at a signal, if the block has not ended by then.

    gymnasium waits for new workers without a limit, and meanwhile no handler of a signal can run.
    """
    reader, writer = socket.socketpair()
    reader.settimeout(seconds)
    writer.setblocking(False)

    def wait():
        try:
            ended = reader.recv(1) == b"\0"  # else it is the number of a signal
        except TimeoutError:
            ended = False
        if not ended:
            kill()

    watch = threading.Thread(target=wait, daemon=True)
    watch.start()  # before a signal may be blocked, so that one thread at least takes it
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False) if in_main_thread else -1
    try:
        yield
    finally:
        if in_main_thread:
            signal.set_wakeup_fd(before)
        with suppress(BlockingIOError):
            writer.send(b"\0")
        watch.join()
        reader.close()
        writer.close()


@contextmanager
def _main_script_hidden():
    """Processes that start meanwhile do not import the main script: train.py would load torch, 400 MB in 2 s."""
    main = sys.modules["__main__"]
    file = vars(main).pop("__file__", None)
    try:
        yield
    finally:
        if file:
            main.__file__ = file


@contextmanager
def _input_hidden():
    """Processes that start meanwhile do not hold the caller's standard input, a terminal or a pipe, while they live.

    multiprocessing closes their `sys.stdin`, but that leaves the file itself open.
    """
    if sys.__stdin__ is None:  # it was closed before we began, and 0 may be another file by now
        yield
        return
    caller, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)  # neither is inherited
    try:
        os.dup2(nothing, 0)
        yield
    finally:
        os.dup2(caller, 0)
        os.close(caller)
        os.close(nothing)


@contextmanager
def _interrupt_blocked():
    """Signals to all are for the trainer, which ends its workers itself. Processes that start meanwhile inherit this.

    So does multiprocessing's tracker of resources: at its start it lets SIGINT through again, which it ignores itself.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _check_shared_memory(size):
    """multiprocessing maps a file; where it does not fit, the first write to it ends the process without a word."""
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(folder)]
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    if max(free.values()) < size:
        there = ", ".join(f"{folder} has {room / 1e6:.1f}" for folder, room in free.items())
        raise WorkerError(f"the frames that workers share need {size / 1e6:.1f} MB, but {there}; make room, or choose "
                          "a smaller env.num_envs or env.frame_stack")


def make_vector_env(num_envs, num_workers, seed=0, first_env=0, *, frame_skip=4, frame_stack=4, shrink_factor=4,
                    color=True, continuous=False, **weather):
    """A LanderVectorEnv of num_envs landers in num_workers processes.

    The landers are numbered from first_env on; a lander's episodes depend on its number and on `seed` alone. Call it
    from the main thread: on Linux the workers end with the thread that started them.
    """
    m = num_envs // num_workers
    settings = {
        "seed": seed, "frame_skip": frame_skip, "frame_stack": frame_stack, "shrink_factor": shrink_factor,
        "color": color, "continuous": continuous, **weather}
    firsts = [first_env + w * m for w in range(num_workers)]
    groups = [partial(_make_group, os.getpid(), m, first_env=first, **settings) for first in firsts]
    picture = frame_planes(color) * (VIEWPORT_H // shrink_factor) * (VIEWPORT_W // shrink_factor)
    _check_shared_memory(num_envs * frame_stack * picture)
    unpinned_cores()
    envs = LanderVectorEnv(groups, first_env)
    _spread(envs.workers.processes)
    return envs
