"""Real training runs, end to end, from the command line."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from machinery.checkpoint import load_checkpoint, trained_frames
from machinery.config import load_config
from runs import (
    BARE,
    CONFIG,
    HANGS,
    ROOT,
    TINY,
    begun,
    go,
    only_run,
    output_of,
    refused,
    rows,
    run,
    run_here,
    start,
    wait_for_rows,
    wait_until_held,
    without_speed,
    workers_of,
)
from train import Trainer


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A short run that nothing disturbed, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("a run")
    done = run(folder, "--config", CONFIG, "run.name=whole", *TINY)
    return folder, done


def test_a_run_leaves_its_files(whole_run):
    folder, done = whole_run
    here = folder / "runs" / "whole"
    assert {"config.yaml", "checkpoints", "videos", "report.json", "report_sampled.json", "metrics.csv"} <= {
        p.name for p in here.iterdir()}
    assert len(list((here / "checkpoints").glob("*.ckpt"))) == 2
    assert json.loads((here / "report.json").read_text())["mode"] == "greedy"
    assert json.loads((here / "report_sampled.json").read_text())["mode"] == "sampled"
    assert len(list((here / "videos").glob("*.mp4"))) == 1
    assert "M frames" in done.stdout
    assert "\r" not in done.stdout + done.stderr  # plain lines where the output is a file


def test_mlflow_has_what_the_csv_has(whole_run):
    folder, _ = whole_run
    client, found = only_run(folder)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "whole"
    assert found.data.params["ppo.total_frames"] == "3000"
    assert {"git_commit", "machine", "version.torch"} <= set(found.data.tags)
    table = rows(folder / "runs" / "whole")
    for key in table[0]:
        if key == "frames":
            continue
        history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, key)}
        expected = {int(row["frames"]): float(row[key]) for row in table if row[key] != "nan"}
        assert history == pytest.approx(expected), key
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "metrics.csv", "report.json", "checkpoints", "videos"} <= artifacts


def test_same_seed_same_numbers(whole_run, tmp_path):
    folder, _ = whole_run
    run_here(tmp_path, "--config", CONFIG, "run.name=again", "tracking.mlflow=false", *TINY)
    assert without_speed(rows(tmp_path / "runs" / "again")) == without_speed(rows(folder / "runs" / "whole"))


@pytest.mark.parametrize(("number", "whole_group"), [
    (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_resumed_run_equals_the_run_that_was_never_stopped(number, whole_group, whole_run, tmp_path):
    folder, _ = whole_run
    here = tmp_path / "runs" / "stopped"
    process = start(tmp_path, "--config", CONFIG, "run.name=stopped", *TINY, held=3)
    wait_until_held(process, tmp_path, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    go(tmp_path, 3)
    output = output_of(process)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output
        assert "--resume" in output
        assert only_run(tmp_path)[1].info.status == "KILLED"
    assert psutil.wait_procs(children, timeout=HANGS)[1] == []  # no worker is left behind

    run_here(tmp_path, "--resume", "latest")
    assert without_speed(rows(here)) == without_speed(rows(folder / "runs" / "whole"))
    resumed, whole = load_checkpoint(here), load_checkpoint(folder / "runs" / "whole")
    assert resumed["landers"] == whole["landers"]
    for key, tensor in whole["policy"].items():
        assert torch.equal(resumed["policy"][key], tensor), key
    client, found = only_run(tmp_path)
    assert found.info.status == "FINISHED"
    steps = sorted(m.step for m in client.get_metric_history(found.info.run_id, "update/entropy"))
    assert steps == [int(row["frames"]) for row in rows(here)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_worker_is_replaced_and_changes_nothing(number, whole_run, tmp_path):
    folder, _ = whole_run
    process = start(tmp_path, "--config", CONFIG, "run.name=hurt", "tracking.mlflow=false", *TINY, held=2)
    wait_until_held(process, tmp_path, 2)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[0].send_signal(number)
    go(tmp_path, 2)
    output = output_of(process)
    assert process.returncode == 0, output
    assert re.search(rf"worker \d died, exit code -{int(number)}; going on with new workers", output)
    assert without_speed(rows(tmp_path / "runs" / "hurt")) == without_speed(rows(folder / "runs" / "whole"))


@pytest.mark.parametrize(("args", "expected"), [
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--config", CONFIG, "ppo.gama=1"], "ppo.gamma"),
    (["--resume", "latest"], "no run under runs/"),
    (["--resume", "runs/nothing"], "runs/nothing"),
])
def test_mistakes_are_one_line_before_anything_starts(args, expected, tmp_path):
    assert expected in refused(tmp_path, *args)
    assert list(tmp_path.iterdir()) == []


def test_a_goal_lowered_before_the_first_score_is_scored_too(tmp_path):
    here = tmp_path / "runs" / "x"
    process = start(tmp_path, "--config", CONFIG, "run.name=x", "tracking.mlflow=false", *TINY,
                    "ppo.total_frames=1000000", "evaluation.interval=1000000")
    wait_for_rows(process, here, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANGS)
    run_here(tmp_path, "--resume", "latest", "ppo.total_frames=500")
    assert json.loads((here / "report.json").read_text())["episodes"] == 2


def test_frames_that_show_nothing_moving_are_one_line(tmp_path):
    assert "nothing moves" in refused(
        tmp_path, "--config", CONFIG, "tracking.mlflow=false", *TINY, "env.num_envs=2", "env.frame_skip=1",
        "env.shrink_factor=25", "model.glimpse=16", "run.seed=1")


def test_existing_run_is_not_overwritten(whole_run):
    folder, _ = whole_run
    assert "runs/whole" in refused(folder, "--config", CONFIG, "run.name=whole")


def test_continuous_engines_in_wind_stopped_and_resumed_equal_the_run_that_was_never_stopped(tmp_path):
    """With an eye that learns, in gray."""
    settings = ["--config", CONFIG, *TINY, "tracking.mlflow=false", "env.continuous=true", "env.enable_wind=true",
                "env.gravity=[-12,-8]", "env.color=false", "env.shrink_factor=10", "model.eye=learned",
                "model.tilt=false", "model.glimpse=16"]
    run_here(tmp_path, *settings, "run.name=whole")
    process = start(tmp_path, *settings, "run.name=stopped", held=3)
    wait_until_held(process, tmp_path, 3)
    process.terminate()
    go(tmp_path, 3)
    output = output_of(process)
    assert process.returncode == 143, output
    run_here(tmp_path, "--resume", "runs/stopped")
    whole, stopped = (rows(tmp_path / "runs" / name) for name in ("whole", "stopped"))
    assert without_speed(stopped) == without_speed(whole)
    assert all(float(row["update/eye_loss"]) != 0 for row in whole)
    report = json.loads((tmp_path / "runs" / "stopped" / "report.json").read_text())
    assert report["env"] == {"id": "LunarLander-v3", "continuous": True, "enable_wind": True, "gravity": [-12, -8]}
    assert report["returns"] == json.loads((tmp_path / "runs" / "whole" / "report.json").read_text())["returns"]


def test_learning_shows_in_a_minute(tmp_path):
    """The first part of a real run of the quick config: the return rises above that of random play, about -180."""
    run_here(tmp_path, "--config", ROOT / "configs/quick.yaml", "run.name=quick", "tracking.mlflow=false",
             "evaluation.episodes=0", "ppo.total_frames=60_000")
    table = rows(tmp_path / "runs" / "quick")
    first, last = float(table[2]["rollout/return_mean"]), float(table[-1]["rollout/return_mean"])
    assert first < -100
    assert last > first + 50


def test_the_late_stage_begins_with_a_hundred_good_episodes_and_stays(tmp_path):
    config = load_config(CONFIG, [*TINY, "ppo.late_return=180", "ppo.late_learning_rate=0.5", "ppo.anneal=0"])
    trainer = Trainer(config)
    try:
        seen = []
        for good, episodes in ((250, 90), (-500, 100), (250, 100), (-500, 100), (-500, 100)):
            trainer.recent.clear()
            trainer.recent.extend([{"return_mean": good, "length_mean": 100, "landed_rate": 1.0}] * episodes)
            seen.append(trainer.iterate()["schedule/learning_rate"])
    finally:
        trainer.close()
    usual = config.ppo.learning_rate
    assert seen == pytest.approx([usual, usual, usual, usual / 2, usual / 2])


def test_a_run_that_goes_on_is_scored_as_often_as_it_now_says(tmp_path, monkeypatch):
    """After the score at the end of training, and with another evaluation.interval."""
    monkeypatch.setattr("runs.play", lambda *_, **__: (np.zeros(1), None, np.zeros(1)))
    with begun(tmp_path, [*TINY, *BARE, "evaluation.interval=1000", "ppo.total_frames=1500"]) as run:
        for frames, following in ((900, 1000), (1010, 2000), (1500, 2000)):
            run.trainer.counters["env_frames"] = frames
            run.score_candidate({})
            assert run.counters["next_evaluation"] == following
        state = run.snapshot()
    for interval, following in ((1000, 2000), (100, 1600)):
        run.config = load_config(CONFIG, [*TINY, f"evaluation.interval={interval}"])
        run.start_or_resume(state)
        assert run.counters["next_evaluation"] == following


def test_of_policies_that_score_about_alike_the_newest_is_kept(tmp_path, monkeypatch):
    """A standard error of 10 is allowed for, but only once: the highest score stays what others are held against."""
    scores = ((100, True), (91, True), (89, False), (150, True), (139, False), (142, True), (139, False))
    now = {}
    monkeypatch.setattr("runs.play", lambda *_, **__: (now["score"] + np.array([-20, 20, -20, 20]), None, np.zeros(4)))
    with begun(tmp_path, [*TINY, *BARE, "evaluation.interval=1"]) as run:
        for frames, (now["score"], kept) in enumerate(scores, 1):
            run.trainer.counters["env_frames"] = frames
            run.score_candidate({})
            assert (trained_frames(run.folder / "checkpoints" / "policy.safetensors") == frames) == kept, frames


def test_freed_memory_is_kept_for_the_next_minibatch():
    faults = """
import resource, torch
from machinery.device import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def minibatch():
    [torch.ones(2**22) for _ in range(4)]  # 64 MiB, freed at once
for _ in range(3):
    minibatch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    minibatch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", faults], cwd=ROOT, capture_output=True, text=True, check=True)
    # Pages that the kernel had to clear. One minibatch has 16,384 of them; by itself, glibc has most of ten cleared.
    assert int(done.stdout) < 16_384
