"""Sweeps of tiny real runs."""

import os
import signal
import subprocess
import sys

import mlflow
import numpy as np
import psutil
import pytest

import sweep
from machinery.checkpoint import save_checkpoint, save_config
from machinery.run_folder import resume_config
from machinery.tracking import Metrics
from plot import NEEDED, reached
from runs import CONFIG, HANGS, ROOT, TINY, output_of, rows, wait_for_rows

SWEEP = [sys.executable, ROOT / "sweep.py", "--config", CONFIG, "--name", "s", "--jobs", "2"]
SETTINGS = [*TINY, "ppo.num_steps=16", "env.num_workers=1", "evaluation.episodes=1", "evaluation.videos=0"]


def start(folder, *args):
    return subprocess.Popen(
        list(map(str, [*SWEEP, *args])), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_sweep_is_stopped_and_goes_on_and_is_one_family_in_mlflow(tmp_path, monkeypatch, capsys):
    command = ["--seeds", "1", "2", "ppo.learning_rate=1e-3", *SETTINGS, "ppo.total_frames=4000"]
    process = start(tmp_path, *command)
    folders = [tmp_path / "runs" / f"s-seed-{seed}" for seed in (1, 2)]
    for folder in folders:
        wait_for_rows(process, folder, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    output = output_of(process)
    assert process.returncode == 130, output
    assert psutil.wait_procs(children, timeout=HANGS)[1] == []
    assert "Traceback" not in output
    stopped = [rows(folder) for folder in folders]
    for folder, table in zip(folders, stopped, strict=True):
        assert "SIGINT: saved" in (folder / "train.log").read_text()
        assert int(table[-1]["frames"]) < 4000

    monkeypatch.chdir(tmp_path)
    again = list(map(str, [*SWEEP[2:], *command]))
    sweep.main(again)
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.startswith("| s | 2 | 0 | - | - |")]
    assert "python plot.py s=runs/s-seed-1,runs/s-seed-2" in output
    for folder, table in zip(folders, stopped, strict=True):
        assert f"runs/{folder.name}: goes on" in output
        assert rows(folder)[: len(table)] == table

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("lunar-lander").experiment_id])
    (parent,) = (run for run in found if run.data.tags.get("sweep") == "s")
    family = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in family} == {"s-seed-1", "s-seed-2"}
    assert {run.info.status for run in found} == {"FINISHED"}

    times = [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]
    again.append("tracking.mlflow=false")
    sweep.main(again)
    assert capsys.readouterr().out.count("done before") == 2
    assert times == [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]
    told = r"runs/s-seed-1 is another run: ppo\.gamma was 0\.996, asked for 0\.5; choose"
    with pytest.raises(SystemExit, match=told):
        sweep.main([*again, "ppo.gamma=0.5"])


def test_every_combination_is_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = sweep.plan(
        CONFIG, "n", ["1", "2"], ["ppo.learning_rate=1e-3,5e-4", "ppo.gamma=0.9", "model.mirror=true,false"])
    assert len(jobs) == len({job.folder for job in jobs}) == 8
    assert {(j.config.run.seed, j.config.ppo.learning_rate, j.config.model.mirror) for j in jobs} == {
        (seed, rate, mirror) for seed in (1, 2) for rate in (1e-3, 5e-4) for mirror in (True, False)}
    assert {job.config.ppo.gamma for job in jobs} == {0.9}
    assert jobs[0].folder.name == "n-learning_rate-1e-3-mirror-true-seed-1"
    assert jobs[0].setting == "learning_rate=1e-3 mirror=true"


def test_the_summary_tells_when_200_was_reached_and_does_without_a_damaged_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jobs = sweep.plan(CONFIG, "n", ["1", "2", "3"], ["ppo.total_frames=3000000", "evaluation.episodes=0"])
    for job, returns in zip(jobs, ([0, 210, 190], [0, 150, 200], [0, 100, 190]), strict=True):
        job.folder.mkdir(parents=True)
        metrics = Metrics(job.folder / "metrics.csv")
        for i, value in enumerate(returns):
            metrics.append(dict.fromkeys(NEEDED, 0) | {
                "frames": (i + 1) * 1_000_000, "rollout/return_mean": value, "speed/total_seconds": 60 * (i + 1)})
        (job.folder / "checkpoints").mkdir()
        counters = {"env_frames": 3_000_000, "scored": 0}
        save_checkpoint(job.folder / "checkpoints" / "000003000000.ckpt", {"counters": counters})
    assert sweep.summary(jobs).splitlines()[-1] == "| n | 3 | 2 | 2.50 (2.00 to 3.00) | 2.5 (2.0 to 3.0) | - |"
    (jobs[0].folder / "metrics.csv").write_text("frames\n")
    assert sweep.summary(jobs).splitlines()[-1] == "| n | 3 | 1 | 3.00 | 3.0 | - |"
    assert capsys.readouterr().err.startswith("runs/n-seed-1: ")


def test_a_run_goes_on_with_what_its_file_says_now(tmp_path, monkeypatch):
    """What may change in a begun run may change in the YAML file as well as on the command line."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text("ppo:\n  total_frames: 1000\n")
    (before,) = sweep.plan(file, "n", ["1"], [])
    (before.folder / "checkpoints").mkdir(parents=True)
    (before.folder / "checkpoints" / "000000001000.ckpt").touch()
    save_config(before.config, before.folder / "config.yaml")
    file.write_text("ppo:\n  total_frames: 2000\n")
    (job,) = sweep.plan(file, "n", ["1"], ["tracking.uri=sqlite:///a b.db"])
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.extend(command))
    job.start("parent", own_log=False)
    assert started[2:4] == ["--resume", str(job.folder)]
    config = resume_config(before.config.model_dump(mode="json"), started[4:])
    assert config.ppo.total_frames == 2000
    assert config.tracking.uri == "sqlite:///a b.db"
    assert config.tracking.parent == "parent"


def test_reached():
    metrics = {"frames": np.array([1, 2, 3]), "rollout/return_mean": np.array([np.nan, 250, 100]),
               "speed/total_seconds": np.array([5, 6, 7])}
    assert reached(metrics, 200) == (2, 6)
    assert reached(metrics, None) is None
    assert reached(metrics, 300) is None


def test_a_store_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(SystemExit, match=r"^sweep.py: MLflow store .* cannot be used: .*"):
        sweep.main(["--config", str(CONFIG), "tracking.uri=sqlite:///folder.db"])


def test_output_that_nobody_takes_costs_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        list(map(str, [*SWEEP, "tracking.mlflow=false", *SETTINGS])), cwd=tmp_path, stdout=writer, stderr=writer,
        timeout=HANGS, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "runs" / "s-seed-1" / "report_sampled.json").exists()


@pytest.mark.parametrize(("args", "expected"), [
    (["run.seed=1,2"], "use --seeds"), (["ppo.gama=1,2"], "ppo.gamma"), (["--seeds", "one"], "run.seed='one'"),
    (["--jobs", "0"], "must be 1 or more"), (["--seeds", "ppo.gamma=0.9"], "must name one or more"),
    (["ppo.gamma=0.9,0.9"], "two runs of this sweep would have this name"),
    (["ppo.gamma=0.9,0.90"], "gamma-0.90-seed-1: would be .*gamma-0.9-seed-1 once more"),
    (["ppo.late_return"], "'ppo.late_return': an override is written section.key=value"),
    (["--seeds", "1", "01"], "seed-01: would be .*seed-1 once more"),
    (["ppo.gamma=0.9,0.95", "ppo.gamma=0.9"], "ppo.gamma: is given twice")])
def test_mistakes_are_one_line_before_anything_starts(args, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^sweep.py: .*{expected}"):
        sweep.main(["--config", str(CONFIG), *args])
    assert list(tmp_path.iterdir()) == []
