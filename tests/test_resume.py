"""What is decided before a run begins or goes on: which folder, whose it is, and from which checkpoint."""

import argparse
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from machinery.checkpoint import CheckpointError, build_policy, load_checkpoint, policy_bytes, save_checkpoint
from machinery.config import Config, ConfigError, load_config
from machinery.errors import UserError
from machinery.files import locked
from machinery.run_folder import is_finished, is_over, new_folder, start_run
from machinery.signals import WARNINGS, WISHES, Interrupted, SignalWatch
from runs import ROOT, no_room
from train import main


@pytest.fixture(autouse=True)
def _signals():
    """A trainer sets handlers, and what runs the tests has its own."""
    numbers = WISHES + WARNINGS
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """runs/x with checkpoints at 100, 200 and 300 frames and a row of metrics for each."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoints").mkdir(parents=True)
    for frames in (100, 200, 300):
        save_checkpoint(folder / "checkpoints" / f"{frames:012d}.ckpt", {
            "config": load_config(None, ["ppo.total_frames=300"]).model_dump(mode="json"), "policy": {}, "landers": [],
            "counters": {"env_frames": frames, "scored": 100 if frames == 300 else None}})
    (folder / "metrics.csv").write_text("frames,x\n" + "".join(f"{frames},1.0\n" for frames in (100, 200, 300)))
    return folder


def resume(path, *overrides):
    with ExitStack() as lock:
        return start_run(argparse.Namespace(resume=str(path), config=None, overrides=list(overrides)), lock)


def begin(name):
    with ExitStack() as lock:
        return start_run(argparse.Namespace(resume=None, config=None, overrides=[f"run.name={name}"]), lock)


def frames_of(run):
    return [int(line.split(",")[0]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("name", ["metrics.csv", "report.json"])
def test_a_new_run_does_not_take_the_place_of_one_whose_checkpoints_were_removed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / name).write_text("worth something")
    with pytest.raises(ConfigError, match="runs/old: holds what an earlier run measured"):
        begin("old")
    assert [path.name for path in folder.iterdir()] == [name]


def test_episodes_of_an_earlier_release_are_read(run):
    """They were [return, length, index into task.OUTCOMES]."""
    state = load_checkpoint(run / "checkpoints" / "000000000200.ckpt")
    state["recent"] = [[250.5, 300.0, 0.0], [-90.0, 80.0, 1.0]]
    save_checkpoint(run / "checkpoints" / "000000000400.ckpt", state)
    assert resume("latest")[2]["recent"] == [
        {"return_mean": 250.5, "length_mean": 300.0, "landed_rate": 1.0},
        {"return_mean": -90.0, "length_mean": 80.0, "landed_rate": 0.0}]


def test_newer_checkpoints_are_put_aside(run, capsys):
    """Left in place they would be taken for the newest, and what is saved from now on would be deleted as older."""
    _, folder, state = resume("runs/x/checkpoints/000000000200.ckpt")
    assert (str(folder), state["counters"]["env_frames"]) == ("runs/x", 200)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "000000000100.ckpt", "000000000200.ckpt", "000000000300.ckpt.aside"]
    assert "000000000300.ckpt is newer" in capsys.readouterr().out
    assert frames_of(run) == [100, 200]


def test_who_goes_back_keeps_what_came_after(run):
    """The best policy and the metrics of the branch that is left stay there, under another name, and count no more."""
    config = load_config(None, ["ppo.total_frames=300"])
    best = run / "checkpoints" / "policy.safetensors"
    for frames, kept in ((150, True), (250, False)):
        best.write_bytes(policy_bytes(build_policy(config), config, frames))
        state = resume("runs/x/checkpoints/000000000200.ckpt")[2]
        assert best.exists() == kept
        assert ("best" in state["counters"]) == (not kept)
        (run / "checkpoints" / "000000000300.ckpt.aside").rename(run / "checkpoints" / "000000000300.ckpt")
    assert state["counters"]["best"] is None
    assert (run / "checkpoints" / "policy.safetensors.aside").exists()


@pytest.mark.parametrize(("overrides", "kept"), [
    ([], True), (["evaluation.videos=0"], True), (["ppo.total_frames=900"], False)])
def test_other_schedules_put_a_best_policy_aside_that_was_saved_after_the_newest_checkpoint(overrides, kept, run):
    """With the same schedules it comes again; with others nothing that is trained would have been what was scored."""
    config, best = load_config(None, ["ppo.total_frames=300"]), run / "checkpoints" / "policy.safetensors"
    (run / "checkpoints" / "000000000300.ckpt").unlink()
    best.write_bytes(policy_bytes(build_policy(config), config, 250))
    state = resume("latest", *overrides)[2]
    assert best.exists() == kept
    assert ("best" in state["counters"]) == (not kept)


@pytest.mark.parametrize(("frames", "overrides", "kept"), [
    (100, ["ppo.total_frames=900"], False), (100, ["evaluation.videos=0"], True), (100, [], True),
    (300, ["ppo.total_frames=900"], True)])
def test_who_goes_back_with_other_settings_begins_another_run_in_mlflow(frames, overrides, kept, run):
    """With the same settings the same comes again, and MLflow has some of it."""
    file = run / "checkpoints" / f"{frames:012d}.ckpt"
    save_checkpoint(file, load_checkpoint(file) | {"run_id": "its own"})
    assert resume(file, *overrides)[2]["run_id"] == ("its own" if kept else None)


@pytest.mark.parametrize("damage", [lambda best: best.unlink(), lambda best: best.write_bytes(b"half a fi")])
def test_a_run_whose_best_policy_is_lost_chooses_the_best_anew(damage, run):
    config = load_config(None, ["ppo.total_frames=300"])
    best, file = run / "checkpoints" / "policy.safetensors", run / "checkpoints" / "000000000200.ckpt"
    (run / "checkpoints" / "000000000300.ckpt").unlink()
    state = load_checkpoint(file)
    state["counters"]["best"] = 7.0
    save_checkpoint(file, state)
    best.write_bytes(policy_bytes(build_policy(config), config, 200))
    assert resume("runs/x")[2]["counters"]["best"] == 7.0
    damage(best)
    assert resume("runs/x")[2]["counters"]["best"] is None


def test_metrics_of_an_abandoned_branch_are_kept(run):
    before = (run / "metrics.csv").read_text()
    resume("runs/x/checkpoints/000000000200.ckpt")
    assert (run / "metrics.csv.aside").read_text() == before


def test_who_goes_back_twice_keeps_both_branches(run):
    first, second = (run / "checkpoints" / f"000000000300.ckpt.aside{number}" for number in ("", "-2"))
    resume("runs/x/checkpoints/000000000200.ckpt")
    before = first.read_bytes()
    (run / "checkpoints" / "000000000300.ckpt").write_bytes(b"of another branch")
    resume("runs/x/checkpoints/000000000200.ckpt")
    assert (first.read_bytes(), second.read_bytes()) == (before, b"of another branch")
    assert (run / "metrics.csv.aside-2").exists()


def test_a_branch_that_could_not_begin_is_another_run_in_mlflow_at_the_second_try_too(run):
    file = run / "checkpoints" / "000000000200.ckpt"
    save_checkpoint(file, load_checkpoint(file) | {"run_id": "its own"})
    for _ in range(2):
        assert resume(file, "ppo.total_frames=900")[2]["run_id"] is None


def test_damaged_newest_is_put_aside_too(run, capsys):
    (run / "checkpoints" / "000000000300.ckpt").write_bytes(b"")
    assert resume("latest")[2]["counters"]["env_frames"] == 200
    assert (run / "checkpoints" / "000000000300.ckpt.aside").exists()
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "told"), [(None, "between 0 and 300"), ("frames,x\n100,1.0\n", "between 100 and")])
def test_rows_that_are_lost_are_told(content, told, run, capsys):
    (run / "metrics.csv").unlink()
    if content:
        (run / "metrics.csv").write_text(content)
    resume("latest", "ppo.total_frames=400")
    assert f"lacks the updates {told}" in capsys.readouterr().out


def test_config_file_is_written_again_and_what_a_kill_left_is_removed(run):
    for folder in (run, run / "checkpoints"):
        (folder / ".x.123.tmp").write_text("half")
    config, _, _ = resume("runs/x", "ppo.total_frames=400")
    assert load_config(run / "config.yaml") == config
    assert config.ppo.total_frames == 400
    assert not list(run.rglob(".*"))


def test_finished_run_is_said_to_be_finished_and_left_alone(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    main(["--resume", "latest"])
    assert "runs/x: finished, 300 frames" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_run_that_was_not_scored_is_not_finished(run):
    config, _, state = resume("latest")
    assert is_finished(config, state)
    for change in ({"scored": None}, {"scored": 50}, {"env_frames": 299}):
        assert not is_finished(config, state | {"counters": state["counters"] | change})
    unsent = state | {"counters": state["counters"] | {"sent": False}}
    assert is_finished(config, unsent)
    assert is_over(config, state)
    assert not is_over(config, unsent)
    del state["counters"]["scored"]
    assert not is_finished(config, state)


@pytest.mark.parametrize(("path", "message"), [
    ("runs/x/metrics.csv", "not a checkpoint of this program"),
    ("copy.ckpt", "put it into the checkpoints/"),
    ("other.ckpt", "holds no training run"),
    (ROOT / "results" / "cnn", "no checkpoint there; there are runs/x"),
    (ROOT / "results" / "cnn" / "policy.safetensors", "not a checkpoint of this program"),
    ("runs/x/checkpoints", "no checkpoint there"),
    ("", "no checkpoint there"),
])
def test_what_cannot_be_resumed(path, message, run, tmp_path):
    (tmp_path / "copy.ckpt").write_bytes((run / "checkpoints" / "000000000100.ckpt").read_bytes())
    save_checkpoint(tmp_path / "other.ckpt", {"frames": 1})
    with pytest.raises(CheckpointError, match=message):
        resume(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.ckpt", "other.ckpt", "runs"]


@pytest.mark.parametrize("override", ["ppo.gamma=0.5", " ppo.gamma =0.5", "run.name=y", "env.num_envs=64"])
def test_keys_that_may_not_change(override, run):
    with pytest.raises(ConfigError, match=r"a resumed run keeps its config: .* was "):
        resume("latest", override)
    resume("latest", "env.num_envs=32.0", "ppo.gamma=.99")  # the same, written differently


def test_config_of_a_checkpoint_that_is_no_longer_valid(run):
    save_checkpoint(run / "checkpoints" / "000000000400.ckpt", {
        "config": {"ppo": {"gama": 1}}, "policy": {}, "landers": [], "counters": {"env_frames": 400}})
    with pytest.raises(ConfigError, match=r"unknown key ppo\.gama"):
        resume("latest")


def test_one_process_per_run_and_none_after_a_kill(run):
    code = ("import time\nfrom machinery.files import locked\n"
            "with locked('runs/x'): print(1, flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "1\n"
    before = (run / "metrics.csv").read_text()
    for path in ("latest", "runs/x", "runs/x/checkpoints/000000000100.ckpt"):
        with pytest.raises(UserError, match="runs/x: another process is at this run"):
            resume(path)
    with pytest.raises(UserError, match="runs/x: another process is at this run"):
        begin("x")
    assert (run / "metrics.csv").read_text() == before
    holder.kill()
    holder.communicate()
    assert resume("latest")[2]["counters"]["env_frames"] == 300


def test_runs_without_a_name_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_folder(Config(), "configs/cnn.yaml") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and folder.name.startswith("cnn-") for folder in folders)


def test_run_that_was_killed_in_its_first_save_can_be_started_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "checkpoints" / ".000000000000.ckpt.7.tmp").write_text("half")
    _, folder, _ = begin("x")
    assert [path.name for path in (tmp_path / folder / "checkpoints").iterdir()] == []


def test_nowhere_to_write_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with no_room(), pytest.raises(SystemExit, match=r"^train\.py: runs/x/config\.yaml: File too large$"):
        main(["--config", str(ROOT / "configs" / "cnn.yaml"), "run.name=x"])
    assert [path.name for path in (tmp_path / "runs" / "x").iterdir()] == ["checkpoints"]
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    (tmp_path / "away" / "runs").write_text("a file")
    with pytest.raises(SystemExit, match=r"^train\.py: runs.*(Not a directory|File exists)$"):
        main(["--config", str(ROOT / "configs" / "cnn.yaml"), "run.name=x"])


def test_a_closed_terminal_ends_a_run_in_order():
    watch = SignalWatch()
    with pytest.raises(Interrupted, match="SIGHUP") as interruption:
        signal.raise_signal(signal.SIGHUP)
    assert interruption.value.code == 129
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    watch = SignalWatch()
    watch.deferred = True
    signal.raise_signal(signal.SIGHUP)
    watch.check()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        watch.check()


@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_may_come_again(number):
    watch = SignalWatch()
    watch.deferred = True
    for _ in range(3):
        signal.raise_signal(number)
    with pytest.raises(Interrupted, match=signal.Signals(number).name) as interruption:
        watch.check()
    assert interruption.value.code == 128 + number


def test_a_signal_that_comes_while_processes_tell_each_other_is_not_lost():
    class Others:
        size = 2

        def all_gather_object(self, received):
            signal.raise_signal(signal.SIGTERM)  # between asking and answering
            return [received, None]

    watch = SignalWatch(Others())
    watch.deferred = True
    watch.check_all()  # the other process has not heard of it, and would wait for this one
    with pytest.raises(Interrupted, match="SIGTERM"):
        watch.check_all()


def test_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
            pass
