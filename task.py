"""What is known about an environment, in one place: picture, actions, mirror, endings, solved mark, seeds.

LunarLander-v3's facts stand here, so that whoever needs one need not load the environment. Those of any other are found
out once, by a look at it: `find_task`. A policy gets the facts that concern it as arguments (models.Spaces).
"""

import json
import os
import warnings
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib import import_module

# pygame, which draws most environments, reads these at its import: frames go to memory, so no display is needed.
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import gymnasium as gym
import numpy as np

ENV_ID = "LunarLander-v3"
SPEC = gym.spec(ENV_ID)
SOLVED = SPEC.reward_threshold  # mean return from which the task counts as solved: 200
TIME_LIMIT = SPEC.max_episode_steps  # physics steps: 1,000
VIEWPORT = (400, 600)  # pixels of a rendered frame: height, width
FPS = 50  # physics steps per second of flight

ACTIONS = ("nothing", "left engine", "main engine", "right engine")
MIRRORED_ACTIONS = (0, 3, 2, 1)  # what each action is in a mirror
THRUSTS = ("main engine", "side engine")  # the two numbers, -1 to 1, that are an action with env.continuous
MIRRORED_THRUSTS = (1, -1)  # their signs in a mirror
OUTCOMES = ("rest", "crash", "out_of_sight", "time")  # how an episode ends
LANDED = OUTCOMES.index("rest")

# LunarLander-v3's options, with gymnasium's names and defaults. A policy is told none of them.
CALM = {"gravity": -10.0, "enable_wind": False, "wind_power": 15.0, "turbulence_power": 1.5}
WIND_OPTIONS = ("wind_power", "turbulence_power")  # those without effect unless enable_wind

TRAINING_SEEDS = 900_000  # training draws the seeds of its episodes below this
SELECTION_SEED = 900_000  # from here: episodes that choose the best checkpoint
EVALUATION_SEED = 1_000_000  # from here: episodes that score it


@dataclass(frozen=True)
class Task:
    """The facts of one environment."""

    viewport: tuple  # pixels of a rendered frame: height, width
    fps: float  # environment steps per second of a video
    time_limit: int | None  # environment steps of an episode at most
    solved: float | None  # mean return from which the task counts as solved; None: nobody has said
    actions: tuple  # names of the discrete actions, or of the numbers of a continuous one
    continuous: bool = False
    mirrored_actions: tuple = ()  # what each action is in a mirror, or the signs of the numbers there; empty: unknown
    outcomes: tuple = ("terminated", "time")  # how an episode ends
    landed: int | None = None  # which of the outcomes is a landing


LUNAR_LANDER = {
    continuous: Task(
        VIEWPORT, FPS, TIME_LIMIT, SOLVED, THRUSTS if continuous else ACTIONS, continuous,
        MIRRORED_THRUSTS if continuous else MIRRORED_ACTIONS, OUTCOMES, LANDED)
    for continuous in (False, True)}


class TaskError(Exception):
    """An environment that cannot be learned from frames; one line."""


def find_task(env_id, options):
    """The Task of an environment id and the dict of options that `gym.make` takes.

    TaskError if the environment cannot be made, shows no frames, or has actions that are neither Discrete nor a Box of
    floats.
    """
    if env_id == ENV_ID:
        return LUNAR_LANDER[options.get("continuous", False)]
    return _look_at(env_id, json.dumps(options))


def solved_mark(env_id):
    """The mean return from which an environment counts as solved, by its registration alone; None if unknown."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            import_module(module)
        return gym.spec(name).reward_threshold
    except Exception:  # no such environment here, or a module of somebody else's that fails
        return None


def make_rendered(env_id, options):
    """gym.make for an environment that is to be seen."""
    return gym.make(env_id, render_mode="rgb_array", disable_env_checker=True, **options)


@cache
def _look_at(env_id, options):
    try:
        with warnings.catch_warnings():  # what matters is said below, in one line
            warnings.simplefilter("ignore")
            with closing(make_rendered(env_id, json.loads(options))) as env:
                env.reset(seed=0)
                frame, space, spec, fps = env.render(), env.action_space, env.spec, env.metadata.get("render_fps")
    except Exception as error:  # somebody else's code raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"cannot be made and rendered: {reason}") from error
    if spec.id != env_id.rpartition(":")[2]:
        raise TaskError(f"names no version; the newest is {spec.id}")
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3):
        shown = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise TaskError(f"shows no frames: render() gives {shown}, not uint8 (height, width, 3)")
    continuous = isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not (continuous or isinstance(space, gym.spaces.Discrete)):
        raise TaskError(f"has actions of another kind, {space}; Discrete, or a Box of floats, can be learned")
    count = int(np.prod(space.shape)) if continuous else int(space.n)
    names = tuple(f"{'number' if continuous else 'action'} {i}" for i in range(count))
    return Task(frame.shape[:2], fps or 30, spec.max_episode_steps, spec.reward_threshold, names, continuous)
