"""What is told while a run goes on: on a terminal, in a file, and to MLflow."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import imageio_ffmpeg
import numpy as np
import torch

import train
from checkpoint import load_checkpoint
from config import load_config
from runs import CONFIG, ROOT, TINY, only_run, rows, without_speed
from tracking import Sender

SHOWN = """
import sys
sys.path.insert(0, {root!r})
from tracking import Progress
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
    output = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(master)
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
    """An MLflow client whose artifacts cannot be written for a while."""

    def __init__(self, broken):
        self.broken, self.metrics, self.files = broken, [], []

    def log_batch(self, run_id, metrics):
        self.metrics += metrics

    def log_artifact(self, run_id, path, folder):
        if self.broken:
            self.broken -= 1
            raise PermissionError(13, "Permission denied")
        self.files.append((path, folder))


def test_files_that_the_store_refuses_wait_and_hold_up_no_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store = Store(broken=3)
    sender = Sender(store, "id", interval=0.02)
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"x")
    sender.files += [(picture, None), (tmp_path / "gone.png", None), (picture, "more")]
    sender.waiting += [["a"], ["b"]]
    sender.start()
    assert sender.close() == (0, 0)
    assert store.metrics == ["a", "b"]
    assert store.files == [(str(picture), None), (str(picture), "more")]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("MLflow")]
    assert told == ["MLflow: curves.png: [Errno 13] Permission denied; training goes on"]


def test_files_that_never_get_through_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sender = Sender(Store(broken=1000), "id", interval=0.02)
    sender.files.append((ROOT / "README.md", None))
    sender.start()
    assert sender.close(patience=0.2) == (0, 1)


def test_the_load_of_the_machine_is_read_beside_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sender = Sender(Store(broken=0), "id", interval=0.02)
    sender.start()
    deadline = time.monotonic() + 60
    while not sender.load:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    load = sender.load
    sender.close()
    assert 0 <= load["system/cpu_utilization_percentage"] <= 100
    assert load["system/system_memory_usage_megabytes"] > 0


PLAYED = np.array([-100.0]), np.array([80]), np.array([1])  # returns, lengths, outcomes
MILESTONES = {"first-landing": ("rollout/return_mean", -1e9), "return-100": ("rollout/return_mean", 1e9)}


def test_milestones_and_curves_reach_mlflow_and_change_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "MILESTONES", MILESTONES)
    settings = ["--config", str(CONFIG), *TINY, "evaluation.episodes=0"]
    train.main([*settings, "run.name=filmed"])
    assert "M frames" in capsys.readouterr().out
    train.main([*settings, "run.name=plain", "evaluation.videos=0", "tracking.mlflow=false", "tracking.progress=false"])
    assert "M frames" not in capsys.readouterr().out
    assert without_speed(rows(tmp_path / "runs/filmed")) == without_speed(rows(tmp_path / "runs/plain"))

    (video,) = (tmp_path / "runs/filmed/videos").iterdir()
    assert video.name == "0.00M-first-landing.mp4"
    assert next(imageio_ffmpeg.read_frames(str(video)))["codec"] == "h264"
    assert not (tmp_path / "runs/plain/videos").exists()
    client, found = only_run(tmp_path)
    videos = [artifact.path for artifact in client.list_artifacts(found.info.run_id, "videos")]
    assert videos == [f"videos/{video.name}"]
    assert "curves.png" in {artifact.path for artifact in client.list_artifacts(found.info.run_id)}


def test_a_milestone_is_filmed_once_also_after_a_resume_and_draws_no_random_number(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MILESTONES", MILESTONES)
    config = load_config(CONFIG, TINY)
    trainer = train.Trainer(config, tmp_path)
    try:
        (tmp_path / "checkpoints").mkdir()
        metrics, before = trainer.update_once(), trainer.snapshot()
        assert [path.exists() for path in trainer.film_milestones(metrics)] == [True]
        after = trainer.snapshot()
        assert before["counters"]["milestones"] == []
        assert after["counters"]["milestones"] == ["first-landing"]
        assert torch.equal(before["generator"], after["generator"])
        assert torch.equal(before["torch_rng"], after["torch_rng"])
        assert trainer.film_milestones(metrics) == []
        trainer.save(after)
    finally:
        trainer.close()
    resumed = train.Trainer(config, tmp_path, load_checkpoint(tmp_path))
    try:
        assert resumed.film_milestones(metrics) == []
    finally:
        resumed.close()


def test_trouble_is_told_while_training_goes_on(tmp_path, monkeypatch, capsys):
    """A policy that hardly moves is told in words; a milestone that a full disk does not take, too."""
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "play", lambda *arguments, **named: fail() if "recorder" in named else PLAYED)
    monkeypatch.setattr(train, "MILESTONES", MILESTONES)
    monkeypatch.setattr("diagnostics.LONG", 3)
    train.main(["--config", str(CONFIG), *TINY, "evaluation.episodes=0", "tracking.mlflow=false", "run.name=x",
                "ppo.learning_rate=1e-9", "ppo.anneal=false"])
    output = capsys.readouterr().out
    said = [line for line in output.splitlines() if "clip fraction is" in line]
    assert len(said) == 1
    assert "the policy hardly moves. Raise ppo.learning_rate=1e-09" in said[0]
    assert output.count("milestone not filmed (No space left on device); training goes on") == 1
    assert int(rows(tmp_path / "runs/x")[-1]["frames"]) >= 3000
