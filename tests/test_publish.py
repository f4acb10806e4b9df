"""What results/ ships is whole, and says what its own files say."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from evaluate import confidence_interval, play
from machinery import publish
from machinery.checkpoint import build_policy, load_policy, policy_bytes, save_checkpoint
from machinery.config import load_config
from task import EVALUATION_SEED

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.parent for path in (ROOT / "results").glob("*/report.json"))


def test_there_is_a_shipped_cnn():
    assert ROOT / "results" / "cnn" in SHIPPED


def test_readme_shows_the_table_of_results():
    readme, found = (ROOT / "README.md").read_text(), [publish.facts(folder) for folder in SHIPPED]
    assert f"{publish.BEGIN}\n{publish.table(found)}\n{publish.END}" in readme


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_result_is_whole_and_consistent(folder):
    _, config, _ = load_policy(folder)
    assert config == load_config(folder / "config.yaml")
    assert config.model == load_config(ROOT / "configs" / f"{folder.name}.yaml").model
    for name in ("report.json", "report_sampled.json"):
        report = json.loads((folder / name).read_text())
        assert len(report["returns"]) == report["episodes"] == 100
        assert report["seed"] == EVALUATION_SEED
        assert report["return_mean"] == pytest.approx(np.mean(report["returns"]))
        assert report["return_ci95"] == pytest.approx(confidence_interval(report["returns"]))
    assert {"curves.png", "landing.gif", "landing.mp4", "machine.json", "metrics.csv", "README.md"} <= {
        path.name for path in folder.iterdir()}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_policy_lands(folder):
    policy, config, _ = load_policy(folder)
    returns, _, _ = play(policy, config.env, range(EVALUATION_SEED, EVALUATION_SEED + 8))
    assert returns.mean() > config.env.task.solved - 50


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_code_on_the_result_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, str(folder / "README.md"), "exec"), {})
    assert float(capsys.readouterr().out) > -1000


@pytest.fixture
def run(tmp_path):
    """The folder of the run that the shipped CNN comes from."""
    run = tmp_path / "runs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    source = ROOT / "results" / "cnn"
    for name in publish.FILES:
        shutil.copy(source / name, run)
    shutil.copy(source / "policy.safetensors", run / "checkpoints")
    frames = load_config(run / "config.yaml").ppo.total_frames
    state = {"counters": {"env_frames": frames, "scored": 100}}
    save_checkpoint(run / "checkpoints" / f"{frames:012d}.ckpt", state)
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A place to publish in that is not this one."""
    here = tmp_path / "product"
    (here / "results").mkdir(parents=True)
    monkeypatch.setattr(publish, "HERE", here)
    return here


def test_publishing_a_run_makes_its_page(run, here):
    source = ROOT / "results" / "cnn"
    (here / "README.md").write_text(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    (here / "results" / "cnn").mkdir()
    (here / "results" / "cnn" / "yardstick.json").write_text("of the result that was here before")
    publish.main([str(run), "cnn"])
    assert (here / "results" / "cnn" / "README.md").read_text() == (source / "README.md").read_text()
    readme = (here / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    assert "[cnn](results/cnn)" in readme
    made = {path.name: path.stat().st_size for path in (here / "results" / "cnn").iterdir()}
    assert min(made[name] for name in ("curves.png", "landing.gif", "landing.mp4")) > 10_000  # bytes


def save_policy_of(run, *overrides):
    config = load_config(None, overrides)
    (run / "checkpoints" / "policy.safetensors").write_bytes(policy_bytes(build_policy(config), config, 0))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda run: shutil.rmtree(run / "checkpoints"), "no policy.safetensors there"),
    (lambda run: (run / "report.json").unlink(), "No such file"),
    (lambda run: (run / "report.json").write_text("{"), "not JSON"),
    (lambda run: (run / "report_sampled.json").write_text("{}"), "report_sampled.json: lacks some of episodes"),
    (lambda run: (run / "report.json").write_text((run / "report.json").read_text().replace("100,", "10,", 1)),
     "scored over 100 episodes"),
    (lambda run: (run / "metrics.csv").write_text("frames\n"), "not the metrics of a run"),
    (lambda run: (run / "config.yaml").write_text("ppo:\n  total_frames: 9000000\n"), "not trained and scored"),
    (lambda run: next(run.glob("checkpoints/*.ckpt")).unlink(), "no checkpoint there"),
    (lambda run: save_policy_of(run, "env.id=Pendulum-v1", "model.mirror=false"), "when Pendulum-v1 is solved"),
])
def test_run_that_cannot_be_published_is_one_line_and_replaces_nothing(damage, message, run, here):
    damage(run)
    with pytest.raises(SystemExit, match=rf"publish\.py: .*{message}") as error:
        publish.main([str(run), "cnn"])
    assert "\n" not in str(error.value)
    assert list((here / "results").iterdir()) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"episodes": 10}, "scored over 100 episodes from seed 1000000 on"),
    ({"env": {"id": "CartPole-v1"}}, "was measured in another environment"), (None, "No such file")])
def test_a_yardstick_of_something_else_is_refused_before_anything_is_replaced(change, message, run, here):
    stick = run.parent / "stick"
    stick.mkdir()
    if change:
        report = json.loads((run / "report.json").read_text()) | {"policy": "state vector"} | change
        (stick / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match=rf"publish\.py: .*{message}"):
        publish.main([str(run), "cnn", "--yardstick", str(stick)])
    assert list((here / "results").iterdir()) == []


def test_the_command_on_a_page_trains_the_same_again():
    overrides = ["ppo.late_return=null", "model.mirror=false", "run.device=cuda:0", "run.seed=7"]
    words = shlex.split(publish.command(load_config(ROOT / "configs" / "cnn.yaml", overrides), "cnn"))
    assert words[:4] == ["python", "train.py", "--config", "configs/cnn.yaml"]
    assert load_config(ROOT / words[3], words[4:]) == load_config(ROOT / "configs" / "cnn.yaml", overrides)


def test_readme_without_its_marks_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"before\n{publish.BEGIN}\nafter\n")
    monkeypatch.setattr(publish, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="has no place for the table"):
        publish.main([])
    assert (tmp_path / "README.md").read_text() == f"before\n{publish.BEGIN}\nafter\n"
