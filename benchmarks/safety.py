"""What safety costs: the share of training time that checkpoints, bookkeeping, metrics and watching the workers take.

    python benchmarks/safety.py --config configs/cnn.yaml [--updates 30] [section.key=value ...]

Trains for so many updates, in a folder of its own, and clocks what train.py does besides learning, where it does it: in
one run, so that whatever else the machine is busy with falls on both. Checkpoints are counted as often as
tracking.checkpoint_interval asks for them, however short this run is. Prints a line of the table in the README.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from config import ConfigError, load_config
from distributed import ALONE
from tracking import Tracker

KINDS = ("checkpoints", "bookkeeping", "metrics", "MLflow", "watching workers")


def clocked(seconds, name, function, clock=time.perf_counter):
    """`function`, adding what its calls take to seconds[name]."""
    def call(*args, **settings):
        start = clock()
        try:
            return function(*args, **settings)
        finally:
            seconds[name] += clock() - start
    return call


class Watch(train.SignalWatch):
    """What train() asks whether it is to stop."""

    def __init__(self):
        self.received, self.patient, self.world = None, False, ALONE


def polls(vector_env, seconds):
    """Clock what a step spends on its time limit: asking each pipe before it is read, once all answers are there."""
    ask = vector_env._poll_pipe_envs

    def answered(timeout):
        for pipe in vector_env.parent_pipes:  # the workers' own time, which is no cost of watching
            pipe.poll(timeout)
        start = time.perf_counter()
        done = ask(timeout)
        seconds["watching workers"] += time.perf_counter() - start
        return done

    vector_env._poll_pipe_envs = answered


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).parent.parent / "configs" / "cnn.yaml")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        sys.exit(f"safety.py: {error}")
    per_update = config.env.num_envs * config.ppo.num_steps * config.env.frame_skip  # frames, at most
    seconds = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(args.config, [
            *args.overrides, f"ppo.total_frames={args.updates * per_update}", f"tracking.uri=sqlite:///{name}/mlflow.db"])
        (folder / "checkpoints").mkdir()
        trainer = train.Trainer(config, folder)
        try:
            with Tracker(config, folder, trainer.num_threads) as tracker:
                polls(trainer.envs, seconds)
                trainer._follow = clocked(seconds, "bookkeeping", trainer._follow)
                trainer.snapshot = clocked(seconds, "bookkeeping", trainer.snapshot)
                trainer.select = lambda metrics: None  # scoring candidates is no part of safety
                tracker.log = clocked(seconds, "metrics", tracker.log)
                if tracker.sender:  # another thread, which takes nothing but processor time
                    tracker.sender.send = clocked(seconds, "MLflow", tracker.sender.send, time.thread_time)
                saving = Counter()
                trainer.save = clocked(saving, "checkpoints", trainer.save)
                start = time.perf_counter()
                train.train(trainer, tracker, Watch())
                total = time.perf_counter() - start - saving["checkpoints"]
                saving.clear()
                for _ in range(5):
                    trainer.save(trainer.snapshot())
        finally:
            trainer.close()
        frames = trainer.counters["env_frames"]
    # What train() saved was as many checkpoints as so short a run has; what counts is one per checkpoint_interval.
    seconds["checkpoints"] = saving["checkpoints"] / 5 * frames / config.tracking.checkpoint_interval
    everything = total + seconds["checkpoints"]
    shares = {key: seconds[key] / everything for key in KINDS}
    print("| config | updates | s per update | " + " | ".join(shares) + " | together |")
    print("| --- " * (len(shares) + 4) + "|")
    print(f"| {config.model.name} | {trainer.counters['updates']} | {everything / trainer.counters['updates']:.2f} | "
          + " | ".join(f"{share:.2%}" for share in shares.values()) + f" | {sum(shares.values()):.2%} |")


if __name__ == "__main__":
    main()
