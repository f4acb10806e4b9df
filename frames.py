"""Any Gymnasium environment as an agent sees it: decisions in, stacks of small rendered frames out.

    env = RenderedEnv("CartPole-v1", frame_skip=2, frame_stack=4, shrink_factor=4, color=True)
    frames = env.reset(seed=7)                              # uint8 (K, H, W)
    frames, reward, terminated, truncated = env.step(1)

K is the number of stacked frames times planes (3 in colour, 1 in gray).
"""

import cv2
import gymnasium as gym
import numpy as np

from task import find_task, make_rendered


def frame_planes(color):
    """Planes per frame: 3 (red, green, blue) in colour, 1 in gray."""
    return 3 if color else 1


def shrink(frame, factor, color):
    """A rendered frame, uint8 (H, W, 3 or 4) RGB or RGBX, as the agent's small frame, uint8 (C, H/factor, W/factor).

    Gray first where asked for (ITU-R BT.601 weights, as OpenCV rounds them), then the mean over
    factor x factor blocks, which is what INTER_AREA means for a whole factor.
    """
    height, width = frame.shape[0] // factor, frame.shape[1] // factor
    if not color:
        frame = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    return small.transpose(2, 0, 1)[:3] if color else small[None]


class FrameStack:
    """The last `length` frames of one episode, oldest first; an episode's first frame fills the stack.

    Frames are uint8 (C, H, W), the stack is uint8 (length * C, H, W).
    """

    def __init__(self, length, shape, dtype=np.uint8):
        self.length, self.planes, self.next = length, shape[0], 0
        self.strip = np.zeros((2 * length, *shape), dtype)

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

# Metric: function that reads an episode's number from a RenderedEnv whose episode has ended. The mean over the last 100
# episodes is logged as rollout/METRIC.
EPISODE_METRICS = {
    "return_mean": lambda env: env.episode_return,  # the environment's own undiscounted sum of rewards
    "length_mean": lambda env: env.episode_length,  # environment steps
}


class RenderedEnv:
    """One environment played in decisions of `frame_skip` steps, and seen as its own `render()` shows it.

    It is rendered once per step, as for a video: some renderers move things, such as sparks, each time they draw.
    options go to `gym.make`. `on_frame`, if set, is called with each full frame, uint8 (H, W, 3).
    """

    metrics = EPISODE_METRICS
    on_frame = None

    def __init__(self, env_id, frame_skip, frame_stack, shrink_factor, color, options=None):
        self.env_id, self.options = env_id, options or {}
        self.frame_skip, self.shrink_factor, self.color = frame_skip, shrink_factor, color
        self.env, self.task = self.make_env(), find_task(env_id, self.options)
        height, width = self.task.viewport
        shape = (frame_planes(color), height // shrink_factor, width // shrink_factor)
        self.stack = FrameStack(frame_stack, shape)

    def reset(self, seed):
        """Begin the episode of `seed`; the stack of its first frame, uint8 (K, H, W)."""
        self.env.reset(seed=int(seed))
        self.episode_return, self.episode_length, self.terminated = 0.0, 0, False
        self.begin_picture()
        self.pass_time()
        return self.stack.fill(self.picture())

    def step(self, action):
        """Repeat `action` for frame_skip steps or to the episode's end.

        Returns the stack, uint8 (K, H, W), the sum of rewards, terminated, truncated.
        """
        ended = self.play(action)
        return self.observe(), *ended

    def play(self, action):
        """`step` without a frame: the sum of rewards, terminated, truncated."""
        action, reward = self.native(action), 0.0
        for _ in range(self.frame_skip):
            _, step_reward, terminated, truncated, _ = self.env.step(action)
            self.pass_time()
            reward += float(step_reward)
            self.episode_length += 1
            if terminated or truncated:
                break
        self.episode_return += reward
        self.terminated = bool(terminated)
        # If both happen in one step, termination wins, so that no value is bootstrapped.
        return reward, self.terminated, bool(truncated) and not self.terminated

    def observe(self, *view):
        """The stack with the frame of now, uint8 (K, H, W); for its `view`, see `picture`."""
        return self.stack.push(self.picture(*view))

    def outcome(self):
        """How the episode just ended: an index into task.outcomes. For reports only; no policy sees it."""
        return 0 if self.terminated else 1

    def conditions(self):
        """What blows or pulls now, in words for a viewer; no policy sees it."""
        return ""

    # What another way to see or play an environment does differently:

    def make_env(self):
        return make_rendered(self.env_id, self.options)

    def native(self, action):
        """An action of the policy as the environment takes it.

        A policy counts discrete actions from 0. Its numbers from -1 to 1 are stretched to the bounds of a Box, and
        clipped there; where there are no bounds, they stay what they are.
        """
        space = self.env.action_space
        if isinstance(space, gym.spaces.Discrete):
            return space.start + action
        action = np.reshape(np.asarray(action, np.float32), space.shape)
        bounded = space.bounded_below & space.bounded_above
        with np.errstate(invalid="ignore", over="ignore"):  # of bounds that are infinite
            stretched = space.low + (space.high - space.low) * (np.clip(action, -1, 1) + 1) / 2
        return np.where(bounded, stretched, action).clip(space.low, space.high).astype(space.dtype)

    def begin_picture(self):
        pass

    def pass_time(self):
        """What a step does to the picture."""
        self.full_frame = self.env.render()
        if self.on_frame:
            self.on_frame(self.full_frame)

    def picture(self):
        """The small frame of now, uint8 (C, H, W)."""
        return shrink(self.full_frame, self.shrink_factor, self.color)

    @staticmethod
    def views(envs):
        """What several of them can work out at once for their pictures: a tuple of arguments of `picture` for each."""
        return [()] * len(envs)
