"""Environments other than LunarLander-v3: seen as they render themselves, trained, scored, resumed; or refused."""

import json
import os
import re
import shlex
import subprocess
import sys

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch

import evaluate
from envs import make_env, make_vector_env
from frames import shrink
from machinery.checkpoint import build_policy
from machinery.config import ConfigError, load_config
from machinery.panel import Panel
from plot import draw_run
from runs import HANGS, ROOT, TINY, go, output_of, rows, run_here, start, without_speed

PAGE = (ROOT / "docs" / "worlds.md").read_text()
CARTPOLE = ["env.id=CartPole-v1", "env.shrink_factor=8", "model.mirror=false", "model.eye=none"]
STRANGE = """
import gymnasium as gym
import numpy as np


class Strange(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self, render_mode=None, shape=(64, 96, 3), dtype="uint8", space=None, fail=None):
        if space == "binary":
            self.action_space = gym.spaces.MultiBinary(2)
        if space == "whole":
            self.action_space = gym.spaces.Box(0, 9, (2,), int)
        if space == "half":
            self.action_space = gym.spaces.Box(np.float32([0, -np.inf]), np.float32([10, np.inf]))
        self.shape, self.dtype, self.fail = shape, dtype, fail

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.taken.append(action)
        return np.zeros(1, np.float32), 1.0, len(self.taken) == 9, False, {}

    def render(self):
        if self.fail:
            raise RuntimeError("no\\npicture")
        return None if self.shape is None else np.full(self.shape, len(self.taken), self.dtype)


gym.register("Strange-v0", entry_point=Strange)
"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """The id of a registered environment that its options make strange, in a module of its own."""
    name = f"strange_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}:Strange-v0"


@pytest.mark.parametrize(("env_id", "factor", "color"), [
    ("CartPole-v1", 4, True), ("Acrobot-v1", 10, False), ("Pendulum-v1", 5, True)])
def test_frames_rewards_and_endings_are_the_environments_own(env_id, factor, color):
    ours = make_env(env_id, frame_skip=2, frame_stack=3, shrink_factor=factor, color=color)
    env = gym.make(env_id, render_mode="rgb_array")
    rng, planes = np.random.default_rng(0), 3 if color else 1
    for seed in (3, 4):
        stack = ours.reset(seed)
        env.reset(seed=seed)
        seen, ended, total = [shrink(env.render(), factor, color)] * 3, False, 0.0
        assert stack.shape == (3 * planes, *ours.task.viewport // np.array(factor))
        while not ended:
            np.testing.assert_array_equal(stack, np.concatenate(seen[-3:]))
            if ours.task.continuous:
                action = rng.integers(-12, 13, 1) / 8  # numbers that float32 holds exactly
                native = np.float32(2 * np.clip(action, -1, 1))  # Pendulum's torques are between -2 and 2
            else:
                action = native = int(rng.integers(len(ours.task.actions)))
            stack, reward, terminated, truncated = ours.step(action)
            expected = 0.0
            for _ in range(2):
                _, step_reward, end, cut, _ = env.step(native)
                expected += float(step_reward)
                frame = env.render()
                if end or cut:
                    break
            seen.append(shrink(frame, factor, color))
            assert (reward, terminated, truncated) == (expected, end, cut and not end)
            total, ended = total + expected, end or cut
        assert ours.episode_return == total
        assert ours.task.outcomes[ours.outcome()] == ("terminated" if end else "time")


def test_workers_play_any_environment_and_put_it_back_where_it_was():
    settings = load_config(None, CARTPOLE).env.settings()
    envs = make_vector_env(4, 2, seed=3, **settings)
    try:
        frames, rng = [envs.reset()[0].copy()], np.random.default_rng(1)
        for _ in range(30):
            observations, rewards, terminated, truncated, info = envs.step(rng.integers(2, size=4))
            frames.append(observations.copy())
            assert (rewards == info["env_frames"]).all()  # one point a step
            if (terminated | truncated).any():
                assert set(info["episode"]) == {"return_mean", "length_mean"}
        assert frames[0].shape == (4, 12, 50, 75)
        state = [[episodes, list(actions)] for episodes, actions in envs.state]
        for _ in range(5):
            envs.step(rng.integers(2, size=4))
        np.testing.assert_array_equal(envs.restore(state), frames[-1])
    finally:
        envs.close()


def test_actions_reach_the_environment_as_it_counts_them(strange):
    settings = {"frame_skip": 2, "frame_stack": 1, "shrink_factor": 2, "color": True}
    env = make_env(strange, **settings)
    env.reset(0)
    for action in range(3):
        env.step(action)
    assert env.env.unwrapped.taken == [5, 5, 6, 6, 7, 7]
    env = make_env(strange, **settings, options={"space": "half"})
    env.reset(0)
    env.step([-1.0, 3.5])
    env.step([0.5, -7.0])
    env.step([4.0, 0.0])
    taken = env.env.unwrapped.taken[::2]
    np.testing.assert_allclose(taken, [[0, 3.5], [7.5, -7], [10, 0]])
    assert taken[0].dtype == np.float32


@pytest.mark.parametrize(("options", "told"), [
    ("env.options={shape: null}", "shows no frames: render() gives NoneType"),
    ("env.options={dtype: float32}", "shows no frames: render() gives float32 (64, 96, 3)"),
    ("env.options={shape: [64, 96]}", "shows no frames: render() gives uint8 (64, 96)"),
    ("env.options={shape: [15, 96, 3]}", "shows frames of only 96x15 pixels"),
    ("env.options={fail: true}", "cannot be made and rendered: no picture"),
    ("env.options={space: binary}", "has actions of another kind, MultiBinary(2)"),
    ("env.options={space: whole}", "has actions of another kind, Box(0, 9, (2,), int64)"),
    ("env.options={colour: red}", "cannot be made and rendered: "),
    ("env.shrink_factor=3", "env.shrink_factor=3 must be one of 1, 2, 4, which divide frames of 96x64"),
    ("model.mirror=true", "model.mirror=true needs to know what each action of"),
    ("env.gravity=-5", "env.gravity is an option of LunarLander-v3"),
    ("model.glimpses=2", "model.glimpses=2 needs model.eye=learned, which can tell several things apart; "),
    ("model.tilt=true", "model.tilt=true needs model.eye=colour, which sees the whole of a body; model.eye=none sees"),
    ("model.eye=colour", "model.glimpse=32 must be between 16 and 16, the shorter side of a frame (64 / "),
])
def test_what_cannot_be_seen_or_steered_is_refused_in_one_line(options, told, strange):
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"env.id={strange}", "model.mirror=false", "model.eye=none", options])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("override", "told"), [
    ("env.id=Nothing-v0", "env.id=Nothing-v0 cannot be made and rendered: Environment `Nothing` doesn't exist"),
    ("env.id=no_such_module:Game-v0", "No module named 'no_such_module'"),
    ("env.id=a:b:c", "env.id=a:b:c cannot be made and rendered"),
    ("env.id=CartPole", "env.id=CartPole names no version; the newest is CartPole-v1"),
    ("env.id=LunarLander", "env.id=LunarLander names no version; the newest is LunarLander-v3"),
    ("env.id=", "at least 1 character"),
    ("env.options={gravity: -5}", "env.options: of LunarLander-v3 they are keys of env: continuous, gravity"),
    ("env.options=5", "env.options=5: "),
])
def test_an_environment_that_does_not_exist_is_one_line_and_makes_no_run(override, told, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run_here(tmp_path, "--config", ROOT / "configs" / "cnn_no_tilt.yaml", override)
    assert told in ended.value.code
    assert "\n" not in ended.value.code
    assert not (tmp_path / "runs").exists()


def test_options_have_the_types_that_they_look_like():
    told = "env.options={a: 1, b: 0.5, c: true, d: null, e: 8x8, f: [1, 2.0], g: {h: 3e2}}"
    with pytest.raises(ConfigError, match="cannot be made"):
        load_config(None, ["env.id=CartPole-v1", told])
    options = load_config(None, ["env.id=FrozenLake-v1", "env.options={map_name: 8x8, is_slippery: false}",
                                 "model.mirror=false", "env.shrink_factor=8"]).env.options
    assert options == {"map_name": "8x8", "is_slippery": False}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_stopped_and_resumed_equals_the_run_that_was_never_stopped(env_id, tmp_path):
    config = ROOT / "configs" / "cnn_no_tilt.yaml"
    factor = "env.shrink_factor=20"
    words = [*TINY, *CARTPOLE, f"env.id={env_id}", factor, "tracking.mlflow=false", "ppo.total_frames=2000",
             "evaluation.selection_episodes=1", "evaluation.episodes=1"]
    run_here(tmp_path, "--config", config, "run.name=whole", *words)
    process = start(tmp_path, "--config", config, "run.name=stopped", *words, held=2)
    try:
        process.stdout.readline()
        process.send_signal(15)
        go(tmp_path, 2)
        output = output_of(process)
    finally:
        process.kill()
    assert process.returncode == 143, output
    run_here(tmp_path, "--resume", "runs/stopped")
    whole, stopped = (rows(tmp_path / "runs" / name) for name in ("whole", "stopped"))
    assert without_speed(stopped) == without_speed(whole)
    assert "rollout/landed_rate" not in whole[0]
    reports = [json.loads((tmp_path / "runs" / name / "report.json").read_text()) for name in ("whole", "stopped")]
    assert reports[0]["returns"] == reports[1]["returns"]
    assert reports[0]["env"] == {"id": env_id}
    assert "landed_rate" not in reports[0]
    assert ("solved_rate" in reports[0]) == (env_id == "CartPole-v1")  # nobody has said when Pendulum is solved
    draw_run(tmp_path / "runs" / "whole", tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")).std() > 10


def test_the_recipe_of_the_page_trains_and_is_scored(tmp_path):
    (tmp_path / "catch.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    training, scoring = re.findall(r"^python (.*)$", PAGE.split("```python")[1], re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in (f"{training} {shlex.join(TINY)} tracking.mlflow=false", f"{scoring} --episodes 5 --videos 1"):
        script, *words = shlex.split(line)
        done = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, env=environment, text=True,
                              capture_output=True, timeout=HANGS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / "catch" / "evaluation" / "report.json").read_text())
    assert set(report["returns"]) <= {-1.0, 1.0}
    assert report["env"] == {"id": "catch:Catch-v0"}
    assert list((tmp_path / "runs" / "catch" / "evaluation" / "videos").glob("*.mp4"))
    # Without its module the run cannot be resumed or scored; that is one line.
    with pytest.raises(SystemExit, match="catch:Catch-v0 cannot be made and rendered") as ended:
        evaluate.main(["--checkpoint", str(tmp_path / "runs" / "catch")])
    assert "\n" not in ended.value.code


def test_a_policy_is_scored_in_its_own_environment_and_weather_is_none_of_it(tmp_path, capsys):
    run_here(tmp_path, "--config", ROOT / "configs" / "cnn_no_tilt.yaml", "run.name=x", *TINY, *CARTPOLE,
             "env.shrink_factor=20", "ppo.total_frames=300", "tracking.mlflow=false")
    checkpoint = str(tmp_path / "runs" / "x")
    for words, told in (
            (["env.enable_wind=true"], "env.enable_wind is an option of LunarLander-v3"),
            (["env.id=Acrobot-v1"], "env.id: a policy is scored as it was trained; only env.options may differ"),
            (["--grid"], "--grid has the weathers of LunarLander-v3, not of CartPole-v1")):
        with pytest.raises(SystemExit, match=re.escape(told)):
            evaluate.main(["--checkpoint", checkpoint, *words])
    output = tmp_path / "scored"
    evaluate.main(["--checkpoint", checkpoint, "--episodes", "2", "--videos", "1", "--panel", "--output", str(output),
                   "env.options={sutton_barto_reward: true}"])
    assert "options  sutton_barto_reward True" in capsys.readouterr().out
    assert json.loads((output / "report.json").read_text())["return_max"] <= 0  # other rewards: -1 for a fall


def test_a_policy_is_not_scored_with_options_that_give_other_frames_or_actions(strange):
    config = load_config(None, [f"env.id={strange}", "model.mirror=false", "model.eye=none"])
    assert evaluate.in_weather(config, ["env.options={shape: [64, 96, 3]}"]).env.options == {"shape": [64, 96, 3]}
    for options in ("{shape: [128, 96, 3]}", "{space: half}"):
        with pytest.raises(ConfigError, match="other frames or actions than those that this policy was made for"):
            evaluate.in_weather(config, [f"env.options={options}"])


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "Pendulum-v1", "MountainCar-v0"])
def test_the_panel_shows_any_environment(env_id):
    config = load_config(None, [f"env.id={env_id}", "env.shrink_factor=10", "model.mirror=false"])
    policy, env = build_policy(config).eval(), make_env(**config.env.settings())
    policy.eye.direction.copy_(torch.tensor([0.6, 0.6, 0.5]))
    frames = env.reset(3)
    drawing, count = Panel(policy, config, "title"), len(env.task.actions)
    numbers = np.linspace(-0.5, 0.5, count) if env.task.continuous else np.full(count, 1 / count)
    drawing.decide(frames, numbers, 1.0, [0.3] if env.task.continuous else 1, 3.0, 10)
    assert [label.get_text() for label in drawing.labels] == [
        f"{number:.2f}" if env.task.continuous else f"{number:.0%}" for number in numbers]
    picture = drawing.picture(env.full_frame)
    assert picture.shape == (drawing.height, 912, 3)
