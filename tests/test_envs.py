"""The frames we draw are the frames of gymnasium's own renderer, bit for bit."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
from gymnasium.envs.box2d import lunar_lander
from gymnasium.envs.box2d.lunar_lander import heuristic
from gymnasium.error import AlreadyPendingCallError

from envs import EnvGroup, make_vector_env
from frames import FrameStack, shrink
from lander import PARTICLE_AGEING, Lander, LeanLunarLander, RenderedLander, draw_weather
from machinery.workers import WorkerError
from runs import HANGS, output_of, wait, workers_of
from task import ACTIONS, CALM, ENV_ID, FPS, MIRRORED_ACTIONS, OUTCOMES, SOLVED, TIME_LIMIT, TRAINING_SEEDS, VIEWPORT

WEATHERS = {
    "calm": {}, "default wind": {"enable_wind": True},
    "strongest wind": {"enable_wind": True, "wind_power": 20.0, "turbulence_power": 2.0},
    "light": {"gravity": -0.5}, "heavy": {"gravity": -11.99, "enable_wind": True, "wind_power": 5.0}}


def rendered_episode(seed, choose, factor, color, **options):
    """One episode of the unmodified environment, one render per physics step: frames, actions, rewards, last flags."""
    env = gym.make(ENV_ID, render_mode="rgb_array", **options)
    state, _ = env.reset(seed=seed)
    frames, actions, rewards, ended = [shrink(env.render(), factor, color)], [], [], False
    while not ended:
        actions.append(choose(env, state))
        state, reward, terminated, truncated, _ = env.step(actions[-1])
        frames.append(shrink(env.render(), factor, color))
        rewards.append(reward)
        ended = terminated or truncated
    return frames, actions, rewards, terminated, truncated


def random_policy(seed):
    rng = np.random.default_rng(seed)
    return lambda env, state: int(rng.integers(4))


POLICIES = {
    "heuristic": lambda seed: heuristic,
    "random": random_policy,
    "main engine": lambda seed: lambda env, state: 2,  # leaves through the top, with as many flames as there can be
    "left engine": lambda seed: lambda env, state: 1,  # turns over, leaves at the side or crashes
    "hover": lambda seed: lambda env, state: 2 if state[3] < 0 else 0,  # some run into the time limit
}


def motion(env):
    """Where everything is and how it moves, and the random numbers to come."""
    return [
        (*body.position.tuple, *body.linearVelocity.tuple, body.angle, body.angularVelocity, body.mass)
        for body in [env.lander, *env.legs, *env.particles]
    ] + [particle.ttl for particle in env.particles] + [env.np_random.bit_generator.state]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weather", WEATHERS)
def test_lean_lander_moves_as_gymnasiums(policy, weather):
    env, lean = gym.make(ENV_ID, render_mode="rgb_array", **WEATHERS[weather]).unwrapped, LeanLunarLander()
    for option, value in WEATHERS[weather].items():
        setattr(lean, option, value)
    for seed in range(8 if weather == "calm" else 3):
        choose, terminated, steps = POLICIES[policy](seed), False, 0
        state, _ = env.reset(seed=seed)
        lean.reset(seed=seed)
        while not terminated and steps < 1000:
            action = choose(env, state)
            state, reward, terminated, _, _ = env.step(action)
            assert lean.step(action)[1:3] == (reward, terminated)
            for lander in (env, lean):
                for particle in lander.particles:
                    particle.ttl -= PARTICLE_AGEING
                lander._clean_particles(False)
            assert motion(lean) == motion(env)
            steps += 1
        assert terminated or policy == "hover" or weather == "light"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("factor", "color"), [(8, False), (4, True), (5, False), (10, True)])
def test_every_frame_equals_the_renderers(policy, factor, color):
    lander = Lander(frame_skip=1, frame_stack=1, shrink_factor=factor, color=color)
    for seed in range(3):
        frames, actions, rewards, terminated, truncated = rendered_episode(seed, POLICIES[policy](seed), factor, color)
        np.testing.assert_array_equal(lander.reset(seed), frames[0])
        for action, frame, reward in zip(actions, frames[1:], rewards, strict=True):
            seen, got, *ended = lander.step(action)
            np.testing.assert_array_equal(seen, frame)
            assert got == reward
        assert ended == [terminated, truncated and not terminated]
        assert lander.episode_return == pytest.approx(sum(rewards), abs=1e-9)
        assert lander.episode_length == len(actions)


@pytest.mark.parametrize("weather", list(WEATHERS)[1:])
@pytest.mark.parametrize("lander_class", [Lander, RenderedLander])
def test_every_frame_in_every_weather_equals_the_renderers(lander_class, weather):
    """Of an environment that gym.make made with these options."""
    options = WEATHERS[weather]
    lander = lander_class(frame_skip=1, frame_stack=1, shrink_factor=4, color=True, **options)
    for seed, policy in enumerate(["heuristic", "random", "hover"]):
        frames, actions, rewards, *_ = rendered_episode(seed, POLICIES[policy](seed), 4, True, **options)
        np.testing.assert_array_equal(lander.reset(seed), frames[0])
        for action, frame, reward in zip(actions, frames[1:], rewards, strict=True):
            seen, got, *_ = lander.step(action)
            np.testing.assert_array_equal(seen, frame)
            assert got == reward


def continuous_heuristic(env, state):
    return heuristic(env.unwrapped, state)


def continuous_random(seed):
    rng = np.random.default_rng(seed)
    return lambda env, state: rng.uniform(-1.5, 1.5, 2).astype(np.float32)  # beyond the limits, too


@pytest.mark.parametrize("lander_class", [Lander, RenderedLander])
@pytest.mark.parametrize("options", [{}, {"enable_wind": True, "gravity": -6.0}], ids=["calm", "wind"])
def test_continuous_engines_equal_the_unmodified_environments(lander_class, options):
    """Frames, rewards and, of the lean lander, motion and random numbers, bit for bit."""
    lander = lander_class(1, 1, 4, True, continuous=True, **options)
    for seed in range(4):
        choose = continuous_heuristic if seed % 2 else continuous_random(seed)
        env = gym.make(ENV_ID, render_mode="rgb_array", continuous=True, **options)
        state, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(lander.reset(seed), shrink(env.render(), 4, True))
        ended = False
        while not ended:
            action = choose(env, state)
            state, reward, terminated, truncated, _ = env.step(action)
            frame = shrink(env.render(), 4, True)
            seen, got, *endings = lander.step(action)
            np.testing.assert_array_equal(seen, frame)
            assert (got, endings) == (reward, [terminated, truncated and not terminated])
            assert motion(lander.lander) == motion(env.unwrapped)
            ended = terminated or truncated


def test_a_range_is_drawn_from_the_seed_of_the_episode():
    options = CALM | {"gravity": [-12.0, -8.0], "wind_power": [0.0, 20.0]}
    drawn = [draw_weather(options, seed) for seed in range(200)]
    assert drawn == [draw_weather(options, seed) for seed in range(200)]
    for key, low, high in (("gravity", -12, -8), ("wind_power", 0, 20)):
        values = [weather[key] for weather in drawn]
        assert low < min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high
    assert {weather["turbulence_power"] for weather in drawn} == {1.5}
    fixed = [draw_weather(options | {"gravity": -10.0}, seed)["wind_power"] for seed in range(200)]
    assert fixed == [weather["wind_power"] for weather in drawn]  # a range changes no other option
    for lander_class in (Lander, RenderedLander):
        lander = lander_class(4, 1, 8, False, gravity=[-12.0, -8.0], enable_wind=True)
        lander.reset(7)
        assert lander.lander.gravity == drawn[7]["gravity"]
        assert lander.lander.world.gravity.y == pytest.approx(drawn[7]["gravity"])
        assert lander.lander.enable_wind


@pytest.mark.parametrize(("factor", "color"), [(8, False), (4, True), (1, True), (50, False)])
def test_first_frames_of_many_terrains_equal_the_renderers(factor, color):
    """One lander through all of them: nothing of an episode's terrain or flags is left in the next."""
    lander, env = Lander(1, 1, factor, color), gym.make(ENV_ID, render_mode="rgb_array")
    for seed in range(60):
        env.reset(seed=seed)
        np.testing.assert_array_equal(lander.reset(seed), shrink(env.render(), factor, color))


@pytest.mark.parametrize("lander_class", [Lander, RenderedLander])
def test_action_repeat_shows_every_fourth_frame_and_stacks_the_last_ones(lander_class):
    lander = lander_class(frame_skip=4, frame_stack=3, shrink_factor=8, color=True)
    rng = np.random.default_rng(5)
    chosen = rng.integers(4, size=300)
    counter = iter(np.repeat(chosen, 4))
    frames, _, rewards, *_ = rendered_episode(11, lambda env, state: int(next(counter)), 8, True)
    stack = FrameStack(3, (3, 50, 75))
    np.testing.assert_array_equal(lander.reset(11), stack.fill(frames[0]))
    done, at = False, 0
    while not done:
        seen, reward, terminated, truncated = lander.step(int(chosen[at // 4]))
        length = min(4, len(rewards) - at)
        assert reward == pytest.approx(sum(rewards[at : at + length]), abs=1e-9)
        at += length
        np.testing.assert_array_equal(seen, stack.push(frames[at]))
        done = terminated or truncated
    assert at == len(rewards)


def test_shrink_is_the_mean_over_blocks():
    frame = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    blocks = frame.reshape(50, 8, 75, 8, 3).mean((1, 3))
    assert np.abs(shrink(frame, 8, True).transpose(1, 2, 0) - blocks).max() <= 0.5 + 1e-6
    gray = (frame @ [0.299, 0.587, 0.114]).reshape(50, 8, 75, 8).mean((1, 3))
    assert np.abs(shrink(frame, 8, False)[0] - gray).max() <= 1.1  # two roundings


def test_frame_stack_is_oldest_first():
    stack = FrameStack(3, (1, 1, 1))
    stack.fill(np.full((1, 1, 1), 7, np.uint8))
    assert stack.push(np.full((1, 1, 1), 8, np.uint8)).ravel().tolist() == [7, 7, 8]
    assert stack.push(np.full((1, 1, 1), 9, np.uint8)).ravel().tolist() == [7, 8, 9]


def state_of(lander):
    body = lander.lander.lander
    return np.array([
        (body.position.x - 10) / 10, (body.position.y - lander.lander.helipad_y - 0.6) / (20 / 3),
        body.linearVelocity.x / 5, body.linearVelocity.y * 20 / 3 / 50, body.angle, body.angularVelocity * 0.4,
        *(float(leg.ground_contact) for leg in lander.lander.legs)])


def keep_aloft(env, state):
    """Keeps upright, and keeps from falling."""
    turn = (0.5 * state[0] + state[2] - state[4]) * 0.5 - state[5]
    if (1 - state[1]) * 0.5 - state[3] * 0.5 > abs(turn):
        return 2
    return 3 if turn < -0.05 else 1 if turn > 0.05 else 0


def outcomes_of(choose, seeds):
    found = set()
    for seed in seeds:
        lander, ended = Lander(1, 1, 8, False), False
        lander.reset(seed)
        while not ended:
            *_, terminated, truncated = lander.step(choose(lander.env, state_of(lander)))
            ended = terminated or truncated
        found.add((OUTCOMES[lander.outcome()], truncated))
    return found


def test_outcomes_say_how_an_episode_ended():
    assert ("rest", False) in outcomes_of(heuristic, range(3))
    assert outcomes_of(lambda env, state: 0, range(2)) == {("crash", False)}
    assert ("out_of_sight", False) in outcomes_of(lambda env, state: 2 if state[1] < 1 else 0, range(8))
    assert ("time", True) in outcomes_of(keep_aloft, range(3))


SETTINGS = {"frame_skip": 4, "frame_stack": 2, "shrink_factor": 8, "color": False}


def test_vector_env_equals_its_landers_played_alone():
    envs = make_vector_env(num_envs=4, num_workers=2, seed=3, **SETTINGS)
    try:
        assert (envs.num_envs, envs.observation_space.shape, envs.action_space.shape) == (4, (4, 2, 50, 75), (4,))
        observations = envs.reset()[0].copy()
        alone = [EnvGroup(1, i, 3, **SETTINGS) for i in range(4)]
        for i, group in enumerate(alone):
            np.testing.assert_array_equal(observations[i], group.reset()[0][0])
        rng, endings = np.random.default_rng(0), 0
        for _ in range(60):
            actions = rng.integers(4, size=4)
            observations, rewards, terminated, truncated, info = envs.step(actions)
            assert rewards.shape == terminated.shape == truncated.shape == info["env_frames"].shape == (4,)
            for i, group in enumerate(alone):
                frames, reward, term, trunc, own = group.step(actions[i : i + 1])
                np.testing.assert_array_equal(observations[i], frames[0])
                assert (rewards[i], terminated[i], truncated[i]) == (reward[0], term[0], trunc[0])
                assert info["env_frames"][i] == own["env_frames"][0]
                if term[0]:
                    endings += 1
                    assert own["episode"].keys() == info["episode"].keys() == Lander.metrics.keys()
                    assert {key: values[i] for key, values in info["episode"].items()} == {
                        key: values[0] for key, values in own["episode"].items()}
                    assert own["episode"]["length_mean"][0] > 40
                    assert own["episode"]["landed_rate"][0] == 0  # random play does not land
        assert endings > 3
    finally:
        envs.close()


@pytest.fixture
def pair():
    envs = make_vector_env(num_envs=4, num_workers=2, **SETTINGS)
    envs.reset()
    yield envs
    envs.close()
    assert not any(process.is_alive() for process in envs.workers.processes)


@pytest.fixture
def two_cores():
    """This process on at most two cores, and which they are."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:2])
    yield sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_have_cores_of_their_own_where_they_share_them_evenly(workers, two_cores):
    envs = make_vector_env(num_envs=workers, num_workers=workers, **SETTINGS)
    try:
        cores = [os.sched_getaffinity(process.pid) for process in envs.workers.processes]
        if workers % len(two_cores) == 0:
            assert cores == [{two_cores[i % len(two_cores)]} for i in range(workers)]
        else:
            assert all(len(chosen) > 1 for chosen in cores)
    finally:
        envs.close()


NOTHING = np.zeros(4, int)


def test_killed_worker_is_named(pair):
    os.kill(pair.workers.processes[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="worker 1 died, exit code -9"):
        for _ in range(3):
            pair.step(NOTHING)


def test_frozen_worker_is_named(pair):
    pair.step(NOTHING)
    pair.workers.timeout = 5  # seconds; the other worker may be slow
    os.kill(pair.workers.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="worker 0 did not answer for 5 s"):
        pair.step(NOTHING)


@pytest.mark.parametrize(("number", "message"), [
    (signal.SIGKILL, "worker 1 died, exit code -9"), (signal.SIGSTOP, "worker 1 did not answer for 5 s")])
def test_worker_that_fails_while_episodes_are_played_again_is_named(number, message, pair):
    pair.workers.long_timeout = 5  # seconds; the other worker may be slow
    os.kill(pair.workers.processes[1].pid, number)
    with pytest.raises(WorkerError, match=message):
        pair.restore(pair.state)


def test_frozen_worker_does_not_outlive_its_trainer():
    code = (
        "import os, signal, time; from envs import make_vector_env; envs = make_vector_env(4, 2)\n"
        "os.kill(envs.workers.processes[0].pid, signal.SIGSTOP)\n"
        "print(*(p.pid for p in envs.workers.processes), flush=True); time.sleep(600)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent.parent)
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    assert psutil.wait_procs(workers, timeout=HANGS)[1] == []


def test_frames_that_do_not_fit_into_shared_memory_are_said_before_anything_starts():
    with pytest.raises(WorkerError, match=r"share need .* MB, but .*has .*smaller env\.num_envs"):
        make_vector_env(num_envs=10**12, num_workers=1, **SETTINGS)


def test_raising_worker_is_named_with_its_cause(pair):
    with pytest.raises(WorkerError, match="worker 1 raised AssertionError: 9"):
        pair.step(np.array([0, 0, 0, 9]))


def test_worker_that_raises_in_a_later_step_is_named_with_its_cause(monkeypatch):
    monkeypatch.setattr("envs.partial", lambda *args, **settings: FailsLater())
    envs = make_vector_env(num_envs=4, num_workers=2, **SETTINGS)
    try:
        envs.reset()
        envs.step(NOTHING)
        with pytest.raises(WorkerError, match=r"worker \d raised ArithmeticError: no such step"):
            envs.step(NOTHING)
    finally:
        envs.close()


class FailsLater:
    def __call__(self):
        group = EnvGroup(2, 0, 0, **SETTINGS)
        step, count = group.step, iter(range(100))

        def fail_at_the_second(actions):
            if next(count) == 1:
                raise ArithmeticError("no such step")
            return step(actions)

        group.step = fail_at_the_second
        return group


def test_interrupted_step_is_not_taken_for_the_next_one(pair, monkeypatch):
    def interrupt(timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pair.workers, "step_wait", interrupt)
        pair.step(NOTHING)
    with pytest.raises(AlreadyPendingCallError, match="waiting for a pending call to `step`"):
        pair.step(NOTHING)


def test_what_a_vector_env_cannot_do_is_refused(pair):
    with pytest.raises(ValueError, match="4 environments cannot be shared out evenly among 3 workers"):
        make_vector_env(4, 3, **SETTINGS)
    with pytest.raises(ValueError, match="seed and options belong to make_vector_env"):
        pair.reset(seed=1)
    with pytest.raises(TypeError, match="gravty: not among the options gravity, "):
        Lander(1, 1, 8, False, gravty=-5.0)


def test_actions_are_one_per_lander(pair):
    with pytest.raises(ValueError, match=r"actions of shape \(2, 2\), not \(4,\)"):
        pair.step(np.zeros((2, 2), int))


def test_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr("envs.partial", lambda *args, **settings: FailsInWorker())
    with pytest.raises(WorkerError, match="worker 0 died, exit code 1; it could not start"):
        make_vector_env(num_envs=4, num_workers=2, **SETTINGS)


def test_an_error_that_cannot_be_sent_is_named_all_the_same(monkeypatch):
    monkeypatch.setattr("envs.partial", lambda *args, **settings: FailsUnsendably())
    envs = make_vector_env(num_envs=4, num_workers=2, **SETTINGS)
    try:
        envs.reset()
        with pytest.raises(WorkerError, match=r"worker \d raised ValueError: bad wind"):
            envs.step(NOTHING)
    finally:
        envs.close()


class FailsUnsendably:
    def __call__(self):
        group = EnvGroup(2, 0, 0, **SETTINGS)

        def fail(action):
            error = ValueError("bad wind")
            error.cause = lambda: None  # no pickle takes it
            raise error

        group.envs[1].play = fail
        return group


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_workers_that_do_not_start(number, tmp_path):
    code = ("import time, torch; import envs\n"
            "torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # threads that might take the signal\n"
            "class Hangs:\n    def __call__(self):\n        import os, time; os.getpid() == pid or time.sleep(3600)\n"
            "        return envs.EnvGroup(2, 0, 0, frame_skip=4, frame_stack=4, shrink_factor=8, color=False)\n"
            "import os, signal; pid = os.getpid(); signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
            "envs.partial = lambda *args, **settings: Hangs()\n"
            "envs.make_vector_env(4, 2)\n")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait(process, lambda: workers_of(process))
    workers = workers_of(process)
    process.send_signal(number)
    output = output_of(process)
    assert "KeyboardInterrupt" in output
    assert psutil.wait_procs(workers, timeout=HANGS)[1] == []


class FailsInWorker:
    def __call__(self):
        if multiprocessing.parent_process():
            raise RuntimeError("no such lander")
        return EnvGroup(2, 0, 0, **SETTINGS)


def test_truncated_episode_hands_over_its_last_frames():
    group = EnvGroup(1, 0, 0, **SETTINGS)
    group.reset()
    group.envs[0].env._max_episode_steps = 42  # the outermost wrapper, TimeLimit
    group.envs[0].reset(5)
    twin = Lander(**SETTINGS)
    twin.reset(5)
    for decision in range(11):
        frames, _, terminated, truncated, info = group.step([0 if decision % 2 else 2])
        if decision < 10:
            last = twin.step(0 if decision % 2 else 2)[0]
    assert truncated.tolist() == [True]
    assert terminated.tolist() == [False]
    assert info["episode"]["length_mean"].tolist() == [42]
    assert info["episode"]["landed_rate"].tolist() == [0]
    # Two of the eleventh decision's four steps were played: its frame is not the twin's, but the one before it is.
    np.testing.assert_array_equal(info["final_frames"][0][0], last[1])
    assert not np.array_equal(frames[0], info["final_frames"][0])


def test_last_frames_of_a_truncated_episode_reach_the_trainer():
    settings = SETTINGS | {"frame_skip": 1, "seed": 0}
    alone = EnvGroup(1, 1, **settings)
    alone.reset()
    actions, truncated = [], [False]
    while not truncated[0]:
        actions.append(keep_aloft(None, state_of(alone.envs[0])))
        frames, _, terminated, truncated, info = alone.step(actions[-1:])
        assert not terminated[0]
    envs = make_vector_env(num_envs=2, num_workers=2, **settings)
    try:
        envs.reset()
        for action in actions:
            seen, _, terminated, both_truncated, told = envs.step(np.array([0, action]))
            assert ("final_frames" in told) == both_truncated.any()
        assert both_truncated.tolist() == [False, True]
        np.testing.assert_array_equal(told["final_frames"][1:], info["final_frames"])
        assert not told["final_frames"][0].any()
        np.testing.assert_array_equal(seen[1:], frames)
    finally:
        envs.close()


def test_episodes_never_use_evaluation_seeds(monkeypatch):
    group = EnvGroup(2, 0, 1, **SETTINGS)
    seeds = []
    monkeypatch.setattr(Lander, "reset", lambda lander, seed: seeds.append(seed))
    for _ in range(500):
        group.reset()
    assert len(set(seeds)) > 990
    assert min(seeds) >= 0
    assert max(seeds) < TRAINING_SEEDS < 1_000_000


@pytest.mark.parametrize("continuous", [False, True])
def test_state_restores_landers_in_mid_episode(continuous):
    rng = np.random.default_rng(0)

    def actions():
        return rng.uniform(-1, 1, (6, 2)).astype(np.float32) if continuous else rng.integers(4, size=6)

    weather = {"gravity": [-12.0, -8.0], "enable_wind": True, "wind_power": [0.0, 20.0]}
    envs, others = (
        make_vector_env(6, n, seed=7, first_env=12, continuous=continuous, **SETTINGS, **weather) for n in (1, 2))
    try:
        envs.reset()
        others.reset()
        for _ in range(40):
            frames = envs.step(actions())[0]
        assert max(episodes for episodes, _ in envs.state) > 1
        np.testing.assert_array_equal(others.restore(envs.state), frames)
        for _ in range(60):
            chosen = actions()
            for mine, theirs in zip(envs.step(chosen)[:4], others.step(chosen)[:4], strict=True):
                np.testing.assert_array_equal(mine, theirs)
        assert others.state == envs.state
    finally:
        envs.close()
        others.close()


def test_facts_are_those_of_gymnasium():
    env = gym.make(ENV_ID, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (*VIEWPORT, 3)
    assert (VIEWPORT, FPS) == ((lunar_lander.VIEWPORT_H, lunar_lander.VIEWPORT_W), lunar_lander.FPS)
    assert env.action_space.n == len(ACTIONS) == len(MIRRORED_ACTIONS)
    assert (SOLVED, TIME_LIMIT) == (200, 1000)


def test_a_trainer_that_dies_while_its_workers_begin_leaves_none():
    """They are not asked to end: the kernel ends them."""
    code = "import time; from envs import make_vector_env; make_vector_env(4, 2)\ntime.sleep(600)\n"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                               stderr=subprocess.DEVNULL)
    wait(process, lambda: workers_of(process))
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=HANGS)[1] == []


def test_a_viewer_is_told_the_wind_that_the_next_step_applies():
    lander = RenderedLander(1, 1, 8, False, enable_wind=True, wind_power=20.0, turbulence_power=2.0)
    lander.reset(3)
    game, told = lander.lander, set()
    for index in range(0, 400, 7):
        game.wind_idx, game.torque_idx = index, 2 * index
        force = math.tanh(math.sin(0.02 * index) + math.sin(math.pi * 0.01 * index)) * 20
        torque = math.tanh(math.sin(0.04 * index) + math.sin(math.pi * 0.02 * index)) * 2
        arrow, turn = " →" if force > 0 else " ←" if force else "", " ↺" if torque > 0 else " ↻" if torque else ""
        assert lander.conditions() == f"gravity -10.0, wind {abs(force):.1f}{arrow}, turbulence {abs(torque):.1f}{turn}"
        told |= {arrow, turn}
    assert told == {"", " →", " ←", " ↺", " ↻"}
    while not any(leg.ground_contact for leg in game.legs):
        lander.step(0)
    assert lander.conditions() == "gravity -10.0, wind 0.0, turbulence 0.0"
    calm = RenderedLander(1, 1, 8, False, gravity=-5.0)
    calm.reset(3)
    assert calm.conditions() == "gravity -5.0"
