"""Many runs by one command: every combination of settings with every seed, one after another or several at once.

    python sweep.py --config configs/cnn.yaml --seeds 1 2 3
    python sweep.py --config configs/cnn.yaml --seeds 1 2 3 ppo.learning_rate=1e-3,5e-4 ppo.clip_coef=0.1,0.2
    python sweep.py --config configs/cnn.yaml --seeds 1 2 --jobs 2 env.num_workers=1 run.num_threads=1

Each is a `train.py` of its own, runs/NAME-SETTING-seed-N, and a child of one MLflow run. The same command goes on where
it was stopped: finished runs are skipped, unfinished ones resumed.
"""

import signal
import sys

if __name__ == "__main__" and "IPython" not in sys.modules:  # a notebook has a handler of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loaded; SignalWatch takes over

import argparse
import itertools
import json
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from machinery.checkpoint import CheckpointError, load_checkpoint
from machinery.config import Config, ConfigError, changed_keys, load_config
from machinery.errors import first_line, one_line
from machinery.run_folder import RESUMABLE, is_finished
from machinery.signals import SignalWatch
from machinery.terminal import Outlet
from machinery.tracking import cause, connect, store_error
from plot import PlotError, reached, read_metrics

TRAIN = Path(__file__).parent / "train.py"


@dataclass
class Job:
    setting: str  # what it does not share with the other settings, as "learning_rate=1e-3 clip_coef=0.1"
    folder: Path
    source: str  # the YAML file
    overrides: list
    config: Config

    def begun(self):
        return any(self.folder.glob("checkpoints/*.ckpt"))

    def done(self):
        """Trained for all its frames and scored, as train.py sees it."""
        try:
            return is_finished(self.config, load_checkpoint(self.folder, warn=lambda _: None))
        except (CheckpointError, KeyError, TypeError):  # nothing that can be gone on with; train.py will tell
            return False

    def check_folder(self):
        """ConfigError if the run that is there is not this one."""
        if not (self.folder / "config.yaml").exists():
            return
        changed = changed_keys(load_config(self.folder / "config.yaml"), self.config)
        differ = [f"{key} was {before!r}, asked for {now!r}" for key, (before, now) in changed.items()
                  if not key.startswith(RESUMABLE)]
        if differ:
            raise ConfigError(f"{self.folder} is another run: {', '.join(differ)}; choose another --name")

    def start(self, parent, own_log):
        """The process that trains it; in a session of its own, so that Ctrl-C reaches it through this script, once."""
        may_change = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.config.flat().items()
                      if key.startswith(RESUMABLE) and key != "tracking.parent"]
        how = ["--resume", self.folder, *may_change] if self.begun() else ["--config", self.source, *self.overrides]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = open(self.folder / "train.log", "a") if own_log else None  # noqa: SIM115 (its process keeps it)
        command = [sys.executable, TRAIN, *how, *([f"tracking.parent={parent}"] if parent else [])]
        return subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def plan(source, name, seeds, overrides):
    """The jobs of a sweep, all checked. overrides: `section.key=value` or `section.key=value,value,...`."""
    choices = []
    for override in overrides:
        key, _, values = override.partition("=")
        if key in ("run.seed", "run.name"):
            raise ConfigError(f"{override}: a sweep gives each run its seed and name; use --seeds and --name")
        choices.append([f"{key}={value}" for value in values.split(",")])
    varied = [options for options in choices if len(options) > 1]
    jobs = []
    for combination in itertools.product(*choices):
        told = [choice.partition(".")[2] for choice, options in zip(combination, choices, strict=True)
                if options in varied]
        for seed in seeds:
            parts = [name, *(re.sub(r"[^\w.-]", "-", choice) for choice in told), f"seed-{seed}"]
            own = [*combination, f"run.seed={seed}", f"run.name={'-'.join(parts)}"]
            jobs.append(Job(
                " ".join(told) or name, Path("runs") / "-".join(parts), source, own, load_config(source, own)))
            jobs[-1].check_folder()
            if jobs[-1].folder in [job.folder for job in jobs[:-1]]:
                raise ConfigError(f"{jobs[-1].folder}: two runs of this sweep would have this name")
    return jobs


def open_parent(settings, name):
    """(client, run id) of the MLflow run that holds the sweep's runs as its children; a stopped sweep's goes on."""
    Path("runs").mkdir(exist_ok=True)
    client, experiment = connect(settings, "runs")
    try:
        found = client.search_runs([experiment], f"tags.sweep = '{name}'")
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return client, found[0].info.run_id
        tags = {"sweep": name, "mlflow.runName": name, "mlflow.source.name": "sweep.py"}
        return client, client.create_run(experiment, tags=tags).info.run_id
    except Exception as error:
        raise store_error(settings, error) from error


def close_parent(client, parent, status):
    try:
        client.set_terminated(parent, status)
    except Exception as error:  # trouble with records is no reason to withhold the summary
        print(f"MLflow: {cause(error)}", file=sys.stderr)


def run_all(jobs, at_once, parent, watch):
    """Train what is not done yet; returns {job's folder: exit status} of those that failed."""
    waiting, active, failed = [job for job in jobs if not job.done()], {}, {}
    for job in jobs:
        if job not in waiting:
            print(f"{job.folder}: done before", flush=True)
    watch.deferred = True
    try:
        while (waiting or active) and not watch.received:
            while waiting and len(active) < at_once:
                job = waiting.pop(0)
                print(f"{job.folder}: {'goes on' if job.begun() else 'begins'}", flush=True)
                active[job.start(parent, own_log=at_once > 1)] = job
            time.sleep(0.1)
            for process in [process for process in active if process.poll() is not None]:
                job = active.pop(process)
                if process.returncode:
                    failed[job.folder] = process.returncode
                    print(f"{job.folder}: ended with {process.returncode}", file=sys.stderr, flush=True)
    finally:  # also if one could not be started
        for process in active:
            process.send_signal(watch.received or signal.SIGTERM)
        for process in active:
            process.wait()
    return failed


def spread(values, form):
    """Mean and, of several, range."""
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def summary(jobs):
    """One Markdown row per setting, over the seeds that are done: means, with ranges in parentheses."""
    marks = {job.config.env.task.solved for job in jobs}
    solved = f"{marks.pop():g}" if len(marks) == 1 and marks != {None} else "the solved mark"
    lines = [
        f"| setting | seeds | reached {solved} | M frames to {solved} | minutes to {solved} | greedy score |",
        "| --- | --- | --- | --- | --- | --- |"]
    for setting, group in itertools.groupby(jobs, key=lambda job: job.setting):
        done = [job for job in group if job.done()]
        hits, scores = [], []
        for job in done:
            try:
                hits += filter(None, [reached(read_metrics(job.folder), job.config.env.task.solved)])
                if job.config.evaluation.episodes:
                    scores.append(json.loads((job.folder / "report.json").read_text())["return_mean"])
            except (PlotError, OSError, ValueError, KeyError) as error:  # the others' rows are worth having
                print(f"{job.folder}: {first_line(error)}", file=sys.stderr)
        lines.append(
            f"| {setting} | {len(done)} | {len(hits)} | {spread([frames / 1e6 for frames, _ in hits], '.2f')} | "
            f"{spread([seconds / 60 for _, seconds in hits], '.1f')} | {spread(scores, '.0f')} |")
    return "\n".join(lines)


def plot_command(jobs):
    groups = {}
    for job in jobs:
        if job.done():
            groups.setdefault(job.setting, []).append(str(job.folder))
    words = [f"{setting}={','.join(folders)}" for setting, folders in groups.items()]
    return "python plot.py " + " ".join(map(shlex.quote, words)) if words else ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", nargs="+", default=["1"], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; more than one write their own train.log")
    parser.add_argument("--name", help="what the runs' names begin with; default: the config's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value,value")
    args = parser.parse_intermixed_args(argv)
    overrides = [*args.overrides, *(word for word in args.seeds if "=" in word)]  # --seeds takes all that follows it
    seeds = list(dict.fromkeys(word for word in args.seeds if "=" not in word))
    name, watch = args.name or Path(args.config).stem, SignalWatch()
    with one_line("sweep.py"):
        if args.jobs < 1:
            raise ConfigError(f"--jobs {args.jobs}: must be 1 or more")
        if not seeds:
            raise ConfigError("--seeds: must name one or more")
        jobs = plan(args.config, name, seeds, overrides)
        tracking, client, parent = jobs[0].config.tracking, None, None
        if tracking.mlflow:
            client, parent = open_parent(tracking, name)
        status = "FAILED"
        try:
            failed = run_all(jobs, args.jobs, parent, watch)
            status = "KILLED" if watch.received else "FAILED" if failed else "FINISHED"
        finally:
            if client:
                close_parent(client, parent, status)
    print(f"\n{summary(jobs)}\n\n{plot_command(jobs)}")
    if watch.received:
        print("stopped; the same command goes on")
        sys.exit(128 + watch.received)
    if failed:
        sys.exit("sweep.py: " + ", ".join(f"{folder} ended with {code}" for folder, code in failed.items()))


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
