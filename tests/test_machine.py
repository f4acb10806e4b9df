"""What a machine and its scheduler do to a run: signals, CPU quotas, pinned threads, users without a name."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from test_distributed import SETTINGS, torchrun

import train
from machinery.checkpoint import load_checkpoint, load_policy
from machinery.config import ConfigError, load_config
from machinery.device import cores_for, cpu_quota, set_rng_state
from machinery.processes import SINGLE_PROCESS, Processes
from machinery.run_folder import start_run
from machinery.tracking import Tracker, TrackingError, lost_artifacts, with_store
from machinery.workers import unpinned_cores
from runs import (
    BARE,
    CONFIG,
    HANGS,
    HELD,
    ROOT,
    TINY,
    begun,
    command,
    go,
    only_run,
    output_of,
    refused,
    rows,
    run,
    run_here,
    start,
    wait_until_held,
)


def test_a_schedulers_warning_ends_a_run_in_order(tmp_path):
    """As Slurm sends it: to every process of the job, and through srun a second time."""
    here = tmp_path / "runs" / "x"
    process = start(tmp_path, "--config", CONFIG, "run.name=x", *TINY, held=3)
    wait_until_held(process, tmp_path, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGUSR1)
    go(tmp_path, 3)
    output = output_of(process)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert "SIGUSR1: saved; go on with: python train.py --resume runs/x" in output
    assert "Traceback" not in output
    assert only_run(tmp_path)[1].info.status == "KILLED"
    assert psutil.wait_procs(children, timeout=HANGS)[1] == []
    assert load_checkpoint(here)["counters"]["env_frames"] == int(rows(here)[-1]["frames"]) > 0


def test_a_warning_that_torchrun_dies_of_ends_its_processes_in_order(tmp_path):
    """torchrun does not know the signal, so it hands nothing on, and what it has started would stay behind."""
    here = tmp_path / "runs" / "x"
    process = torchrun(tmp_path, HELD, 2, *SETTINGS, "run.name=x", "tracking.mlflow=false")
    wait_until_held(process, tmp_path, 2, processes=2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=HANGS) == -signal.SIGUSR2
    go(tmp_path, 2)
    output = output_of(process)
    assert "SIGTERM: saved; go on with: torchrun" in output
    assert "Traceback" not in output
    assert psutil.wait_procs(children, timeout=HANGS)[1] == []
    assert load_checkpoint(here)["counters"]["env_frames"] == int(rows(here)[-1]["frames"]) > 0


@pytest.mark.parametrize(("membership", "files", "quota"), [
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),  # version 2, as a container sees it
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),  # the tightest counts
    ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "20000 100000\n"}, 0.2),
    ("4:cpu,cpuacct:/job\n", {  # version 1
        "cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 0.5),
    ("5:memory:/job\n4:cpuacct,cpu:/docker/1f\n", {  # a container's own group is the root, under another path
        "cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
    ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("1:cpuset:/\n0::/\n", {"cpuset/cpu.max": "50000 100000\n"}, None),
    ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ("0::/\n", {}, None),
    ("", {}, None),
])
def test_threads_are_no_more_than_a_quota_of_cpu_time_allows(membership, files, quota, tmp_path):
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / "cgroups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroups" / name).write_text(content)
    where = tmp_path / "cgroups", tmp_path / "membership"
    assert cpu_quota(*where) == (quota or float("inf"))
    cores = len(os.sched_getaffinity(0))
    allowed = min(cores, -int(-(quota or cores) // 1))
    assert cores_for(SINGLE_PROCESS, *where) == allowed >= 1
    assert cores_for(Processes(size=2, local_size=2), *where) == max(allowed // 2, 1)
    assert cores_for(Processes(size=99, local_size=99), *where) == 1


PINNED = """
import os
before = os.sched_getaffinity(0)
import torch
torch.rand(100, 100) @ torch.rand(100, 100)
pinned = os.sched_getaffinity(0)
import sys
sys.path.insert(0, {root!r})
from envs import make_vector_env
from machinery.device import cores_for
from machinery.processes import SINGLE_PROCESS
envs = make_vector_env(2, 2)
workers = [os.sched_getaffinity(process.pid) for process in envs.workers.processes]
print(repr((before, pinned, workers, cores_for(SINGLE_PROCESS), os.sched_getaffinity(0))))
envs.close()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a single core")
@pytest.mark.parametrize("variables", [
    {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"},
    {"GOMP_CPU_AFFINITY": " ".join(map(str, sorted(os.sched_getaffinity(0))[:2]))}])
def test_openmp_that_pins_the_trainer_pins_no_worker(variables):
    code = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n{PINNED.format(root=str(ROOT))}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    before, pinned, workers, threads, trainer = eval(done.stdout)
    assert len(pinned) == 1  # else this tests nothing
    assert sorted(map(sorted, workers)) == [[core] for core in sorted(before)]
    assert threads == 2
    assert trainer == before


def test_processes_that_torchrun_has_pinned_to_one_core_are_told(monkeypatch, capsys):
    """torchrun loads torch, too, so its processes inherit a pin that they cannot know."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    for rank in (0, 1):
        assert cores_for(Processes(rank, size=9999, local_size=9999)) == 1
    assert capsys.readouterr().out.count("OMP_PROC_BIND pins it; unset OMP_PROC_BIND") == 1


def test_without_pins_the_affinity_is_what_it_was():
    before = os.sched_getaffinity(0)
    assert unpinned_cores() == sorted(before)
    assert os.sched_getaffinity(0) == before


SECRET = "http://me:secret@127.0.0.1:9"


def holding(folder, word):
    return [path for path in folder.rglob("*") if path.is_file() and word in path.read_bytes()]


def resume(*overrides):
    with ExitStack() as lock:
        return start_run(argparse.Namespace(resume="latest", config=None, overrides=list(overrides)), lock)[0].tracking


def test_no_file_has_the_password_of_a_uri(tmp_path, monkeypatch):
    """So it is given again, where the run needs it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with begun(tmp_path, [*TINY, *BARE, f"tracking.uri={SECRET}", "evaluation.interval=1"]) as run:
        run.score_candidate(run.iterate_with_retries(run.trainer))
        run.last_snapshot = run.snapshot()
        run.save()
        policy_file = run.folder / "checkpoints" / "policy.safetensors"
        assert load_policy(policy_file)[1].tracking.uri == "http://***@127.0.0.1:9"
    files = holding(tmp_path, b"***@127.0.0.1:9")
    assert {path.suffix for path in files} == {".yaml", ".ckpt", ".safetensors"}
    assert holding(tmp_path, b"secret") == []

    monkeypatch.chdir(tmp_path)
    assert "***" in resume().uri  # tracking.mlflow is false
    with pytest.raises(TrackingError, match=r"tracking\.uri=http://\*\*\*@.* was saved without its credentials; give"):
        resume("tracking.mlflow=true")
    assert resume("tracking.mlflow=true", f"tracking.uri={SECRET}").uri == SECRET
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    assert resume("tracking.mlflow=true").uri == SECRET
    assert holding(tmp_path, b"secret") == []


@pytest.mark.parametrize("override", [f"tracking.ury={SECRET}", f"tracking.keep={SECRET}", f'tracking.uri="{SECRET}',
                                      SECRET])
def test_a_mistake_in_a_uri_shows_no_password(override):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("variables", "overrides", "expected"), [
    ({}, [], ("sqlite:///mlflow.db", "lunar-lander")),
    ({"MLFLOW_TRACKING_URI": "", "MLFLOW_EXPERIMENT_NAME": ""}, [], ("sqlite:///mlflow.db", "lunar-lander")),
    ({"MLFLOW_TRACKING_URI": "http://host", "MLFLOW_EXPERIMENT_NAME": "mine"}, [], ("http://host", "mine")),
    ({"MLFLOW_EXPERIMENT_ID": "3"}, [], ("sqlite:///mlflow.db", "")),
    ({"MLFLOW_EXPERIMENT_ID": "3", "MLFLOW_EXPERIMENT_NAME": "mine"}, [], ("sqlite:///mlflow.db", "mine")),
    ({"MLFLOW_TRACKING_URI": "http://host", "MLFLOW_EXPERIMENT_NAME": "mine"},
     ["tracking.uri=sqlite:///x.db", "tracking.experiment=ours"], ("sqlite:///x.db", "ours")),
])
def test_mlflows_variables_count_where_the_config_says_nothing(variables, overrides, expected, monkeypatch):
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "EXPERIMENT_ID"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = with_store(load_config(None, overrides).tracking)
    assert (settings.uri, settings.experiment) == expected


def test_a_run_goes_on_in_the_store_that_mlflows_variables_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    uri, short = f"sqlite:///{tmp_path}/my.db", ["ppo.total_frames=600", "evaluation.episodes=0", "run.device=cpu"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    train.main(["--config", str(CONFIG), "run.name=x", *TINY, *short])
    assert f"runs/x: cnn, cpu, 600 frames, 1 thread, MLflow store {uri}\n" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    train.main(["--resume", "latest", "ppo.total_frames=1200"])
    assert f"runs/x: cnn, cpu, 1,200 frames, 1 thread, MLflow store {uri}\n" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.db")] == ["my.db"]
    assert os.environ["MLFLOW_TRACKING_URI"].endswith("other.db")  # left as it was
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.metrics["update/entropy"] == float(rows(tmp_path / "runs" / "x")[-1]["update/entropy"])


def track(folder, monkeypatch, name, run_id=None):
    """A run in `folder` that sends a file of that name; its id."""
    monkeypatch.chdir(folder)
    (folder / name).write_text(name)
    with Tracker(load_config(), Path("runs/x"), threads=1, run_id=run_id) as tracker:
        tracker.artifact(folder / name)
        tracker.log({"update/entropy": 1.0}, frames=len(tracker.metrics.rows()) + 1)
    return tracker.run_id


def test_a_folder_that_was_moved_or_copied_writes_nothing_into_the_old_one(tmp_path, monkeypatch, capsys):
    here, copy, moved = tmp_path / "he re", tmp_path / "copy", tmp_path / "moved"
    (here / "runs" / "x").mkdir(parents=True)
    run_id = track(here, monkeypatch, "first")
    assert len(list(here.glob("mlruns/*/*/artifacts/first"))) == 1
    shutil.copytree(here, copy)
    before = sorted(here.rglob("*"))
    assert capsys.readouterr().err.count("moved or copied") == 0
    for again in (run_id, None):  # one that goes on, and a new one
        track(copy, monkeypatch, "second", again)
        assert f"moved or copied and still names {here}/mlruns for this run's files" in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before
    assert len(mlflow.MlflowClient(f"sqlite:///{copy}/mlflow.db").get_metric_history(run_id, "update/entropy")) == 2
    here.rename(moved)
    track(moved, monkeypatch, "second", run_id)
    assert f"moved or copied and still names {here}/mlruns for this run's files" in capsys.readouterr().err
    assert not here.exists()

    code = re.search(r"<<'END'\n(.*)END\n", (ROOT / "docs" / "tracking.md").read_text(), re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", code, here], cwd=moved, check=True)
    track(moved, monkeypatch, "third")
    assert "moved or copied" not in capsys.readouterr().err
    assert len(list(moved.glob("mlruns/*/*/artifacts/third"))) == 1


def test_places_for_files_that_a_user_chose_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for uri, artifacts in (
            ("sqlite:///mlflow.db", "s3://bucket/mlruns/1/x/artifacts"),
            ("sqlite:///mlflow.db", "/somewhere/files/1/x/artifacts"),
            ("sqlite:///mlflow.db", f"file://{tmp_path}/mlruns/1/x/artifacts"),
            (f"sqlite:///{tmp_path}/store/my.db", f"{tmp_path}/elsewhere/mlruns/1/x/artifacts"),
            ("http://host", "/absent/mlruns/1/x/artifacts")):
        assert lost_artifacts(uri, artifacts) is None
    for artifacts in ("/absent/mlruns/1/x/artifacts", "file:///absent/mlruns/1/x/artifacts"):
        assert lost_artifacts("sqlite:///mlflow.db", artifacts) == Path("/absent/mlruns")


NOBODY = [  # a user of no name, who may read everything, as Python and this checkout may lie in somebody's home
    "setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search", "env", *(f"--unset={name}" for name in ("HOME", "USER", "LOGNAME", "USERNAME"))]


RECORD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from machinery.config import load_config
from machinery.errors import one_line
from machinery.tracking import Tracker
with one_line("train.py"):
    Tracker(load_config(), "runs/x", threads=1)
"""


def as_nobody(folder, *words):
    return subprocess.run([*NOBODY, *words], cwd=folder, capture_output=True, text=True, timeout=HANGS)


PRIVATE = [folder for folder in (ROOT, *ROOT.parents) if not folder.stat().st_mode & 0o001]


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can be another user")
@pytest.mark.skipif(bool(PRIVATE), reason=f"another user cannot get to this code: {PRIVATE}")
def test_a_user_without_a_name_and_a_home_trains_but_not_into_somebody_elses_store(tmp_path):
    os.chown(tmp_path, 12345, 12345)
    short = ["ppo.total_frames=600", "evaluation.episodes=1"]
    done = as_nobody(tmp_path, *command("--config", CONFIG, "run.name=x", *TINY, *short))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "runs" / "x" / "report.json").exists()
    assert list((tmp_path / "runs" / "x" / "videos").glob("best*.mp4"))
    assert only_run(tmp_path)[1].info.status == "FINISHED"

    os.chown(tmp_path / "mlflow.db", 0, 0)
    done = as_nobody(tmp_path, sys.executable, "-c", RECORD)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "MLflow store sqlite:///mlflow.db cannot be used: attempt to write a readonly database" in line


def test_a_real_control_group_is_seen(tmp_path):
    old = Path("/sys/fs/cgroup/cpu")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"landing-{os.getpid()}"
    file, half = ("cpu.cfs_quota_us", "50000") if old.is_dir() else ("cpu.max", "50000 100000")
    try:
        group.mkdir()
        (group / file).write_text(half)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); from machinery.device import cores_for; "
        "from machinery.processes import SINGLE_PROCESS; print(cores_for(SINGLE_PROCESS))")
    try:
        words = [sys.executable, "-c", code, group / "cgroup.procs"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    assert done.stdout == "1\n"
    assert len(os.sched_getaffinity(0)) == cores_for(SINGLE_PROCESS)  # outside that group


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no second thread to lose")
def test_beside_other_work_an_update_goes_on_with_one_thread_and_keeps_to_it(tmp_path, capsys):
    words = [*(word for word in TINY if not word.startswith("run.num_threads")), *BARE, "run.name=x",
             "ppo.total_frames=1800"]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        done = run(tmp_path, "--config", CONFIG, *words)
    finally:
        for process in busy:
            process.kill()
    count = len(os.sched_getaffinity(0))
    assert f"{count} threads" in done.stdout
    assert done.stdout.count("updates go on with 1 thread") == 1
    for choice, told in ([], "1 thread"), (["run.num_threads=2"], "2 threads"):
        run_here(tmp_path, "--resume", "runs/x", *choice, f"ppo.total_frames={2200 + 500 * len(choice)}")
        said = capsys.readouterr().out
        assert f" {told}\n" in said
        assert ("was elsewhere before" in said) == bool(choice)  # it keeps to one thread, as it would have done


MAC = """
import builtins, ctypes, multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker, os, subprocess, sys
import numpy, psutil  # they ask for the platform when they are imported

if any(word.endswith("train.py") for word in sys.orig_argv):  # not in its workers, which need no torch
    import torch

for name in ("sched_getaffinity", "sched_setaffinity", "sched_setscheduler", "sched_param", "SCHED_BATCH"):
    delattr(os, name)
sys.platform = "darwin"
real_open, real_getattr = builtins.open, ctypes.CDLL.__getattr__


def no_proc(file, *args, **settings):
    if str(file).startswith(("/proc", "/sys")) and "psutil" not in sys._getframe(1).f_globals.get("__name__", ""):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return real_open(file, *args, **settings)


def other_libc(self, name):
    if name in ("prctl", "mallopt"):
        raise AttributeError(name)
    return real_getattr(self, name)


builtins.open, ctypes.CDLL.__getattr__ = no_proc, other_libc
"""


def test_it_trains_where_there_is_no_proc_no_affinity_and_another_libc(tmp_path):
    """As on a Mac: every process of the run begins by losing what only Linux has."""
    (tmp_path / "sitecustomize.py").write_text(MAC)
    words = ["--config", CONFIG, "run.name=x", *TINY, "ppo.total_frames=1000", "evaluation.videos=0"]
    done = run(tmp_path, *words, PYTHONPATH=str(tmp_path))
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "runs" / "x" / "report_sampled.json").exists()
    again = run(tmp_path, "--resume", "runs/x", "ppo.total_frames=1500", PYTHONPATH=str(tmp_path))
    assert "Traceback" not in again.stdout + again.stderr
    assert int(rows(tmp_path / "runs" / "x")[-1]["frames"]) >= 1500


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "sweep.py", "plot.py"])
def test_on_windows_one_line_says_what_to_do(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys, cv2, gymnasium, torch, tqdm\nsys.platform = 'win32'\n")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "Windows lacks some of what this program needs; it runs in the Windows Subsystem for Linux (WSL)"


def test_random_numbers_of_another_kind_of_gpu_are_left_alone(monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put_back.append(state))
    own, of_a_mac = torch.ones(16, dtype=torch.uint8), torch.ones(44, dtype=torch.uint8)
    set_rng_state(torch.device("cuda"), [of_a_mac])
    set_rng_state(torch.device("cpu"), [own])
    assert not put_back
    set_rng_state(torch.device("cuda"), [own])
    assert put_back == [own]


def test_a_gpu_that_torch_does_not_have_is_one_line(tmp_path):
    line = refused(tmp_path, "--config", CONFIG, "run.device=mps", *TINY)
    assert line.startswith("train.py: run.device=mps: torch has no Metal here")
