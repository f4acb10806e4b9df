"""Kills a training run again and again, resumes it each time, and compares it with one that was left alone.

    python benchmarks/torture.py [--kills 50] [--how trainer|group|worker|disk] [--seed 0]

trainer: SIGKILL to the trainer at a random instant, while it starts, collects, learns or writes one of its checkpoints,
which it does after every update. group: SIGTERM to trainer and workers at once. worker: SIGKILL to a random worker,
which the trainer has to replace. disk: for a while no file takes another byte (RLIMIT_FSIZE), and every third time the
trainer is killed in the midst of it. At the end weights, landers and metrics.csv must be those of the other run, bit
for bit, every checkpoint must be whole, no process left, and MLflow must hold one run. Exits with 1 otherwise.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch

from machinery.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from tests.runs import CONFIG, TINY, only_run, rows, run, start, wait_for_rows, without_speed, workers_of

OUT_OF_ROOM = 1  # exit status of a life that began or ended while the disk was full
SETTINGS = [*TINY, "evaluation.episodes=0", "tracking.checkpoint_interval=1"]


def lives(folder, how, kills, dice, arguments):
    """Kill and resume until `kills` are done, then let the run end.

    Returns resumes, processes that outlived their trainer, and kills for which the run did not live long enough.
    """
    resumes, orphans, process = 0, [], start(folder, *arguments)
    metrics = folder / "runs" / "tortured" / "metrics.csv"
    wait_for_rows(process, metrics.parent, 2)  # before the first checkpoint there is nothing to resume
    while kills and process.poll() in (None, OUT_OF_ROOM):
        if process.returncode == OUT_OF_ROOM and how == "disk":
            process = start(folder, "--resume", "runs/tortured")
            resumes += 1
        # A few lives end while they start, most while they train or save.
        before, training = metrics.stat().st_mtime_ns, how == "worker" or dice.random() < 0.8
        while training and process.poll() is None and metrics.stat().st_mtime_ns == before:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 1.0))
        if process.poll() is not None:
            if how == "disk":
                continue  # if it ended for want of room, the next life begins
            break
        children = psutil.Process(process.pid).children(recursive=True)
        if how == "worker":
            workers = workers_of(process)
            if workers:
                dice.choice(workers).kill()
                kills -= 1
            continue
        if how == "disk":
            kills -= 1
            full = psutil.Process(process.pid)
            full.rlimit(psutil.RLIMIT_FSIZE, (1, psutil.RLIM_INFINITY))
            time.sleep(dice.uniform(0, 3.0))
            if process.poll() is not None:
                continue
            if kills % 3:
                full.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
                continue
        (os.killpg if how == "group" else os.kill)(process.pid, signal.SIGTERM if how == "group" else signal.SIGKILL)
        process.communicate(timeout=120)
        kills -= how != "disk"
        orphans += psutil.wait_procs(children, timeout=20)[1]
        process = start(folder, "--resume", "runs/tortured")
        resumes += 1
    output = process.communicate(timeout=1200)[0]
    if how == "disk" and process.returncode == OUT_OF_ROOM:  # it came to its end while the disk was full
        process = start(folder, "--resume", "runs/tortured")
        resumes, output = resumes + 1, process.communicate(timeout=1200)[0]
    if process.returncode:
        sys.exit(f"the last life ended with {process.returncode}:\n{output}")
    return resumes, orphans, kills


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--how", choices=("trainer", "group", "worker", "disk"), default="trainer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=60_000, help="a longer run can be killed more often")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--config", CONFIG, *SETTINGS, f"ppo.total_frames={args.frames}"]
        run(folder, *arguments, "run.name=whole", "tracking.mlflow=false")
        resumes, orphans, unused = lives(
            folder, args.how, args.kills, random.Random(args.seed), [*arguments, "run.name=tortured"])
        whole, tortured = folder / "runs" / "whole", folder / "runs" / "tortured"
        differences = []
        for file in tortured.glob("checkpoints/*.ckpt"):
            try:
                read_checkpoint(file)
            except CheckpointError as error:
                differences.append(str(error))
        differences += [f"left behind: {path}" for path in tortured.rglob(".*.tmp")]
        expected, found = load_checkpoint(whole), load_checkpoint(tortured)
        different = [key for key, tensor in expected["policy"].items() if not torch.equal(tensor, found["policy"][key])]
        differences += [f"weights {key}" for key in different]
        differences += [f"process {orphan.pid} left" for orphan in orphans]
        status = only_run(folder)[1].info.status
        checks = {
            "landers": expected["landers"] == found["landers"],
            "metrics.csv": without_speed(rows(whole)) == without_speed(rows(tortured)),
            f"MLflow run is {status}": status == "FINISHED"}
        differences += [what for what, right in checks.items() if not right]
        print(f"{args.how}: {args.kills - unused} kills, {resumes} resumes, {len(differences)} differences")
        sys.exit("\n".join(differences) or 0)


if __name__ == "__main__":
    main()
