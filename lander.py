"""LunarLander-v3 in any weather, played and drawn fast: what only this environment has.

    from lander import Lander, RenderedLander
    lander = Lander(frame_skip=4, frame_stack=4, shrink_factor=4, color=True, enable_wind=True)
    frames = lander.reset(seed=7)                       # uint8 (K, H, W)

The picture is the one that a viewer of a 50-frames-a-second video sees: engine particles age once per *physics* step,
drawn or not, exactly as if `render()` had been called on each of them. `RenderedLander` is the other half of that
promise: it turns the unmodified `render()` into the same observation, and tests/test_envs.py holds the two together bit
for bit.
"""

import math

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

from camera import Camera, views
from frames import EPISODE_METRICS, RenderedEnv
from task import ACTIONS, CALM, ENV_ID, LANDED, OUTCOMES, TIME_LIMIT

PARTICLE_AGEING = 0.15  # what render() takes from each particle's time to live


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
    state vector (which nothing here may see: observations are None). Scores of evaluate.py never come from this class;
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


class RenderedLander(RenderedEnv):
    """One LunarLander-v3 played in decisions: the unmodified environment, one `render()` per physics step.

    This is what scores and videos come from. continuous: an action is two thrusts, float32 (2,), in place of a number
    from 0 to 3. weather: some of task.CALM's options; a range [low, high] is drawn from anew for each episode.
    """

    metrics = EPISODE_METRICS | {
        "landed_rate": lambda lander: lander.outcome() == LANDED,
    }

    def __init__(self, frame_skip, frame_stack, shrink_factor, color, continuous=False, **weather):
        if unknown := weather.keys() - CALM.keys():
            raise TypeError(f"{', '.join(sorted(unknown))}: not among the options {', '.join(CALM)}")
        self.continuous, self.weather = continuous, CALM | weather
        super().__init__(ENV_ID, frame_skip, frame_stack, shrink_factor, color, {"continuous": continuous})
        self.lander = self.env.unwrapped

    def reset(self, seed):
        for option, value in draw_weather(self.weather, int(seed)).items():
            setattr(self.lander, option, value)
        return super().reset(seed)

    def native(self, action):
        if self.continuous:
            return np.asarray(action, np.float32)  # clipped by the environment itself
        assert 0 <= action < len(ACTIONS), action
        return action

    def outcome(self):
        """How the episode just ended: an index into OUTCOMES."""
        body, half_width = self.lander.lander, VIEWPORT_W / SCALE / 2  # metres
        if not body.awake:
            return OUTCOMES.index("rest")
        if self.lander.game_over:
            return OUTCOMES.index("crash")
        return OUTCOMES.index("out_of_sight" if abs(body.position.x - half_width) >= half_width else "time")

    def conditions(self):
        """Gravity, and the force and the torque that wind and turbulence put on the lander at the next physics step."""
        lander, words = self.lander, f"gravity {self.lander.gravity:.1f}"
        if not lander.enable_wind:
            return words
        blows = 0.0 if any(leg.ground_contact for leg in lander.legs) else 1.0
        wind = blows * gust(lander.wind_idx) * lander.wind_power
        turbulence = blows * gust(lander.torque_idx) * lander.turbulence_power
        arrow = "" if wind == 0 else " →" if wind > 0 else " ←"
        turn = "" if turbulence == 0 else " ↺" if turbulence > 0 else " ↻"
        return f"{words}, wind {abs(wind):.1f}{arrow}, turbulence {abs(turbulence):.1f}{turn}"


class Lander(RenderedLander):
    """The same observations the short way, seen through a Camera: what training and the selection of policies use."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.camera = Camera(self.shrink_factor, self.color)

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
        """The small frame of now; `view`, if it is known already, is that of camera.views."""
        return self.camera.frame(self.lander, view or views([self.lander])[0])

    @staticmethod
    def views(landers):
        return [(view,) for view in views([lander.lander for lander in landers])]
