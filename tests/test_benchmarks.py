"""Scripts under benchmarks/ take too long for a test; that each starts, and that the yardstick trains, is tested."""

import json
import runpy
import subprocess
import sys

import pytest

from plot import read_metrics
from runs import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_starts(script, tmp_path, monkeypatch, capsys):
    """As `python SCRIPT --help` would start it in any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
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
