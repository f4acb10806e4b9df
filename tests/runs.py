"""Short real runs of train.py, as a user would start them."""

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import mlflow
import psutil
import pytest
import torch

import train
from evaluate import evaluate, play
from machinery.processes import SINGLE_PROCESS
from machinery.run import open_run
from machinery.terminal import Progress
from plot import draw_run

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "cnn.yaml"
HELD = ROOT / "tests" / "held.py"
TINY = [
    "env.num_envs=4", "ppo.num_steps=32", "ppo.num_minibatches=2", "ppo.total_frames=3000", "evaluation.interval=3000",
    "evaluation.selection_episodes=2", "evaluation.episodes=2", "evaluation.videos=1", "model.features=32",
    "tracking.checkpoint_interval=500", "run.num_threads=1"]
THREADS = torch.get_num_threads()
BARE = ["tracking.mlflow=false", "evaluation.episodes=0"]  # for runs whose end does not matter
HANGS = 900  # seconds: what takes longer hangs, however slow or busy the machine


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *map(str, args)]


def run(folder, *args, ok=True, **environment):
    done = subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, timeout=HANGS, check=False,
                          env=os.environ | environment)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(folder, *args):
    """As `run`, in this process: without the seconds in which a new one loads everything."""
    torch.set_num_threads(THREADS)  # as many as a new process has: first weights depend on it
    with inside(folder):
        train.main([*map(str, args)])


def refused(folder, *args, **environment):
    """The one line with which a command line of train.py is refused."""
    if not environment:
        with pytest.raises(SystemExit) as ended:
            run_here(folder, *args)
        assert "\n" not in ended.value.code
        return ended.value.code
    done = run(folder, *args, ok=False, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def start(folder, *args, held=None):
    """`held`: after how many updates the run waits for `go`, see held.py."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    words = command(*args) if held is None else [sys.executable, HELD, str(held), *map(str, args)]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=environment)


def output_of(process):
    """What `process` wrote to its standard output until its end."""
    return process.communicate(timeout=HANGS)[0]


def go(folder, held):
    (folder / f"go-{held}").touch()


@contextmanager
def no_room(size=1):
    """A limit on the size of files stands in for a full disk, here and in processes that are started meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def inside(folder):
    """`folder` is the working folder meanwhile."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextmanager
def begun(folder, overrides):
    """The Run of a new training, runs/begun in `folder`, just before its first iteration."""
    args = argparse.Namespace(resume=None, config=str(CONFIG), overrides=[*overrides, "run.name=begun"])
    with (
            inside(folder), open_run(args, SINGLE_PROCESS, play, evaluate, draw_run) as run,
            closing(train.Trainer(run.config)) as trainer):
        run.watch.deferred, run.trainer, run.progress = True, trainer, Progress(1, 0, silent=True)
        run._take_snapshot()
        run.saved_frames = 0
        yield run


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_speed(table):
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in table]


def wait(process, condition):
    for _ in range(20 * HANGS):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    pytest.fail("no progress")


def wait_for_rows(process, folder, count):
    wait(process, lambda: (folder / "metrics.csv").exists() and len(rows(folder)) >= count)


def wait_until_held(process, folder, held, processes=1):
    wait(process, lambda: all((folder / f"held-{held}-{rank}").exists() for rank in range(processes)))


def workers_of(process):
    """The processes that play landers; another child of the trainer keeps account of shared memory."""
    workers = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # a child that lives shortly, as git does
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def read_terminal(master):
    """All that is written to a pseudo-terminal until nobody holds its other end; bytes. Closes this one."""
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
    return output


def only_run(folder):
    """The one MLflow run that the store in `folder` holds."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("lunar-lander").experiment_id])
    return client, found
