"""A search for settings, made by Optuna: what to try next, what to stop early, and what mattered.

    ranges = {"ppo.num_steps": distribution("ppo.num_steps=32,64", 64)}
    search = Search("sqlite:///runs/NAME.db", "NAME", "frames", ranges, described, count=30)
    search.run(jobs_of, at_once, parent, watch)             # jobs_of(name, overrides) gives the runs of a trial

A trial is one choice of settings. Its runs, one for each seed, follow each other, and its value is their median. Trials
are in a database, so that a search goes on after any end, and other machines can take part in it.
"""

import os
import platform
import re
import signal
import statistics
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import optuna
import psutil
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from machinery.config import ConfigError, masked
from machinery.drawing import Figure
from machinery.errors import UserError, first_line
from machinery.files import locked, write_atomically
from plot import PlotError, reached, read_metrics

GOALS = {  # what a search looks for: how its values are called, and their direction
    "frames": ("M frames to the solved mark", "minimize"),
    "minutes": ("minutes to the solved mark", "minimize"),
    "score": ("greedy score", "maximize")}
STEPS = 20  # of each run at which trials are compared
PATIENCE = 5  # of this many in a row none could be trained: the search is given up
RANGE = re.compile(r"(log:)?(\S+?)\.\.(\S+)")
optuna.logging.set_verbosity(optuna.logging.WARNING)


class SearchError(UserError):
    """The study cannot be used, or nothing in it can be trained."""


def distribution(override, usual):
    """What `section.key=low..high`, `=log:low..high` or `=value,value` lets Optuna choose from; None of one value.

    `usual`, the key's value elsewhere, tells whether whole numbers are meant. ConfigError for a range that is none.
    """
    text = override.partition("=")[2].strip()
    if isinstance(usual, str) or not (match := RANGE.fullmatch(text)):  # a text may be a path with .. in it
        return CategoricalDistribution(text.split(",")) if "," in text and not text.startswith("[") else None
    log, *ends = match.groups()
    whole = isinstance(usual, int) and not isinstance(usual, bool)
    try:
        low, high = (int(end) if whole else float(end) for end in ends)
        return (IntDistribution if whole else FloatDistribution)(low, high, log=bool(log))
    except ValueError as error:
        number = "whole number" if whole else "number"
        raise ConfigError(
            f"{override}: a range is written low..high or log:low..high, of {number}s ({first_line(error)})") from None


def ends(choice):
    """The values that a distribution lies between, or all of its choices."""
    return choice.choices if isinstance(choice, CategoricalDistribution) else (choice.low, choice.high)


def overrides_of(params):
    """`section.key=value` of a trial's settings."""
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


class Search:
    """Trials in a study that other processes may share.

    url: of a database, as SQLAlchemy writes it. ranges: {"section.key": distribution}. described: what else the search
    is, which its study keeps; another search may not go on with it. count: of trials, completed and stopped early.
    """

    def __init__(self, url, name, goal, ranges, described, count):
        self.goal, self.ranges, self.count, self.failures = goal, ranges, count, 0
        ours = described | {"goal": goal, "ranges": {key: repr(value) for key, value in ranges.items()}}
        try:
            Path("runs").mkdir(exist_ok=True)
            with locked(Path("runs"), wait=True):  # two that made the tables of one database at once would fail
                self.study = optuna.create_study(
                    storage=url, study_name=name, direction=GOALS[goal][1], load_if_exists=True,
                    pruner=optuna.pruners.MedianPruner(n_warmup_steps=STEPS // 4))
            kept = self.study.user_attrs
            for key, value in ours.items():
                if key not in kept:
                    self.study.set_user_attr(key, value)
        except Exception as error:  # of a database or of its driver
            raise SearchError(f"study {masked(url)} cannot be used: {first_line(error)}") from error
        differ = [
            f"{key} was {kept[key]}, asked for {value}" for key, value in ours.items() if kept.get(key, value) != value]
        if differ:
            raise ConfigError(f"{masked(url)}: is another search: {'; '.join(differ)}; choose another --name")
        self._put_back_what_was_killed()

    def trials(self, *states):
        return self.study.get_trials(deepcopy=False, states=states or None)

    def run(self, jobs_of, at_once, parent, watch):
        """Trials until there are enough of them, `at_once` beside each other, or until a signal.

        jobs_of(name, overrides) gives the runs of a trial, parent is a ParentRun, watch a SignalWatch.
        """
        active, watch.deferred = [], True
        try:
            while not watch.received:
                while len(active) < at_once and (attempt := self._begin(jobs_of)):
                    active.append(attempt)
                if not active:
                    break
                for attempt in list(active):
                    if said := attempt.advance(parent.id):
                        active.remove(attempt)
                        print(f"trial {attempt.trial.number}: {said}", flush=True)
                        parent.tag_children(
                            [job.folder.name for job in attempt.jobs], "trial", f"{attempt.trial.number}: {said}",
                            finished=bool(attempt.values))
                        if best := self.best_first():
                            parent.log(f"search/best_{self.goal}", best[0].value, step=attempt.trial.number)
                time.sleep(0.5)
        except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
            raise SearchError(
                f"the study cannot be used any more: {first_line(error)}; the same command goes on") from error
        finally:  # also if a run could not be started
            for attempt in active:
                attempt.stop(watch.received or signal.SIGTERM)

    def _begin(self, jobs_of):
        """The next Attempt; None if there are enough."""
        while len(self.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)) < self.count:
            trial = self.study.ask(self.ranges)
            name = trial.user_attrs.get("name", f"trial-{trial.number:03d}")
            for key, value in {"name": name, "host": platform.node(), "process": own_process()}.items():
                trial.set_user_attr(key, value)
            try:
                attempt = Attempt(self, trial, jobs_of(name, overrides_of(trial.params)))
                print(f"trial {trial.number}: {' '.join(overrides_of(trial.params))}", flush=True)
                return attempt
            except ConfigError as error:  # settings that do not go with each other
                self.fail(trial, error)
        return None

    def fail(self, trial, why):
        print(f"trial {trial.number}: {why}", flush=True)
        self.study.tell(trial, state=TrialState.FAIL)
        self.failures += 1
        if self.failures == PATIENCE:
            raise SearchError(f"{PATIENCE} trials in a row could not be trained, the last one: {why}")

    def put_back(self, trial):
        """Another trial will have its settings, and go on with its runs."""
        self.study.enqueue_trial(trial.params, user_attrs={"name": trial.user_attrs["name"]})
        self.study.tell(trial.number, state=TrialState.FAIL)

    def _put_back_what_was_killed(self):
        for trial in self.trials(TrialState.RUNNING):
            mine = trial.user_attrs.get("host") == platform.node()
            if mine and "process" in trial.user_attrs and not is_alive(trial.user_attrs["process"]):
                self.put_back(trial)

    def best_first(self):
        """Completed trials, the best first."""
        return sorted(self.trials(TrialState.COMPLETE), key=lambda trial: trial.value,
                      reverse=GOALS[self.goal][1] == "maximize")

    def importances(self):
        """{key: share of the values' variance} by fANOVA (Hutter et al. 2014); {} where too little is known."""
        completed = self.trials(TrialState.COMPLETE)
        if len({trial.value for trial in completed}) < 2 or len(completed) < 4:
            return {}
        forest = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(self.study, evaluator=forest)


def own_process():
    return [os.getpid(), psutil.Process().create_time()]


def is_alive(process):
    """Whether the process of that id is the one that was started at that time."""
    with suppress(psutil.NoSuchProcess):
        return abs(psutil.Process(process[0]).create_time() - process[1]) < 1
    return False


class Attempt:
    """A trial under way. `jobs`: its runs, one per seed; see sweep.Job."""

    def __init__(self, search, trial, jobs):
        self.search, self.trial, self.jobs = search, trial, jobs
        self.process, self.values, self.told = None, [], 0

    def advance(self, parent):
        """Looks at the run of the moment and starts the next; what is to be said when the trial is over, else None."""
        job = self.jobs[len(self.values)]
        metrics = self._metrics(job)
        value = None if metrics is None else self._value(job, metrics)
        if value is not None:
            self._report(job, metrics, STEPS)
            self._end(signal.SIGTERM)
            self.values.append(value)
        elif metrics is not None and self._hopeless(job, metrics):
            self._end(signal.SIGTERM)
            self.search.study.tell(self.trial, state=TrialState.PRUNED)
            return f"stopped early in {job.folder}, after {metrics['frames'][-1] / 1e6:.2f} M frames"
        elif self.process is None:
            if not is_held(job.folder):  # by what a search that was killed has left behind
                self.process = job.start(parent, own_log=True)
        elif self.process.poll() is not None:
            self.search.fail(self.trial, f"{job.folder} ended with {self.process.returncode}; see its train.log")
            return "failed"
        if len(self.values) < len(self.jobs):
            return None
        value = statistics.median(self.values)
        self.search.study.tell(self.trial, value)
        self.search.failures = 0
        return f"{value:.3g} {GOALS[self.search.goal][0]}"

    def stop(self, number):
        """The same after a signal: its runs are saved, and a later search goes on with them."""
        self._end(number)
        self.search.put_back(self.trial)

    def _end(self, number):
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(number)
                self.process.wait()
            self.process = None

    def _metrics(self, job):
        with suppress(PlotError):  # nothing there yet
            return read_metrics(job.folder)

    def _value(self, job, metrics):
        """What this run is worth; None as long as that is open.

        A run that has not reached the mark counts as if it had needed longer than it was, by the part of the way that
        it lacked: twice as long if it learned nothing.
        """
        goal, mark = self.search.goal, job.config.env.task.solved
        if goal == "score":
            return job.score() if job.done() else None
        if hit := reached(metrics, mark):
            frames, seconds = hit
        elif job.done():
            returns = metrics["rollout/return_mean"]
            first, best = returns[np.isfinite(returns)][0], np.nanmax(returns)
            lacking = 1 + min(1.0, (mark - best) / (mark - first))
            frames, seconds = metrics["frames"][-1] * lacking, metrics["speed/total_seconds"][-1] * lacking
        else:
            return None
        return float(frames / 1e6 if goal == "frames" else seconds / 60)

    def _hopeless(self, job, metrics):
        """Whether at the last step half of all trials were better than this one has ever been."""
        passed = int(metrics["frames"][-1] * STEPS / job.config.ppo.total_frames)
        return self._report(job, metrics, min(passed, STEPS)) and self.trial.should_prune()

    def _report(self, job, metrics, steps):
        """Tell the study the best return until each of a run's `steps` that it does not know; whether there were any.

        A run that has reached its goal stays at its best for the rest of its steps.
        """
        before, sign = self.told, 1 if GOALS[self.search.goal][1] == "maximize" else -1
        while self.told < len(self.values) * STEPS + steps:
            until = (self.told % STEPS + 1) / STEPS * job.config.ppo.total_frames
            returns = metrics["rollout/return_mean"][metrics["frames"] <= until]
            if np.isfinite(returns).any():
                self.trial.report(sign * float(np.nanmax(returns)), self.told)
            self.told += 1
        return self.told > before


def is_held(folder):
    """Whether a process trains in it."""
    if not folder.is_dir():
        return False
    try:
        with locked(folder):
            return False
    except UserError:
        return True


def table(search, rows=10):
    """The best trials as Markdown."""
    keys = list(search.ranges)
    lines = [f"| trial | {GOALS[search.goal][0]} | {' | '.join(keys)} |", "| --- " * (2 + len(keys)) + "|"]
    for trial in search.best_first()[:rows]:
        told = [override.partition("=")[2] for override in overrides_of(trial.params)]
        lines.append(f"| {trial.number} | {trial.value:.3g} | {' | '.join(told)} |")
    return "\n".join(lines)


def draw_search(search, output):
    """The value of every trial in order, and over each setting, with the share that the setting mattered; a PNG."""
    completed, importances = search.trials(TrialState.COMPLETE), search.importances()
    numbers, values = np.array([[t.number, t.value] for t in completed]).T
    maximize = GOALS[search.goal][1] == "maximize"
    keys = sorted(search.ranges, key=lambda key: -importances.get(key, 0))
    columns = min(4, 1 + len(keys))
    rows = -(-(1 + len(keys)) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    first.plot(numbers, values, "o", markersize=4)
    best = (np.maximum if maximize else np.minimum).accumulate(values)
    first.step(numbers, best, where="post", label="best so far")
    for trial in search.trials(TrialState.PRUNED):
        first.axvline(trial.number, color="black", alpha=0.1, linewidth=3)
    first.set(title="trials; gray: stopped early", xlabel="trial", ylabel=GOALS[search.goal][0])
    first.legend(fontsize=8)
    for axis, key in zip(others, keys, strict=False):
        told = search.ranges[key]
        choices = ends(told) if isinstance(told, CategoricalDistribution) else None
        places = [choices.index(t.params[key]) if choices else t.params[key] for t in completed]
        axis.scatter(places, values, c=numbers, cmap="viridis", s=16)
        if choices:
            axis.set_xticks(range(len(choices)), choices)
        elif told.log:
            axis.set_xscale("log")
            axis.tick_params(axis="x", which="minor", labelbottom=False)
        mattered = f", mattered {importances[key]:.0%}" if key in importances else ""
        axis.set(title=key.partition(".")[2] + mattered, xlabel=key)
    for axis in (first, *others[: len(keys)]):
        axis.grid(alpha=0.3)
    for axis in others[len(keys):]:
        axis.set_axis_off()
    picture = BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    write_atomically(output, picture.getvalue())
