"""What is told while a run goes on: on a terminal, in a file, and to MLflow."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch

import train
from machinery.checkpoint import load_checkpoint
from machinery.outbox import Load, Queue, Sender, send_file
from runs import BARE, CONFIG, ROOT, TINY, begun, only_run, read_terminal, rows, without_speed

SHOWN = """
import sys
sys.path.insert(0, {root!r})
from machinery.terminal import Progress
progress = Progress(2_000_000, 0, seconds=20, silent={silent})
for i in range(1, 251):
    progress.show(8_000 * i, {{
        "rollout/return_mean": -180.4 + i, "rollout/landed_rate": i / 500, "update/approx_kl": 0.012,
        "update/clip_fraction": 0.17, "update/entropy": 1.37, "speed/frames_per_second": 1600.0}}, 5.0 * i)
    if i == 100:
        progress.say("something to say")
progress.close()
"""


def shown(silent=False):
    return [sys.executable, "-c", SHOWN.format(root=str(ROOT), silent=silent)]


def on_a_terminal(command, columns=80):
    """What a command writes to a terminal of that width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    output = read_terminal(master)
    assert process.wait() == 0, output
    return output.decode()


def test_a_terminal_has_one_live_line():
    output = on_a_terminal(shown())
    *_, last = (line for line in re.split(r"[\r\n]+", output) if "return" in line)
    assert re.match(r"2\.00M/2\.00M, +[\d.]+[kMG]?/s, 00:00 left, return 70, landed 50%, KL 0\.012, clip 0\.17", last)
    lines = [re.sub(r"\x1b\[\w+", "", line) for line in output.replace("\r\n", "\n").split("\n")]
    assert len(lines) == 3  # what was said, the live line, and nothing after it
    assert lines[0].endswith("\rsomething to say")
    assert all(len(state) <= 80 for line in lines for state in line.split("\r"))


def test_a_file_has_plain_lines_now_and_then():
    output = subprocess.run(shown(), capture_output=True, text=True, check=True)
    assert output.stderr == ""
    assert "\r" not in output.stdout
    lines = output.stdout.splitlines()
    assert lines.count("something to say") == 1
    lines.remove("something to say")
    assert len(lines) == 63 + 1  # every 20 s of 1,250, and the last
    assert lines[0] == ("0.01 of 2.00 M frames, 0.1 min, return -179, landed 0%, KL 0.012, clip 0.17, entropy 1.37, "
                        "1600 frames/s, 21 min left")


def test_quiet_is_quiet_but_for_what_is_out_of_order():
    assert on_a_terminal(shown(silent=True)) == "something to say\r\n"


class Store:
    """An MLflow client that takes no metrics and no artifacts for a while."""

    def __init__(self, broken=0, no_metrics=0):
        self.broken, self.no_metrics, self.metrics, self.files = broken, no_metrics, [], []

    def log_batch(self, run_id, metrics):
        if self.no_metrics:
            self.no_metrics -= 1
            raise ConnectionError("API request to http://me:secret@host failed\nlong story")
        self.metrics += metrics

    def log_artifact(self, run_id, path, folder):
        if self.broken:
            self.broken -= 1
            raise PermissionError(13, "Permission denied")
        self.files.append((path, folder))

    def sent(self):
        return [(m.key, m.value, m.step) for m in self.metrics if not m.key.startswith("system/")]


def sender_of(store, *rows, there=()):
    queue = Queue("MLflow")
    for row in rows:
        queue.put(row)
    return Sender(store, "id", queue, there, interval=0.02)


def told(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("MLflow")]


def test_files_that_the_store_refuses_wait_and_hold_up_no_metrics(tmp_path, capsys):
    store = Store(broken=3)
    sender = sender_of(store, {"frames": 1, "a": 0.5}, {"frames": 2, "b": 0.25, "c": float("nan")})
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"x")
    files = (picture, None), (tmp_path / "gone.png", None), (picture, "more")
    sender.jobs["files"] += [(path.name, send_file, path, folder) for path, folder in files]
    sender.start()
    assert sender.close() == (0, 0, 0)
    assert store.sent() == [("a", 0.5, 1), ("b", 0.25, 2)]
    assert store.files == [(str(picture), None), (str(picture), "more")]
    assert told(capsys) == ["MLflow: curves.png: [Errno 13] Permission denied; training goes on"]


def test_files_that_never_get_through_are_counted():
    sender = sender_of(Store(broken=1000))
    sender.jobs["files"].append(("README.md", send_file, ROOT / "README.md", None))
    sender.start()
    assert sender.close(timeout=0.2) == (0, 1, 0)
    sender.join(10)
    assert not sender.is_alive()


def test_models_that_the_store_refuses_wait_for_their_rows_and_hold_up_no_file(capsys):
    store, done, waiting = Store(no_metrics=2), [], threading.Event()

    def model(client, run_id, name, refused):
        assert client.sent()  # the row of a score goes first
        if refused:
            waiting.set()
            raise LookupError(f"no {name} here\nlong story")
        done.append((run_id, name))

    sender = sender_of(store, {"frames": 1, "eval/return_mean": 0.5})
    sender.jobs["models"] += [("score", model, name, name == "bad") for name in ("good", "bad", "next")]
    sender.jobs["files"].append(("README.md", send_file, ROOT / "README.md", None))
    sender.start()
    assert waiting.wait(60)
    assert sender.close(timeout=0.2) == (0, 0, 2)
    assert done == [("id", "good")]
    assert len(store.files) == 1
    assert told(capsys)[-1] == "MLflow: score: no bad here; training goes on"


def test_metrics_that_the_store_refuses_are_sent_later_in_their_order(capsys):
    store = Store(no_metrics=2)
    sender = sender_of(store, *({"frames": i, "a": i / 2} for i in range(60)), there={7, 30})
    sender.start()
    assert sender.close() == (0, 0, 0)
    assert store.sent() == [("a", i / 2, i) for i in range(60) if i not in (7, 30)]
    assert sender.queue.rows == []
    assert told(capsys) == [
        "MLflow: API request to http://***@host failed; training goes on, and metrics are kept to be sent later",
        "MLflow answers again; the kept metrics are sent"]


def test_metrics_that_never_get_through_are_counted():
    sender = sender_of(Store(no_metrics=1000), {"frames": 1, "a": 0.5}, {"frames": 2, "a": 0.5})
    sender.start()
    assert sender.close(timeout=0.2) == (2, 0, 0)


LOAD = {f"system/{name}" for name in (
    "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
    "disk_usage_megabytes", "disk_usage_percentage", "disk_available_megabytes", "network_receive_megabytes",
    "network_transmit_megabytes")}


def wait_for_metrics(sender, store, row):
    deadline = time.monotonic() + 60
    while not store.metrics:
        sender.queue.put(row)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sender.close()[0] == 0


def test_the_load_of_the_machine_is_sent_with_the_newest_row():
    store = Store()
    sender = sender_of(store)
    sender.start()
    wait_for_metrics(sender, store, {"frames": 8, "a": 0.5})
    load = {metric.key: metric.value for metric in store.metrics if metric.key.startswith("system/")}
    assert load.keys() == LOAD
    assert {metric.step for metric in store.metrics} == {8}
    assert 0 <= load["system/cpu_utilization_percentage"] <= 100
    assert load["system/system_memory_usage_megabytes"] > 0
    assert load["system/disk_available_megabytes"] > 0
    assert 0 <= load["system/network_receive_megabytes"] < 1e5  # since the start of the run, not of the machine


def test_a_machine_whose_load_cannot_be_read_trains_all_the_same(monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    store = Store()
    sender = sender_of(store)
    sender.start()
    wait_for_metrics(sender, store, {"frames": 8, "a": 0.5})
    assert set(store.sent()) == {("a", 0.5, 8)}
    assert len(store.sent()) == len(store.metrics)


@pytest.mark.parametrize("utilization", [True, False])
def test_only_the_gpus_that_the_run_uses_are_asked(utilization, monkeypatch):
    def percent(gpu):
        if not utilization:
            raise ModuleNotFoundError("pynvml")
        return 73

    for name, answer in {
            "is_initialized": lambda: True, "device_count": lambda: 2, "memory_reserved": lambda gpu: 5 * gpu,
            "mem_get_info": lambda gpu: {1: (3 * 10**9, 4 * 10**9)}[gpu], "utilization": percent}.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    load = {key: value for key, value in Load().read().items() if key not in LOAD}
    assert load == {"system/gpu_1_memory_usage_megabytes": 1000, "system/gpu_1_memory_usage_percentage": 25} | (
        {"system/gpu_1_utilization_percentage": 73} if utilization else {})


PLAYED = np.array([-100.0]), np.array([80]), np.array([1])  # returns, lengths, outcomes
MILESTONES = {"first-landing": ("rollout/return_mean", -1e9), "return-100": ("rollout/return_mean", 1e9)}


def test_milestones_and_curves_reach_mlflow_and_change_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("machinery.run.LANDER_MILESTONES", MILESTONES)
    settings = ["--config", str(CONFIG), *TINY, "evaluation.episodes=0"]
    train.main([*settings, "run.name=filmed"])
    assert "M frames" in capsys.readouterr().out
    train.main([*settings, "run.name=plain", "evaluation.videos=0", "tracking.mlflow=false", "tracking.progress=false"])
    assert "M frames" not in capsys.readouterr().out
    assert without_speed(rows(tmp_path / "runs/filmed")) == without_speed(rows(tmp_path / "runs/plain"))

    (video,) = (tmp_path / "runs/filmed/videos").iterdir()
    assert video.name == "000.00M-first-landing.mp4"
    assert next(imageio_ffmpeg.read_frames(str(video)))["codec"] == "h264"
    assert not (tmp_path / "runs/plain/videos").exists()
    client, found = only_run(tmp_path)
    videos = [artifact.path for artifact in client.list_artifacts(found.info.run_id, "videos")]
    assert videos == [f"videos/{video.name}"]
    assert "curves.png" in {artifact.path for artifact in client.list_artifacts(found.info.run_id)}


def test_a_milestone_is_filmed_once_also_after_a_resume_and_draws_no_random_number(tmp_path, monkeypatch):
    monkeypatch.setattr("machinery.run.LANDER_MILESTONES", MILESTONES)
    with begun(tmp_path, [*TINY, *BARE]) as run:
        metrics, before = run.iterate_with_retries(run.trainer), run.snapshot()
        assert [path.exists() for path in run.film_milestones(metrics)] == [True]
        after = run.last_snapshot = run.snapshot()
        assert before["counters"]["milestones"] == []
        assert after["counters"]["milestones"] == ["first-landing"]
        assert torch.equal(before["generator"], after["generator"])
        assert torch.equal(before["torch_rng"], after["torch_rng"])
        assert run.film_milestones(metrics) == []
        run.save()
        state = load_checkpoint(run.folder) | {"source": "here"}
        run.start_or_resume(state)
        assert run.film_milestones(metrics) == []
        next_metrics = without_speed([run.trainer.iterate()])
        with closing(train.Trainer(run.config, state)) as resumed:
            assert without_speed([resumed.iterate()]) == next_metrics
            assert resumed.envs.state == run.trainer.envs.state
            assert list(resumed.recent) == list(run.trainer.recent)


def test_trouble_is_told_while_training_goes_on(tmp_path, monkeypatch, capsys):
    """A policy that hardly moves is told in words; a milestone that a full disk does not take, too."""
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "play", lambda *arguments, **named: fail() if "rendered" in named else PLAYED)
    monkeypatch.setattr("machinery.run.LANDER_MILESTONES", MILESTONES)
    monkeypatch.setattr("machinery.diagnostics.LONG", 3)
    train.main(["--config", str(CONFIG), *TINY, "evaluation.episodes=0", "tracking.mlflow=false", "run.name=x",
                "ppo.learning_rate=1e-9", "ppo.anneal=0"])
    output = capsys.readouterr().out
    said = [line for line in output.splitlines() if "clip fraction is" in line]
    assert len(said) == 1
    assert "the policy hardly moves. Raise ppo.learning_rate=1e-09" in said[0]
    assert output.count("milestone not filmed (No space left on device); training goes on") == 1
    assert int(rows(tmp_path / "runs/x")[-1]["frames"]) >= 3000
