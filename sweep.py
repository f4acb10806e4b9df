"""Many runs by one command: every combination of settings with every seed, one after another or several at once.

    python sweep.py --config configs/cnn.yaml --seeds 1 2 3
    python sweep.py --config configs/cnn.yaml --seeds 1 2 3 ppo.learning_rate=1e-3,5e-4 ppo.clip_coef=0.1,0.2
    python sweep.py --config configs/cnn.yaml --seeds 1 2 --jobs 2 env.num_workers=1 run.num_threads=1
    python sweep.py --config configs/cnn.yaml --seeds 1 2 3 --trials 30 ppo.learning_rate=log:3e-4..3e-3

Each is a `train.py` of its own, runs/NAME-SETTING-seed-N, and a child of one MLflow run. With --trials, Optuna chooses
what to try next, and stops what is hopeless. The same command goes on where it was stopped: finished runs are skipped,
unfinished ones resumed.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from machinery.checkpoint import CheckpointError, load_checkpoint
from machinery.config import (
    Config,
    ConfigError,
    ConflictError,
    changed_keys,
    key_of,
    load_config,
    masked,
    split_choices,
    split_override,
)
from machinery.errors import first_line, one_line
from machinery.parent_run import ParentRun
from machinery.run_folder import RESUMABLE, is_finished
from machinery.signals import SignalWatch
from machinery.terminal import Outlet
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

    def score(self):
        """Mean return of its greedy score."""
        return json.loads((self.folder / "report.json").read_text())["return_mean"]

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
    keys, choices = list(map(key_of, overrides)), []
    for key, override in zip(keys, overrides, strict=True):
        if key in ("run.seed", "run.name"):
            raise ConfigError(f"{override}: a sweep gives each run its seed and name; use --seeds and --name")
        choices.append([f"{key}={value}" for value in split_choices(split_override(override)[1])])
        if len(choices[-1]) > 1 and keys.count(key) > 1:  # the last would win, whatever the run is called
            raise ConfigError(f"{key}: is given twice")
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
            for job in jobs[:-1]:
                if job.folder == jobs[-1].folder:
                    raise ConfigError(f"{job.folder}: two runs of this sweep would have this name")
                if changed_keys(job.config, jobs[-1].config).keys() <= {"run.name"}:
                    raise ConfigError(f"{jobs[-1].folder}: would be {job.folder} once more")
    return jobs


def plan_search(args, name, seeds, overrides):
    """(Search, what gives the jobs of a trial, what all have in common, a Config) of a command line with --trials."""
    from machinery.search import Search, distribution, ends, first_of  # it loads Optuna, which other sweeps do not need

    keys = list(map(key_of, overrides))
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"{twice[0]}: is given twice")
    unscored = ["evaluation.episodes=0"] if args.goal != "score" else []  # scores take longer than many a way
    firsts = list(filter(None, map(first_of, overrides)))
    fixed, ranges = [override for override in overrides if not first_of(override)], {}

    def with_firsts():
        try:
            return load_config(args.config, [*unscored, *fixed, *firsts])
        except ConfigError:  # they do not go together, are not allowed, or one is a path with .. in it
            return load_config(args.config, [*unscored, *fixed])

    usual = with_firsts()
    for key, override in zip(keys, overrides, strict=True):
        if override in fixed:
            continue
        if found := distribution(override, usual.flat().get(key)):
            ranges[key] = found
        else:
            fixed.append(override)
    firsts = [first for first in firsts if key_of(first) in ranges]
    config = with_firsts()
    if not ranges:
        raise ConfigError("--trials: nothing to choose from; ranges are written ppo.learning_rate=log:3e-4..3e-3, "
                          "ppo.gamma=0.98..0.999 and ppo.num_steps=32,64")

    def jobs_of(trial, chosen):
        return plan(args.config, f"{name}-{trial}", seeds, [*unscored, *fixed, *chosen])

    for key, found in ranges.items():
        for end in ends(found):
            with suppress(ConflictError):  # with another choice of another setting it may do
                jobs_of("check", [f"{key}={end}"])
    if args.goal == "score" and not config.evaluation.episodes:
        raise ConfigError("--goal score needs evaluation.episodes of 1 or more")
    if args.goal != "score" and config.env.task.solved is None:
        raise ConfigError(f"--goal {args.goal}: nobody has said when {config.env.id} is solved; use --goal score")
    search = Search(args.study or f"sqlite:///runs/{name}.db", name, args.goal, ranges, config, args.trials)
    if not search.trials() and (old := next(Path("runs").glob(f"{name}-trial-*"), None)):
        raise ConfigError(f"{old}: is a run of an earlier search; remove it, or choose another --name")
    return search, jobs_of, fixed, config


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
                    scores.append(job.score())
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


def report_search(search, source, fixed, parent, name):
    """Print the best trials, and how to train with the best of them; draw all."""
    from machinery.search import overrides_of
    from machinery.search_report import draw_search, table

    best = search.best_first()
    if not best:
        return
    importances, picture = search.importances(), Path("runs") / f"{name}.png"
    mattered = ", ".join(f"{key} {share:.0%}" for key, share in importances.items())
    words = ["python", "train.py", "--config", source, *map(masked, fixed), *overrides_of(best[0].params)]
    print(f"\n{table(search)}\n\nwhat mattered: {mattered or 'too few trials to tell'}\n\n{shlex.join(words)}",
          flush=True)
    draw_search(search, importances, picture)
    print(picture)
    parent.keep(picture)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", nargs="+", default=["1"], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; more than one, or of a search, write their "
                        "own train.log")
    parser.add_argument("--name", help="what the runs' names begin with; default: the config's")
    parser.add_argument("--trials", type=int, metavar="N", help="a search by Optuna, until it has N trials")
    parser.add_argument("--goal", choices=("frames", "minutes", "score"),
                        help="of a search: fewest frames (default) or minutes to the solved mark, or the highest score")
    parser.add_argument("--study", metavar="URL", help="of a search: its database; default: sqlite:///runs/NAME.db")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value,value")
    args = parser.parse_intermixed_args(argv)
    overrides = [*args.overrides, *(word for word in args.seeds if "=" in word)]  # --seeds takes all that follows it
    seeds = list(dict.fromkeys(word for word in args.seeds if "=" not in word))
    name, watch = args.name or Path(args.config).stem, SignalWatch()
    with one_line("sweep.py"):
        for key in ("jobs", "trials"):
            if (number := getattr(args, key)) is not None and number < 1:
                raise ConfigError(f"--{key} {number}: must be 1 or more")
        if not seeds:
            raise ConfigError("--seeds: must name one or more")
        if (args.goal or args.study) and not args.trials:
            raise ConfigError("--goal and --study are of a search; --trials says how many")
        args.goal = args.goal or "frames"
        if args.trials:
            search, jobs_of, fixed, config = plan_search(args, name, seeds, overrides)
        else:
            jobs = plan(args.config, name, seeds, overrides)
            config = jobs[0].config
        parent, status, failed = ParentRun(config.tracking, name), "FAILED", {}
        try:
            if args.trials:
                search.run(jobs_of, args.jobs, parent, watch)
                report_search(search, args.config, fixed, parent, name)
            else:
                failed = run_all(jobs, args.jobs, parent.id, watch)
                print(f"\n{summary(jobs)}\n\n{plot_command(jobs)}")
            status = "KILLED" if watch.received else "FAILED" if failed else "FINISHED"
        finally:
            parent.close(status)
    if watch.received:
        print("stopped; the same command goes on")
        sys.exit(128 + watch.received)
    if failed:
        sys.exit("sweep.py: " + ", ".join(f"{folder} ended with {code}" for folder, code in failed.items()))


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
