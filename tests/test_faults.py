"""What goes wrong around a run: each fault happens for real, and what the user sees and keeps is checked."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest
import torch
import torchvision
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

import train
from machinery.checkpoint import load_checkpoint, load_policy
from machinery.config import load_config
from machinery.signals import Interrupted
from machinery.tracking import Tracker, TrackingError
from runs import (
    BARE,
    CONFIG,
    HANGS,
    TINY,
    begun,
    command,
    go,
    no_room,
    only_run,
    output_of,
    refused,
    rows,
    run,
    run_here,
    start,
    wait,
    wait_for_rows,
    wait_until_held,
    workers_of,
)

UNLIMITED = (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY)


@pytest.mark.parametrize("lifted", [True, False])
def test_full_disk(lifted, tmp_path):
    """A limit on the size of files stands in for the disk: checkpoints no longer fit, metrics.csv does."""
    here = tmp_path / "runs" / "full"
    process = start(tmp_path, "--config", CONFIG, "run.name=full", *TINY, *BARE, "ppo.total_frames=6000", held="3,6")
    wait_until_held(process, tmp_path, 3)
    process_limits = psutil.Process(process.pid)
    process_limits.rlimit(psutil.RLIMIT_FSIZE, (100_000, psutil.RLIM_INFINITY))
    go(tmp_path, 3)
    wait_until_held(process, tmp_path, 6)
    if lifted:
        process_limits.rlimit(psutil.RLIMIT_FSIZE, UNLIMITED)
    go(tmp_path, 6)
    output = output_of(process)
    assert "checkpoint not saved (File too large); training goes on and will try again" in output
    assert "Traceback" not in output
    state = load_checkpoint(here, pytest.fail)  # every file that is there is good
    assert not [path for path in here.rglob("*") if path.name.endswith(".tmp")]
    if lifted:
        assert process.returncode == 0
        assert state["counters"]["env_frames"] >= 6000
    else:
        assert process.returncode == 1
        assert "the last checkpoint could not be saved (File too large)" in output.splitlines()[-1]
        assert state["counters"]["env_frames"] < 6000
        run_here(tmp_path, "--resume", "latest")  # once there is room
        assert load_checkpoint(here)["counters"]["env_frames"] >= 6000
    assert [int(row["frames"]) for row in rows(here)] == sorted({int(row["frames"]) for row in rows(here)})


def test_disk_that_is_full_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with no_room(300_000), pytest.raises(  # the frames that workers share fit, a checkpoint does not
            SystemExit, match=r"^train\.py: runs/x/checkpoints: File too large; nothing is trained before that$"):
        train.main(["--config", str(CONFIG), "run.name=x", *TINY, *BARE, "env.shrink_factor=8", "model.channels=32"])
    assert list((tmp_path / "runs" / "x" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "runs" / "x" / "metrics.csv").exists()


def test_interrupt_during_the_start(tmp_path):
    """While torch is loaded, there is only a process to end; later, workers that are loading must not complain."""
    def loads_torch(process):
        return any("libtorch" in library.path for library in psutil.Process(process.pid).memory_maps())

    for loaded in (loads_torch, lambda process: psutil.Process(process.pid).children()):
        process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, *BARE)
        time.sleep(0.5)
        wait(process, lambda loaded=loaded, process=process: loaded(process))
        time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        output = output_of(process)
        assert process.returncode in (130, -signal.SIGINT), output
        assert "Traceback" not in output
        assert psutil.wait_procs(children, timeout=HANGS)[1] == []


def test_final_score_that_is_stopped_or_killed_is_done_again(tmp_path, capsys):
    here, long = tmp_path / "runs" / "x", "evaluation.episodes=20000"
    process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, "evaluation.videos=0", long)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        wait(process, (here / "curves.png").exists)
        time.sleep(0.5)
        (here / "curves.png").unlink()
        table = rows(here)
        process.send_signal(number)
        output = output_of(process)
        assert process.returncode == code, output
        assert "Traceback" not in output
        assert not (here / "report.json").exists()
        if number == signal.SIGTERM:
            assert only_run(tmp_path)[1].info.status == "KILLED"
            process = start(tmp_path, "--resume", "latest")
    run_here(tmp_path, "--resume", "latest", "evaluation.episodes=2")
    assert "2, seeds 1000000 to 1000001" in capsys.readouterr().out
    assert (here / "report.json").exists()
    assert rows(here) == table  # nothing was trained again
    assert only_run(tmp_path)[1].info.status == "FINISHED"


def test_a_signal_that_comes_in_a_callback_is_not_lost(tmp_path):
    """Python drops what is raised in the callback of a weak reference; matplotlib has thousands of them."""
    def draw_run(*_):
        thing = set()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        assert reference() is None

    with begun(tmp_path, [*TINY, *BARE, "evaluation.episodes=2"]) as run:
        run.draw_run, run.watch.deferred = draw_run, False
        run.trainer.counters["env_frames"] = 3000
        run.tracker = SimpleNamespace(artifact=lambda *_: None, best=lambda *_: pytest.fail("scored to the end"))
        with pytest.raises(Interrupted, match="SIGTERM"):
            run.score()
        assert not (run.folder / "report.json").exists()


def test_second_interrupt_leaves_at_once(tmp_path):
    process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, *BARE, "ppo.num_steps=2048", "env.num_envs=8")
    started = tmp_path / "runs" / "x" / "machine.json"
    wait(process, lambda: len(workers_of(process)) >= 2 and started.exists())
    time.sleep(1)  # now in the first, long rollout
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the end of the update
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=HANGS) == -signal.SIGINT
    process.stdout.close()
    assert psutil.wait_procs(workers, timeout=HANGS)[1] == []


def test_frozen_worker_is_replaced(tmp_path):
    process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, *BARE, held=2)
    wait_until_held(process, tmp_path, 2)
    frozen = workers_of(process)[1]
    frozen.suspend()
    go(tmp_path, 2)
    output = output_of(process)
    assert process.returncode == 0, output
    assert re.search(r"worker \d did not answer for 15 s; going on with new workers", output)
    assert not frozen.is_running()


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    line = refused(tmp_path, "--config", CONFIG, *TINY, *BARE, "ppo.reward_scale=1e38")
    assert re.search(r"update 1: (loss|a reward|the policy).*stopped before the optimizer", line)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    with begun(tmp_path_factory.mktemp("run"), [*TINY, *BARE, "evaluation.interval=1"]) as run:
        yield run


def test_best_policy_that_a_full_disk_refused_is_saved_later(a_run, capsys):
    """And before the checkpoint that counts on it."""
    file, metrics = a_run.folder / "checkpoints" / "policy.safetensors", a_run.iterate_with_retries(a_run.trainer)
    with no_room():
        a_run.score_candidate(metrics)
        assert "best policy not saved (File too large); training goes on and will try again" in capsys.readouterr().out
        with pytest.raises(OSError, match=r"File too large: .*policy\.safetensors"):
            a_run.save()
    assert a_run.counters["best"] == metrics["eval/return_mean"]
    assert list(file.parent.iterdir()) == []
    a_run.last_snapshot = a_run.snapshot()
    a_run.save()
    weights = load_policy(file)[0].state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in a_run.trainer.policy.state_dict().items())


def test_an_iteration_that_was_done_is_saved_though_its_score_failed(tmp_path, monkeypatch):
    with begun(tmp_path, [*TINY, *BARE, "evaluation.interval=1"]) as run:
        def fail(*_, **__):
            raise ValueError("a bug of this environment")

        monkeypatch.setattr(run, "play", fail)
        with pytest.raises(ValueError, match="a bug of this environment"):
            train.train(run.trainer, run)
        (*_, last) = sorted((run.folder / "checkpoints").glob("*.ckpt"))
        counters = load_checkpoint(last)["counters"]
        assert counters["env_frames"] == run.trainer.counters["env_frames"] > 0
        assert counters["next_evaluation"] == 1  # it is still due


def test_weights_that_are_not_finite_are_named(a_run):
    trainer = a_run.trainer
    trainer.policy.register_buffer("stray", torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="the weights are not finite"):
        trainer.iterate()
    assert not trainer.weights_match_snapshot  # so that no checkpoint takes them
    del trainer.policy.stray
    trainer.policy.actor.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the policy's logits or values"):
        trainer.iterate()


def test_resume_with_another_policy_or_other_frames(tmp_path):
    run_here(tmp_path, "--config", CONFIG, "run.name=x", *TINY, *BARE)
    for override, saved in (
            ("model.name=transformer", "'cnn'"), ("env.frame_stack=3", "4"), ("ppo.gamma=0.5", "0.996")):
        key, value = override.split("=")
        assert f"{key} was {saved}, asked for {value}" in refused(tmp_path, "--resume", "latest", override)
    assert "unknown key ppo.gama" in refused(tmp_path, "--resume", "latest", "ppo.gama=0.5")
    before = len(rows(tmp_path / "runs" / "x"))
    run_here(tmp_path, "--resume", "runs/x", "ppo.total_frames=4000")
    assert len(rows(tmp_path / "runs" / "x")) > before


def test_unreachable_mlflow_server_is_said_at_once(tmp_path):
    line = refused(tmp_path, "--config", CONFIG, "tracking.uri=http://127.0.0.1:9", *TINY)
    assert re.search(r"127\.0\.0\.1:9.*tracking\.mlflow=false", line)


def test_locked_store_delays_metrics_but_not_training(tmp_path):
    here = tmp_path / "runs" / "x"
    process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, "ppo.total_frames=6000",
                    "evaluation.episodes=0", held=3)
    wait_until_held(process, tmp_path, 3)
    lock = sqlite3.connect(tmp_path / "mlflow.db", timeout=30, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    assert "runs/x: another process is at this run" in refused(tmp_path, "--resume", "latest")
    go(tmp_path, 3)
    wait_for_rows(process, here, 10)  # training does not wait
    lock.execute("ROLLBACK")
    lock.close()
    output = output_of(process)
    assert process.returncode == 0, output
    client, found = only_run(tmp_path)
    assert found.info.status == "FINISHED"
    sent = [metric.step for metric in client.get_metric_history(found.info.run_id, "update/entropy")]
    assert sent == [int(row["frames"]) for row in rows(here)]


def test_lost_server_costs_no_training_and_the_gap_is_told(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri",
         f"sqlite:///{tmp_path}/server.db"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        uri = f"tracking.uri=http://127.0.0.1:{port}"
        process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, uri, held=3)
        wait_until_held(process, tmp_path, 3)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    go(tmp_path, 3)
    output = output_of(process)
    assert process.returncode == 0, output
    assert re.search(r"MLflow lacks the last \d+ updates; runs/x/metrics\.csv has them", output)
    assert "Traceback" not in output
    (*_, last) = sorted((tmp_path / "runs" / "x" / "checkpoints").glob("*.ckpt"))
    counters = load_checkpoint(last)["counters"]
    assert (counters["scored"], counters["sent"]) == (2, False)  # the score counts, and --resume sends what is missing
    assert int(rows(tmp_path / "runs" / "x")[-1]["frames"]) >= 3000


def test_two_runs_begun_at_once_share_a_new_store(tmp_path):
    code = (
        "import os, sys; from machinery.config import load_config; from machinery.tracking import Tracker\n"
        "os.chdir(sys.argv[1])\n"
        "with Tracker(load_config(), sys.argv[2], threads=1): pass\n")
    processes = []
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        processes.append(subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), f"runs/{name}"], cwd=CONFIG.parent.parent, text=True,
            stderr=subprocess.PIPE))
    for process in processes:
        error = process.communicate(timeout=HANGS)[1]
        assert process.returncode == 0, error


def test_deleted_mlflow_run_gets_a_successor(tmp_path, capsys):
    run_here(tmp_path, "--config", CONFIG, "run.name=x", *TINY, "evaluation.episodes=0")
    client, found = only_run(tmp_path)
    client.delete_run(found.info.run_id)
    run_here(tmp_path, "--resume", "latest", "ppo.total_frames=4000")
    assert f"MLflow run {found.info.run_id} is gone; a new one takes its place" in capsys.readouterr().err
    client, found = only_run(tmp_path)
    assert found.info.status == "FINISHED"
    steps = sorted(m.step for m in client.get_metric_history(found.info.run_id, "update/entropy"))
    assert steps == [int(row["frames"]) for row in rows(tmp_path / "runs" / "x")]  # those of the deleted run as well


def test_store_in_trouble_does_not_pass_for_a_deleted_run(tmp_path, monkeypatch):
    """A run that cannot be asked for now is not given up: a second one would hold half of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    with Tracker(load_config(), Path("runs/x"), threads=1) as tracker:
        pass

    def busy(self, run_id):
        raise MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(mlflow.MlflowClient, "get_run", busy)
    with pytest.raises(TrackingError, match="cannot be used: database is locked"), Tracker(
            load_config(), Path("runs/x"), threads=1, run_id=tracker.run_id):
        pass
    monkeypatch.undo()
    assert only_run(tmp_path)[1].info.run_id == tracker.run_id


def test_odd_surroundings(tmp_path):
    """A leftover folder of MLflow's old store, no encoder for videos, no display or home, a path with spaces and more.
    """
    folder = tmp_path / "some where, naïve 月"
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    done = run(folder, "--config", CONFIG, "run.name=月", *TINY, IMAGEIO_FFMPEG_EXE="/bin/false", HOME="/nowhere",
               OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    assert "no videos" in done.stderr
    assert (folder / "runs" / "月" / "report.json").exists()
    assert only_run(folder)[1].info.status == "FINISHED"


def test_output_that_nobody_takes_costs_nothing(tmp_path):
    """Standard output is a full disk, and standard error a pipe that is closed at once."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--config", CONFIG, "run.name=x", *TINY, *BARE), cwd=tmp_path, stdout=full,
                              stderr=writer, check=False, timeout=HANGS)
    os.close(writer)
    assert done.returncode == 0
    assert load_checkpoint(tmp_path / "runs" / "x")["counters"]["scored"] == 0


def test_absent_gpu_is_one_line(tmp_path):
    device = f"cuda:{torch.cuda.device_count()}" if torch.cuda.is_available() else "cuda"
    assert f"run.device={device}" in refused(tmp_path, "--config", CONFIG, f"run.device={device}", *TINY, *BARE)


def test_out_of_memory_names_the_settings_that_need_less(tmp_path, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "update", exhausted)
    with pytest.raises(SystemExit, match=r"CUDA out of memory.*ppo\.num_minibatches.*env\.num_envs"):
        train.main(["--config", str(CONFIG), *TINY, *BARE])


def test_model_that_does_not_fit_into_memory_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^train\.py: .*memory.* smaller env\.num_envs, ppo\.num_steps or model.*$"):
        train.main(["--config", str(CONFIG), *TINY, *BARE, "model.features=10000000000"])


def test_pretrained_weights_that_are_not_there_are_said_before_anything_starts(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(torchvision.models.resnet34().state_dict(), weights)
    arguments = ["--config", CONFIG.with_name("temporal_resnet.yaml"), *TINY, *BARE]
    assert "not weights of resnet50" in refused(
        tmp_path, *arguments, f"model.weights={weights}", "model.resnet=resnet50")
    line = refused(tmp_path, *arguments, "model.weights=IMAGENET1K_V1", TORCH_HOME=str(tmp_path),
                   https_proxy="http://127.0.0.1:9")
    assert "model.weights=FILE" in line
