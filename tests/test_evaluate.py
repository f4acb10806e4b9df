import json
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
from matplotlib.image import imread

import evaluate
from camera import shrink
from frames import FrameStack
from machinery.checkpoint import load_policy
from machinery.video import VideoRecorder
from runs import no_room
from task import ENV_ID, LUNAR_LANDER, VIEWPORT


def run_main(*args):
    return subprocess.run(
        [sys.executable, evaluate.__file__, *map(str, args)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("weather", [{}, {"gravity": -8.0, "enable_wind": True}])
def test_report_equals_episodes_played_by_hand(weather, policy_file, tmp_path):
    """The command's score is that of a plain loop over gym.make with one render() per physics step."""
    done = run_main(
        "--checkpoint", policy_file, "--episodes", 3, "--seed", 1000007, "--videos", 1, "--output", tmp_path,
        *[f"env.{option}={json.dumps(value)}" for option, value in weather.items()])
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    policy, config, _ = load_policy(policy_file)
    returns, lengths = [], []
    for seed in range(1000007, 1000010):
        env, total, length, ended = gym.make(ENV_ID, render_mode="rgb_array", **weather), 0.0, 0, False
        env.reset(seed=seed)
        stack = FrameStack(config.env.frame_stack, (3, 100, 150))
        frames = stack.fill(shrink(env.render(), 4, True))
        while not ended:
            with torch.no_grad():
                logits = policy(*policy.preprocess_stacks(torch.from_numpy(frames)[None])).distribution.logits
            for _ in range(config.env.frame_skip):
                _, reward, terminated, truncated, _ = env.step(int(logits.argmax()))
                picture, total, length = env.render(), total + reward, length + 1
                ended = terminated or truncated
                if ended:
                    break
            frames = stack.push(shrink(picture, 4, True))
        returns.append(total)
        lengths.append(length)
    assert report["returns"] == pytest.approx(returns, abs=1e-6)
    assert report["return_mean"] == pytest.approx(np.mean(returns))
    assert report["return_std"] == pytest.approx(np.std(returns))
    assert (report["return_min"], report["return_max"]) == (min(report["returns"]), max(report["returns"]))
    assert report["length_mean"] == pytest.approx(np.mean(lengths))
    assert report["env_frames"] == sum(lengths)
    assert report["solved_rate"] == np.mean(np.array(returns) >= 200)
    assert (report["mode"], report["episodes"], report["seed"], report["policy"]) == ("greedy", 3, 1000007, "cnn")
    assert report["return_ci95"][0] <= report["return_mean"] <= report["return_ci95"][1]
    assert "return" in done.stdout
    assert report["env"] == {"id": ENV_ID} | weather
    assert ("options  gravity -8.0, enable_wind True" in done.stdout) == bool(weather)

    reader = imageio_ffmpeg.read_frames(str(tmp_path / "videos" / "seed-1000007.mp4"))
    meta = next(reader)
    assert (meta["size"], meta["fps"], meta["codec"]) == ((600, 400), 50, "h264")
    assert "yuv420p" in meta["pix_fmt"]
    frames = list(reader)
    assert len(frames) == lengths[0] + 1  # the first picture, and one per physics step
    env = gym.make(ENV_ID, render_mode="rgb_array")
    env.reset(seed=1000007)
    first = np.frombuffer(frames[0], np.uint8).reshape(400, 600, 3).astype(int)
    assert np.abs(first - env.render()).mean() < 4  # lossy, but the same picture


def test_drawn_and_rendered_landers_score_alike(policy_file):
    policy, config, _ = load_policy(policy_file)
    for sample_seed in (None, 5):
        drawn = evaluate.play(policy, config.env, range(4), sample_seed=sample_seed)
        rendered = evaluate.play(policy, config.env, range(4), sample_seed=sample_seed, rendered=True)
        for a, b in zip(drawn, rendered, strict=True):
            np.testing.assert_array_equal(a, b)


def test_sampled_episodes_repeat_and_do_not_depend_on_their_neighbours(policy_file):
    policy, config, _ = load_policy(policy_file)
    together = evaluate.play(policy, config.env, range(3), sample_seed=5)[0]
    again = evaluate.play(policy, config.env, range(3), sample_seed=5)[0]
    alone = [evaluate.play(policy, config.env, [seed], sample_seed=5)[0][0] for seed in range(3)]
    other = evaluate.play(policy, config.env, range(3), sample_seed=6)[0]
    assert together.tolist() == again.tolist() == alone != other.tolist()


def test_confidence_interval_of_a_known_case():
    rng = np.random.default_rng(0)
    low, high = evaluate.confidence_interval(rng.normal(10, 2, 400))
    assert low == pytest.approx(10 - 1.96 * 0.1, abs=0.15)
    assert high == pytest.approx(10 + 1.96 * 0.1, abs=0.15)
    assert evaluate.confidence_interval([5.0, 5.0]) == [5, 5]


def test_no_encoder_outlives_its_episode(tmp_path):
    """Each takes a hundred megabytes; of an evaluation with many videos only a few may live at once."""
    frame = np.zeros((*VIEWPORT, 3), np.uint8)
    lander = SimpleNamespace(on_frame=None, task=LUNAR_LANDER[False])
    with VideoRecorder(tmp_path, 3, 0) as recorder:
        for index in range(3):
            recorder.begin(index, lander)
            for _ in range(3):
                lander.on_frame(frame)
            recorder.end(index, lander)
            assert [child for child in psutil.Process().children() if "ffmpeg" in child.name()] == []
    assert recorder.failure is None
    assert len(list(tmp_path.glob("*.mp4"))) == 3


def test_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^evaluate\.py: .*nowhere") as ended:
        evaluate.main(["--checkpoint", str(tmp_path / "nowhere")])
    assert "\n" not in ended.value.code


def test_no_encoder_costs_the_videos_not_the_score(policy_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    policy, config, file = load_policy(policy_file)
    report = evaluate.evaluate(policy, config, file, tmp_path, episodes=2, videos=2)
    assert len(report["returns"]) == 2
    assert (tmp_path / "report.json").exists()
    assert "no videos" in capsys.readouterr().err


def test_full_disk_costs_neither_score_nor_a_word(policy_file, tmp_path, capsys):
    policy, config, file = load_policy(policy_file)
    with no_room(5000):  # enough for a report
        evaluate.evaluate(policy, config, file, tmp_path, episodes=1, videos=1)
    assert "no videos" in capsys.readouterr().err
    assert (tmp_path / "report.json").exists()
    assert list((tmp_path / "videos").iterdir()) == []  # nothing that does not play
    with no_room(), pytest.raises(OSError, match=r"File too large: .*again/report\.json"):
        evaluate.evaluate(policy, config, file, tmp_path / "again", episodes=1)
    assert "95% interval of the mean" in capsys.readouterr().out
    assert list((tmp_path / "again").iterdir()) == []


def test_the_grid_is_what_single_weathers_give(policy_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "GRAVITIES", [-4.0, -10.0])
    monkeypatch.setattr(evaluate, "WINDS", [0.0, 20.0])
    evaluate.main(["--checkpoint", str(policy_file), "--grid", "--episodes", "2", "--output", str(tmp_path)])
    grid = json.loads((tmp_path / "grid.json").read_text())
    assert imread(tmp_path / "grid.png").shape[:2] == (450, 1300)
    policy, config, file = load_policy(policy_file)
    for row, gravity in enumerate([-4.0, -10.0]):
        for column, wind in enumerate([0.0, 20.0]):
            weather = [f"env.gravity={gravity}", f"env.enable_wind={json.dumps(wind > 0)}", f"env.wind_power={wind}",
                       f"env.turbulence_power={wind / 10}"]
            report = evaluate.evaluate(policy, evaluate.in_weather(config, weather), file, tmp_path, episodes=2)
            assert grid["return_mean"][row][column] == report["return_mean"]
            assert grid["landed_rate"][row][column] == report["landed_rate"]
    assert f"| -4 | {grid['return_mean'][0][0]:.0f}, 0% | " in capsys.readouterr().out


@pytest.mark.parametrize(("override", "told"), [
    ("env.frame_stack=3", "env.frame_stack: a policy is scored as it was trained; only env.gravity, env.enable_wind"),
    ("ppo.gamma=0.5", "ppo.gamma: a policy is scored as it was trained"), ("env.wind_power=50", "between 0 and 20"),
    ("env.wind_power=20", "env.wind_power: there is no wind without env.enable_wind=true"),
    ("env.gravty=-8", "did you mean env.gravity")])
def test_only_the_weather_may_differ_from_training(override, told, policy_file):
    with pytest.raises(SystemExit, match=f"^evaluate.py: .*{told}") as error:
        evaluate.main(["--checkpoint", str(policy_file), override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["--episodes=0", "--episodes=1e3", "--seed=-1", f"--seed={10**30}", "--videos=x"])
def test_numbers_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([option])
    assert "must be a whole number from" in capsys.readouterr().err
