"""LunarLander-v3 seen as frames (camera.py draws them): action repeat, frame stack, many landers per worker.

    from envs import make_vector_env
    envs = make_vector_env(num_envs=32, num_workers=2, seed=1)
    frames, _ = envs.reset()                    # uint8 (num_workers, landers per worker, K, H, W)

The picture is the one that a viewer of a 50-frames-a-second video sees: engine particles age once per
*physics* step, drawn or not, exactly as if `render()` had been called on each of them. `FrameStack` below is the
other half of that promise: it turns the frames of the unmodified `render()` into the same observation, and
tests/test_envs.py holds the two together bit for bit.

Nothing here imports torch: AsyncVectorEnv's workers start by importing this module.
"""

import atexit
import ctypes
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker

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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.vector.utils import read_from_shared_memory

from camera import Camera, frame_planes, shrink, views

ENV_ID = "LunarLander-v3"
NUM_ACTIONS = 4  # nothing, left engine, main engine, right engine
TRAINING_SEEDS = 900_000  # training draws episode seeds below this
SELECTION_SEED = 900_000  # from here: episodes that choose the best checkpoint
EVALUATION_SEED = 1_000_000  # from here: episodes that score it
PARTICLE_AGEING = 0.15  # what render() takes from each particle's time to live
OUTCOMES = ("rest", "crash", "out_of_sight", "time")


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


class LeanLunarLander(LunarLander):
    """LunarLander-v3 for training: the motion and rewards of gymnasium's own `step`, bit for bit, in half the time.

    Box2D does the physics as ever. What is spared is Python around it: checks, small arrays, keyword arguments, the
    state vector (which nothing here may see: observations are None), wind and continuous thrust. Scores never come from
    this class; tests/test_envs.py compares it with the unmodified environment, random numbers and flames included.
    """

    MAIN_FLAME, SIDE_FLAME = 3.5, 0.7  # densities

    def __init__(self):
        super().__init__(render_mode="rgb_array")
        self.flames = {density: b2BodyDef(type=b2_dynamicBody, fixtures=b2FixtureDef(
            shape=b2CircleShape(radius=2 / SCALE), density=density, friction=0.1, restitution=0.3,
            categoryBits=0x0100, maskBits=0x001)) for density in (self.MAIN_FLAME, self.SIDE_FLAME)}

    def _create_particle(self, mass, x, y, ttl):
        self.flames[mass].position = x, y
        particle = self.world.CreateBody(self.flames[mass])
        particle.ttl = ttl
        self.particles.append(particle)
        return particle

    def step(self, action):
        """One physics step. Returns None, reward, terminated, False, {}."""
        body, random, fuel = self.lander, self.np_random.random, 0.0
        # What uniform(-1, 1) gives, in a third of its time; both are drawn at every step, used or not.
        along, across = (2 * random() - 1) / SCALE, (2 * random() - 1) / SCALE
        if action:
            sin, cos = math.sin(body.angle), math.cos(body.angle)
            x, y = body.position.tuple
            if action == 2:
                fuel, power, density = 0.3, MAIN_ENGINE_POWER, self.MAIN_FLAME
                along = MAIN_ENGINE_Y_LOCATION / SCALE + 2 * along
            else:
                fuel, power, density = 0.03, SIDE_ENGINE_POWER, self.SIDE_FLAME
                across = 3 * across + (action - 2) * SIDE_ENGINE_AWAY / SCALE
            push_x, push_y = sin * along - cos * across, -cos * along - sin * across
            x, y = x + push_x, y + push_y
            if action != 2:
                x, y = x - sin * 17 / SCALE, y + cos * SIDE_ENGINE_HEIGHT / SCALE
            push_x, push_y = push_x * power, push_y * power
            self._create_particle(density, x, y, 1.0).ApplyLinearImpulse((push_x, push_y), (x, y), True)
            body.ApplyLinearImpulse((-push_x, -push_y), (x, y), True)
        self.world.Step(1.0 / FPS, 6 * 30, 2 * 30)

        (x, y), (speed_x, speed_y) = body.position.tuple, body.linearVelocity.tuple
        width, height = VIEWPORT_W / SCALE / 2, VIEWPORT_H / SCALE / 2
        x, y = (x - width) / width, (y - (self.helipad_y + LEG_DOWN / SCALE)) / height
        speed_x, speed_y = speed_x * width / FPS, speed_y * height / FPS
        left, right = self.legs
        shaping = (
            -100 * math.sqrt(x * x + y * y) - 100 * math.sqrt(speed_x * speed_x + speed_y * speed_y)
            - 100 * abs(body.angle) + 10 * left.ground_contact + 10 * right.ground_contact)
        reward = 0.0 if self.prev_shaping is None else shaping - self.prev_shaping - fuel
        self.prev_shaping = shaping
        if not body.awake:
            return None, 100.0, True, False, {}
        if self.game_over or abs(x) >= 1.0:
            return None, -100.0, True, False, {}
        return None, reward, False, False, {}


class Lander:
    """One LunarLander-v3 played in decisions of `frame_skip` physics steps, seen through a Camera."""

    def __init__(self, frame_skip, frame_stack, shrink_factor, color):
        self.env = self.make_env()
        self.lander = self.env.unwrapped
        self.frame_skip = frame_skip
        self.camera = Camera(shrink_factor, color)
        shape = (frame_planes(color), VIEWPORT_H // shrink_factor, VIEWPORT_W // shrink_factor)
        self.stack = FrameStack(frame_stack, shape)

    def reset(self, seed):
        """Begin the episode of `seed`; the stack of its first frame, uint8 (K, H, W)."""
        self.seed, self.actions = int(seed), []
        self.env.reset(seed=self.seed)
        self.episode_return, self.episode_length = 0.0, 0
        self.begin_picture()
        self.pass_time()
        return self.stack.fill(self.picture())

    def step(self, action):
        """Repeat `action` for frame_skip physics steps or to the episode's end.

        Returns the stack, uint8 (K, H, W), the sum of rewards, terminated, truncated.
        """
        ended = self.play(action)
        return self.look(), *ended

    def play(self, action):
        """`step` unseen: the sum of rewards, terminated, truncated."""
        assert 0 <= action < NUM_ACTIONS, action
        reward = 0.0
        self.actions.append(action)
        for _ in range(self.frame_skip):
            _, step_reward, terminated, truncated, _ = self.env.step(action)
            self.pass_time()
            reward += float(step_reward)
            self.episode_length += 1
            if terminated or truncated:
                break
        self.episode_return += reward
        # A state that ends the episode is never bootstrapped: an episode is one or the other.
        return reward, terminated, truncated and not terminated

    def look(self, *view):
        """The stack, uint8 (K, H, W), of what is seen now; for its `view`, see `picture`."""
        return self.stack.push(self.picture(*view))

    def make_env(self):
        return gym.wrappers.TimeLimit(LeanLunarLander(), gym.spec(ENV_ID).max_episode_steps)

    def begin_picture(self):
        self.camera.start(self.lander)

    def pass_time(self):
        """What one `render()` call does to the flames besides drawing them."""
        for particle in self.lander.particles:
            particle.ttl -= PARTICLE_AGEING
        self.lander._clean_particles(False)

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
        return gym.make(ENV_ID, render_mode="rgb_array", disable_env_checker=True)

    def begin_picture(self):
        pass

    def pass_time(self):
        self.full_frame = self.env.render()
        if self.on_frame:
            self.on_frame(self.full_frame)

    def picture(self):
        return shrink(self.full_frame, self.camera.factor, self.camera.color)


class LanderGroup(gym.Env):
    """Several landers stepped in turn; what a worker plays.

    A worker costs two context switches a step however little it does, so each worker plays many landers. The group
    begins its own new episodes: the observation after an ending is the first of the next episode, and the last one of
    a truncated episode travels in `info["final_frames"]`. `prepare` begins episodes ahead of time. The observation
    space names all that `_work` shares with the trainer; of it, `reset` and `step` return the frames.
    """

    COUNTS = ("env_frames", "episode_return", "episode_length", "episode_outcome")  # of step's info

    def __init__(self, landers, first_index, seed, frame_skip, frame_stack, shrink_factor, color):
        cv2.setNumThreads(0)  # the cores belong to the workers' own processes
        self.settings = frame_skip, frame_stack, shrink_factor, color
        self.landers = [Lander(*self.settings) for _ in range(landers)]
        self.prepared, self.spare = {}, []  # lander's number -> one that has begun its next episode; those without use
        self.seed, self.first_index = seed, first_index
        self.episodes, self.generators = [0] * landers, [self._generator(i) for i in range(landers)]
        self.action_space = gym.spaces.MultiDiscrete([NUM_ACTIONS] * landers)
        frames = gym.spaces.Box(0, 255, (landers, *self.landers[0].stack.frames.shape), np.uint8)
        numbers = gym.spaces.Box(-np.inf, np.inf, (3 + len(self.COUNTS), landers), np.float64)
        # The numbers are rewards, terminated, truncated and COUNTS, a row each.
        self.observation_space = gym.spaces.Dict(frames=frames, actions=self.action_space, numbers=numbers)

    def _generator(self, i):
        """A generator per lander, so that episodes do not depend on how landers are spread over workers."""
        return np.random.default_rng([self.seed, self.first_index + i])

    @property
    def frames(self):
        """What each lander sees, M times uint8 (K, H, W)."""
        return [lander.stack.frames for lander in self.landers]

    @property
    def unprepared(self):
        return [i for i in range(len(self.landers)) if i not in self.prepared]

    def prepare(self, i):
        """Begin a lander's next episode ahead of time: its number and a seed make it what it is, not the moment."""
        lander = self.spare.pop() if self.spare else Lander(*self.settings)
        lander.reset(self.generators[i].integers(TRAINING_SEEDS))
        self.prepared[i] = lander

    def _begin(self, i):
        if i not in self.prepared:
            self.prepare(i)
        self.spare.append(self.landers[i])
        self.landers[i] = self.prepared.pop(i)
        self.episodes[i] += 1

    @property
    def state(self):
        """All that the landers' future depends on: per lander, the episodes it has begun and the actions of the last.

        A Box2D world cannot be stored, but an episode is its seed and its actions: playing them again is bit-exact.
        """
        return [[n, list(lander.actions)] for n, lander in zip(self.episodes, self.landers, strict=True)]

    def rewind(self, state):
        """Take up `state`."""
        self.spare += self.prepared.values()
        self.prepared.clear()
        for i, (episodes, actions) in enumerate(state):
            self.generators[i], self.episodes[i] = self._generator(i), episodes - 1
            self.generators[i].integers(TRAINING_SEEDS, size=episodes - 1)  # seeds of episodes that are over
            self._begin(i)
            for action in actions:
                self.landers[i].step(action)

    def reset(self, *, seed=None, options=None):
        for i in range(len(self.landers)):
            self._begin(i)
        return self.frames, {}

    def step(self, actions):
        """One decision each. Returns frames, M times uint8 (K, H, W), and rewards, terminated, truncated, each (M,).

        info holds env_frames (physics steps played) and, for those whose episode ended (terminated or truncated, else
        0), episode_return, episode_length (physics steps) and episode_outcome, each (M,); if any episode was truncated
        also final_frames, uint8 (M, K, H, W).
        """
        m = len(self.landers)
        rewards, terminated, truncated = np.zeros(m, np.float32), np.zeros(m, bool), np.zeros(m, bool)
        info = {key: np.zeros(m) for key in self.COUNTS}
        for i, lander in enumerate(self.landers):
            length = lander.episode_length
            rewards[i], terminated[i], truncated[i] = lander.play(int(actions[i]))
            info["env_frames"][i] = lander.episode_length - length
        # Drawing all of them after playing all of them keeps each part's code in the processor's cache.
        seen = views([lander.lander for lander in self.landers])
        for i, lander in enumerate(self.landers):
            lander.look(seen[i])
            if terminated[i] or truncated[i]:
                info["episode_return"][i] = lander.episode_return
                info["episode_length"][i] = lander.episode_length
                info["episode_outcome"][i] = lander.outcome()
                if truncated[i]:
                    frames = lander.stack.frames
                    info.setdefault("final_frames", np.zeros((m, *frames.shape), np.uint8))[i] = frames
                self._begin(i)
        return self.frames, rewards, terminated, truncated, info


class WorkerError(Exception):
    """A worker died, froze or raised; says which, and why."""


def _work(index, make_group, pipe, trainers_end, shared, errors, *_):
    """A worker's life, in place of AsyncVectorEnv's.

    What a step takes and gives lies in shared memory, to which the frames are copied once, and an empty message asks
    for it; to pickle and unpickle that would take as long as to draw some pictures. Only the rare final_frames go
    through the pipe. What else a group of landers needs is asked for and answered as by AsyncVectorEnv. While nothing
    is asked, episodes are prepared.
    """
    if sys.platform == "linux":
        # No worker outlives its trainer, not even a frozen one. The fork server goes when nobody holds the end of its
        # pipe that the trainer and every worker have; PR_SET_PDEATHSIG (1) takes the workers along with it.
        server = forkserver._forkserver
        if server._forkserver_alive_fd is not None:
            os.close(server._forkserver_alive_fd)
            server._forkserver_alive_fd = None
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    group = make_group()
    trainers_end.close()
    try:
        workers = len(shared["actions"]) // len(group.landers)
        memory = read_from_shared_memory(group.observation_space, shared, workers)
        frames, actions, numbers = (memory[key][index] for key in ("frames", "actions", "numbers"))
        while True:
            while (unprepared := group.unprepared) and not pipe.poll():
                group.prepare(unprepared[0])
            message, answer = pipe.recv_bytes(), None
            if not message:
                _, *flags, info = group.step(actions)
                for row, values in zip(numbers, (*flags, *(info[key] for key in group.COUNTS)), strict=True):
                    row[:] = values
                answer = info.get("final_frames")
            else:
                command, details = pickle.loads(message)
                if command == "_call":
                    name, args, kwargs = details
                    answer = getattr(group, name)
                    if callable(answer):
                        answer = answer(*args, **kwargs)
                elif command == "reset":
                    group.reset()
                    answer = None, {}
                elif command == "_check_spaces":  # there is only one kind of group
                    answer = True, True
                else:
                    raise ValueError(f"a group of landers has no {command}")
            for place, stack in zip(frames, group.frames, strict=True):
                place[:] = stack
            pipe.send((answer, True))
    except Exception as error:
        errors.put((index, type(error), str(error), traceback.format_exc()))
        pipe.send((None, False))
        with suppress(EOFError, OSError):
            pipe.recv_bytes()  # if nothing was asked, the answer waits for the next question


class LanderVectorEnv(AsyncVectorEnv):
    """AsyncVectorEnv of LanderGroups, which says what went wrong in which worker, and can be closed whatever happened.

    Frames are uint8 (num_workers, M, K, H, W) and good until the next step; all else is (num_workers, M).
    """

    patience = 15.0  # seconds; a step takes hundredths of one
    long_patience = 180.0  # seconds; to start, or to play the landers' episodes again, takes a few

    def __init__(self, *args, **settings):
        # gymnasium waits for new workers without a limit; killing them ends it.
        watch = threading.Timer(self.long_patience, lambda: _kill(self.processes))
        watch.daemon = True
        watch.start()
        try:
            super().__init__(*args, worker=_work, **settings)
        except BaseException as error:
            if not getattr(self, "processes", None):  # it failed in the trainer itself
                if isinstance(error, OSError):
                    raise WorkerError(f"workers' shared memory: {error.strerror}") from error
                raise
            cause = self._cause(error, self.long_patience)
            _kill(self.processes)
            if not isinstance(error, Exception):  # a signal
                raise
            raise WorkerError(f"{cause}; it could not start, and what it said itself is above") from error
        finally:
            watch.cancel()
        self.observation_space = self.observation_space["frames"]
        self.single_observation_space = self.single_observation_space["frames"]
        atexit.register(_kill, self.processes)  # before multiprocessing waits for them, which a frozen one never ends

    @contextmanager
    def _told(self, patience):
        try:
            yield patience
        except Exception as error:
            raise WorkerError(self._cause(error, patience)) from error

    def reset(self, *, seed=None, options=None):
        with self._told(self.long_patience) as patience:
            self.reset_async()
            return self.reset_wait(timeout=patience)[0]["frames"], {}

    def step(self, actions):
        """As LanderGroup.step."""
        places = self.observations["actions"]
        if np.shape(actions) != places.shape:
            raise ValueError(f"actions of shape {np.shape(actions)}, not {places.shape}")
        if self._state != AsyncState.DEFAULT:
            raise AlreadyPendingCallError("a step was interrupted; its answers would pass for this one's", "step")
        self._state = AsyncState.WAITING_STEP
        places[:] = actions
        with self._told(self.patience) as patience:
            for pipe in self.parent_pipes:
                pipe.send_bytes(b"")
            if not self._poll_pipe_envs(patience):
                raise TimeoutError
            final_frames, successes = zip(*[pipe.recv() for pipe in self.parent_pipes], strict=True)
            self._raise_if_errors(successes)
        self._state = AsyncState.DEFAULT
        rewards, terminated, truncated, *counts = self.observations["numbers"].swapaxes(0, 1).copy()
        info = dict(zip(LanderGroup.COUNTS, counts, strict=True))
        if any(frames is not None for frames in final_frames):
            blank = np.zeros(self.single_observation_space.shape, np.uint8)
            info["final_frames"] = np.stack([blank if frames is None else frames for frames in final_frames])
        return self.observations["frames"], rewards, terminated > 0, truncated > 0, info

    def rewind(self, states):
        """Put each worker's landers into its LanderGroup.state; their frames, uint8 (num_workers, M, K, H, W)."""
        with self._told(self.long_patience) as patience:
            for pipe, state in zip(self.parent_pipes, states, strict=True):
                pipe.send(("_call", ("rewind", (state,), {})))
            self._state = AsyncState.WAITING_CALL  # as after call_async, which sends the same to all
            self.call_wait(timeout=patience)
        return self.observations["frames"]

    def _cause(self, error, patience):
        for i, (process, pipe) in enumerate(zip(self.processes, self.parent_pipes, strict=True)):
            if pipe is None:  # gymnasium has taken its error message
                return f"worker {i} raised {type(error).__name__}: {error}"
            if process.pid is None:
                return f"worker {i} was not started: {type(error).__name__}: {error}"
            process.join(timeout=0.1)
            if not process.is_alive():
                return f"worker {i} died, exit code {process.exitcode}"
        silent = [i for i, pipe in enumerate(self.parent_pipes) if not pipe.poll(0)]
        return f"worker {', '.join(map(str, silent))} did not answer for {patience:.0f} s"

    def close_extras(self, **_):
        """Kill the workers: they hold nothing that is not known here, and one that died or froze cannot be asked."""
        _kill(getattr(self, "processes", ()))
        for pipe in getattr(self, "parent_pipes", ()):
            if pipe:
                pipe.close()


def _kill(processes):
    started = [process for process in processes if process.pid]
    for process in started:
        process.kill()
    for process in started:
        process.join(timeout=5)


def _spread(processes):
    """Give each worker a core of its own, where they share the cores evenly, and let none push the trainer from its.

    Left to itself, the kernel often wakes two workers on the same core and moves one of them a millisecond too late; or
    the first that is woken takes the trainer's core before it has woken the others.
    """
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):
        if len(processes) % len(cores) == 0:
            with suppress(OSError):  # it has died, which its next step will tell
                os.sched_setaffinity(process.pid, {cores[i % len(cores)]})
        with suppress(OSError):  # or this is not allowed here
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))  # it waits its turn when it wakes


def _check_shared_memory(size):
    """multiprocessing maps a file; where it does not fit, the first write to it ends the process without a word."""
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(folder)]
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    if max(free.values()) < size:
        there = ", ".join(f"{folder} has {room / 1e6:.1f}" for folder, room in free.items())
        raise WorkerError(f"the frames that workers share need {size / 1e6:.1f} MB, but {there}; make room, or choose "
                          "a smaller env.num_envs or env.frame_stack")


def make_vector_env(num_envs, num_workers, seed=0, frame_skip=4, frame_stack=4, shrink_factor=4, color=True,
                    first_lander=0):
    """num_envs landers over num_workers processes, numbered from first_lander on; seed and number make their episodes.

    Returns an AsyncVectorEnv whose observations are uint8 (num_workers, num_envs / num_workers, K, H, W), whose rewards
    and ending flags are (num_workers, num_envs / num_workers), and which begins new episodes by itself.
    """
    landers = num_envs // num_workers
    settings = {
        "seed": seed, "frame_skip": frame_skip, "frame_stack": frame_stack, "shrink_factor": shrink_factor,
        "color": color}
    firsts = [first_lander + w * landers for w in range(num_workers)]
    groups = [partial(LanderGroup, landers, first_index=first, **settings) for first in firsts]
    picture = frame_planes(color) * (VIEWPORT_H // shrink_factor) * (VIEWPORT_W // shrink_factor)
    _check_shared_memory(num_envs * frame_stack * picture)
    # Ctrl-C is for the trainer, which ends its workers itself: the server that they are forked from passes this on.
    resource_tracker.ensure_running()  # started by the server, it would let signals through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # copy=False: the caller copies each batch into its rollout at once. forkserver: forking a process whose libraries
    # have started threads can hang.
    envs = LanderVectorEnv(groups, copy=False, context="forkserver", autoreset_mode=AutoresetMode.DISABLED)
    _spread(envs.processes)
    return envs
