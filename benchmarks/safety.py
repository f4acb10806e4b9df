"""What safety costs: the share of training time that checkpoints, bookkeeping and metrics take.

    python benchmarks/safety.py --config configs/cnn.yaml [--updates 30] [section.key=value ...]

Trains for so many updates, in a folder of its own, and clocks what a run does besides learning, where it does it: in
one run, so that whatever else the machine is busy with falls on both. Checkpoints are counted as often as
tracking.checkpoint_interval asks for them, however short this run is. Prints a line of the table in
benchmarks/README.md.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import evaluate, play, whole
from machinery.config import load_config
from machinery.errors import one_line
from machinery.processes import SINGLE_PROCESS
from machinery.run import open_run
from plot import draw_run
from train import Trainer, train

KINDS = ("checkpoints", "bookkeeping", "metrics", "MLflow")


def clocked(seconds, name, function, clock=time.perf_counter):
    """`function`, adding what its calls take to seconds[name]."""
    def call(*args, **settings):
        start = clock()
        try:
            return function(*args, **settings)
        finally:
            seconds[name] += clock() - start
    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).parent.parent / "configs" / "cnn.yaml")
    parser.add_argument("--updates", type=whole(1, 10**6), default=30)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    with one_line("safety.py"):
        measure(args)


def measure(args):
    config = load_config(args.config, args.overrides)
    per_update = config.env.num_envs * config.ppo.num_steps * config.env.frame_skip  # frames, at most
    seconds, saving, scoring = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as name:
        args.config, args.resume = str(Path(args.config).resolve()), None
        args.overrides += [f"ppo.total_frames={args.updates * per_update}", f"tracking.uri=sqlite:///{name}/mlflow.db"]
        os.chdir(name)
        with (open_run(args, SINGLE_PROCESS, play, evaluate, draw_run) as run, closing(Trainer(run.config)) as trainer,
              run.recording(trainer)):
            run.snapshot = clocked(seconds, "bookkeeping", run.snapshot)
            run.save = clocked(saving, "checkpoints", run.save)
            run.score_candidate = clocked(scoring, "candidates", run.score_candidate)  # no part of safety
            run.tracker.log = clocked(seconds, "metrics", run.tracker.log)
            if run.tracker.sender:  # another thread, which takes nothing but processor time
                run.tracker.sender.send = clocked(seconds, "MLflow", run.tracker.sender.send, time.thread_time)
            start = time.perf_counter()
            train(trainer, run)
            total = time.perf_counter() - start - saving["checkpoints"] - scoring["candidates"]
            saving.clear()
            for _ in range(5):
                run.save()
        frames = trainer.counters["env_frames"]
        os.chdir("/")
    # What train() saved was as many checkpoints as so short a run has; what counts is one per checkpoint_interval.
    seconds["checkpoints"] = saving["checkpoints"] / 5 * frames / config.tracking.checkpoint_interval
    everything = total + seconds["checkpoints"]
    shares = {key: seconds[key] / everything for key in KINDS}
    print("| config | updates | s per update | " + " | ".join(shares) + " | together |")
    print("| --- " * (len(shares) + 4) + "|")
    updates = trainer.counters["updates"]
    print(f"| {Path(args.config).stem} | {updates} | {everything / updates:.2f} | "
          + " | ".join(f"{share:.2%}" for share in shares.values()) + f" | {sum(shares.values()):.2%} |")


if __name__ == "__main__":
    main()
