"""Scripts under benchmarks/ take too long for a test; that each starts, and that the yardstick trains, is tested."""

import json
import re
import runpy
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.image import imread

from models import POLICIES
from plot import read_metrics
from runs import BARE, ROOT, TINY, begun

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_starts(script, tmp_path, monkeypatch, capsys):
    """As `python SCRIPT --help` would start it in any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with patch.dict(POLICIES), pytest.raises(SystemExit) as ended:  # one of them adds a policy of its own
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_yardstick_trains(tmp_path):
    code = (
        "import sys, pathlib; sys.path[:0] = sys.argv[1:3]\n"
        "from machinery.config import load_config; from yardstick import make_state_env, score, train\n"
        "config = load_config(None, ['ppo.total_frames=3000', 'env.num_envs=4', 'ppo.num_steps=64'])\n"
        "policy = train(config, 2, pathlib.Path(sys.argv[3]))\n"
        "print(score(policy, make_state_env(states=2, **config.env.settings()), episodes=2)['returns'])\n")
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT, ROOT / "benchmarks", tmp_path], check=True, capture_output=True, text=True)
    returns = json.loads(done.stdout)
    assert len(returns) == 2
    assert max(returns) < 300
    table = read_metrics(tmp_path)
    assert table["frames"][-1] >= 3000
    assert -2000 < table["rollout/return_mean"][-1] < 300
    assert table["update/approx_kl"].max() > 0  # the policy has changed


@pytest.fixture
def readout(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readout

    for name, number in (("FITTED", 4), ("MEASURED", 2), ("LONGEST", 25)):
        monkeypatch.setattr(readout, name, number)
    return readout


def test_what_a_line_through_features_tells(readout):
    rng = np.random.default_rng(0)
    state, noise = rng.normal(size=(400, 3)), rng.normal(size=(400, 5))
    features = np.concatenate([state[:, :1] + 2 * state[:, 1:2], state[:, 1:2] - 3, noise], 1)
    r2 = readout.explained(features, state, np.arange(300), np.arange(300, 400))
    assert r2[:2] == pytest.approx([1, 1], abs=1e-3)
    assert r2[2] < 0.05  # nothing in the features tells it
    weights, intercept = readout.ridge(features, state, 1e-9)
    assert features @ weights[:, :2] + intercept[:2] == pytest.approx(state[:, :2], abs=1e-4)


def test_readout_of_policies_in_two_worlds_and_over_training(readout, tmp_path, capsys):
    readout.main([str(ROOT / "results" / name) for name in ("cnn", "cartpole")])
    header, _, lander, other, _, cart = capsys.readouterr().out.splitlines()
    assert header == "| policy | x | y | speed x | speed y | angle | spin |"
    assert other == "| policy | state 0 | state 1 | state 2 | state 3 |"
    x, y = map(float, lander.split(" | ")[1:3])
    assert y > 0.5  # the policy knows how high it is
    assert x > 0.2  # and on which side, since what it sees in a mirror counts as that
    assert cart.count("|") == 6
    with begun(tmp_path, [*TINY, *BARE]) as run:
        for frames in (1000, 2000):
            run.trainer.counters["env_frames"] = frames
            run.last_snapshot = run.snapshot()
            run.save()
        files = sorted(str(tmp_path / file) for file in run.folder.glob("checkpoints/*.ckpt"))
    readout.main([*files, "--plot", str(tmp_path / "readout.png")])
    assert imread(tmp_path / "readout.png").shape == (450, 800, 4)
    with pytest.raises(SystemExit, match=r"^readout.py: --plot: only \.ckpt files"):
        readout.main([str(ROOT / "results" / "cnn"), "--plot", "x.png"])


def test_points_are_accounted_for(monkeypatch, capsys):
    """The fuel, which is what the other parts leave over, is what the engines burned."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import points

    lander, rng, burns = points.Accounted(4, 4, 4, True), np.random.default_rng(0), (0, 0.03, 0.3, 0.03)
    for seed in range(3):
        lander.reset(seed)
        burned, ended = 0.0, False
        while not ended:
            action, before = int(rng.integers(4)), lander.episode_length
            _, _, terminated, truncated = lander.step(action)
            ended = terminated or truncated
            burned += burns[action] * (lander.episode_length - before - terminated)
        account = dict(zip(points.COLUMNS, lander.account(), strict=True))
        assert account["fuel"] == pytest.approx(-burned, abs=1e-3)
        assert sum(account.values()) == pytest.approx(lander.episode_return)
        assert account["bonus"] == (-100 if terminated else 0)
    points.main([str(ROOT / "results" / "cnn"), "--episodes", "3"])
    assert re.search(r"^\| all \| 100\.0% \| \d{3} \|", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit, match=r"^points\.py: .*cartpole: a policy of CartPole-v1"):
        points.main([str(ROOT / "results" / "cartpole")])
