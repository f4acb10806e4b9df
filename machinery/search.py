"""A search for settings, made by Optuna: what to try next, and what to stop early.

    ranges = {"ppo.num_steps": distribution("ppo.num_steps=32,64", 64)}
    search = Search("sqlite:///runs/NAME.db", "NAME", "frames", ranges, config, count=30)
    search.run(jobs_of, at_once, parent, watch)             # jobs_of(name, overrides) gives the runs of a trial

A trial is one choice of settings. Its runs, one for each seed, follow each other, and its value is their median. Trials
are in a database, so that a search goes on after any end, and other machines can take part in it.
"""

import os
import platform
import re
import signal
import statistics
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import optuna
import psutil
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from machinery.config import ConfigError, masked, split_choices
from machinery.errors import UserError, first_line
from machinery.files import locked
from plot import PlotError, reached, read_metrics

GOALS = {  # what a search looks for: how its values are called, and their direction
    "frames": ("M frames to the solved mark", "minimize"),
    "minutes": ("minutes to the solved mark", "minimize"),
    "score": ("greedy score", "maximize")}
STEPS = 20  # of each run at which trials are compared
COMPARED, SPARED = 5, STEPS // 4  # other trials that this takes, and steps of a run before it
FARTHEST = 10.0  # times its length at most that a run counts as if it had needed to reach the mark
PATIENCE = 5  # trials in a row that could not be trained, after which a search is given up
CONFLICTS = 100  # choices in a row whose settings do not go with each other, after which it is
SEEN_EVERY, LOST_AFTER = 30, 600  # seconds: a trial is noted as under way, and given to another search
RANGE = re.compile(r"(log:)?(\S+?)\.\.(\S+)")
DATABASE_ERRORS = (optuna.exceptions.OptunaError, SQLAlchemyError)
optuna.logging.set_verbosity(optuna.logging.WARNING)


class SearchError(UserError):
    """The study cannot be used, or nothing in it can be trained."""


def distribution(override, usual):
    """What `section.key=low..high`, `=log:low..high` or `=value,value` lets Optuna choose from; None of one value.

    `usual`, the key's value elsewhere, tells whether whole numbers are meant. ConfigError for a range that is none.
    """
    text = override.partition("=")[2].strip()
    if isinstance(usual, str) or not (match := RANGE.fullmatch(text)):  # a text may be a path with .. in it
        values = split_choices(text)
        return CategoricalDistribution(values) if len(values) > 1 else None
    log, *ends = match.groups()
    whole = isinstance(usual, int) and not isinstance(usual, bool)
    try:
        low, high = map(float, ends)
        if not whole:
            return FloatDistribution(low, high, log=bool(log))
        if not (low.is_integer() and high.is_integer()):
            raise ValueError("these are not")
        return IntDistribution(int(low), int(high), log=bool(log))
    except (ValueError, OverflowError) as error:
        number = "whole number" if whole else "number"
        raise ConfigError(
            f"{override}: a range is written low..high or log:low..high, of {number}s ({first_line(error)})") from None


def first_of(override):
    """The first value of a range or of a choice, as `section.key=value`; None of one value."""
    key, _, text = override.partition("=")
    if match := RANGE.fullmatch(text.strip()):
        return f"{key}={match[2]}"
    first, *others = split_choices(text)
    return f"{key}={first}" if others else None


def ends(choice):
    """The values that a distribution lies between, or all of its choices."""
    return choice.choices if isinstance(choice, CategoricalDistribution) else (choice.low, choice.high)


def overrides_of(params):
    """`section.key=value` of a trial's settings, exactly."""
    return [f"{key}={value}" for key, value in params.items()]


def identity(pid):
    """What tells a process from all others on this machine, also later."""
    return [pid, psutil.Process(pid).create_time()]


def living(told):
    """The psutil.Process that `identity` told of; None if it has ended."""
    with suppress(psutil.NoSuchProcess, TypeError):  # TypeError: nothing was told
        process = psutil.Process(told[0])
        if abs(process.create_time() - told[1]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def sign(study):
    """1 where larger values are better, else -1."""
    return 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1


class BehindTheOthers(optuna.pruners.BasePruner):
    """Stops a trial that at the same step of the same run is worse than the median of the others.

    Like optuna.pruners.MedianPruner, which takes the best of all steps for the trial, and so a good first run for a bad
    second one. Values are the best returns so far; the first quarter of a run is spared.
    """

    def prune(self, study, trial):
        step = trial.last_step
        if step is None or step % STEPS < SPARED:
            return False
        others = [other.intermediate_values[step] for other in study.get_trials(deepcopy=False, states=(
            TrialState.COMPLETE, TrialState.PRUNED)) if step in other.intermediate_values]
        if len(others) < COMPARED:
            return False
        return sign(study) * (trial.intermediate_values[step] - statistics.median(others)) < 0


class Search:
    """Trials in a study that other processes may share.

    url: of a database, as SQLAlchemy writes it. ranges: {"section.key": distribution}. config: a Config, from which
    trials differ in the ranges alone; a study of other settings is refused. count: of trials, completed and stopped
    early.
    """

    def __init__(self, url, name, goal, ranges, config, count):
        self.goal, self.ranges, self.count, self.failures = goal, ranges, count, 0
        free = ("run.", "tracking.", "evaluation.")  # may differ between machines, as ranges do between trials
        ours = {key: value for key, value in config.flat().items() if not key.startswith(free) and key not in ranges}
        ours |= {"goal": goal} | {key: str(choice) for key, choice in ranges.items()}
        try:
            Path("runs").mkdir(exist_ok=True)
            with locked(Path("runs"), wait=True):  # two that made the tables of one database at once would fail
                wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}  # seconds, for a lock
                self.study = optuna.create_study(
                    storage=RDBStorage(url, engine_kwargs=wait), study_name=name, direction=GOALS[goal][1],
                    load_if_exists=True, pruner=BehindTheOthers())
                kept = self.study.user_attrs.get("settings")
                if kept is None:
                    self.study.set_user_attr("settings", ours)
        except Exception as error:  # of a database or of its driver
            raise SearchError(f"study {masked(url)} cannot be used: {first_line(error)}") from error
        differ = [f"{key} was {(kept or ours).get(key)}, asked for {ours.get(key)}"
                  for key in ours | (kept or ours) if (kept or ours).get(key) != ours.get(key)]
        if differ:
            raise ConfigError(f"{masked(url)}: is another search: {'; '.join(differ)}; choose another --name")

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
                    try:
                        said = attempt.advance(parent.id)
                    except (optuna.exceptions.OptunaError, ValueError):  # the latter of a trial that has failed
                        if not self._is_over(attempt.trial):
                            raise
                        attempt.end()
                        said = "another machine took it over"
                    if said:
                        active.remove(attempt)
                        self._record(attempt, said, parent)
                time.sleep(0.5)
        except DATABASE_ERRORS as error:
            raise SearchError(f"the study cannot be used any more: {first_line(error.__cause__ or error)}; the same "
                              "command goes on") from error
        finally:  # first all are told to end, then they are waited for
            for attempt in active:
                attempt.signal(watch.received or signal.SIGTERM)
            for attempt in active:
                attempt.put_back()

    def _record(self, attempt, said, parent):
        trial = attempt.trial
        print(f"trial {trial.number}: {said}", flush=True)
        for i, job in enumerate(attempt.jobs[: len(attempt.values) + 1]):
            parent.tag_child(job.folder.name, "trial", f"{trial.number}: {said}", finished=i < len(attempt.values))
        if best := self.best_first():
            parent.log(f"search/best_{self.goal}", best[0].value, step=trial.number)
        if self.failures == PATIENCE:
            raise SearchError(f"{PATIENCE} trials in a row could not be trained, the last one: {said}")

    def _begin(self, jobs_of):
        """The next Attempt; None if there are enough."""
        self._take_over()
        for _ in range(CONFLICTS):
            if len(self.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)) >= self.count:
                return None
            trial = self.study.ask(self.ranges)
            name = trial.user_attrs.get("name", f"trial-{trial.number:03d}")
            told = {"name": name, "host": platform.node(), "process": identity(os.getpid()), "seen": time.time()}
            for key, value in told.items():
                trial.set_user_attr(key, value)
            chosen = overrides_of(trial.params)
            try:
                attempt = Attempt(self, trial, jobs_of(name, chosen))
                print(f"trial {trial.number}: {' '.join(chosen)}, {name}", flush=True)
                return attempt
            except ConfigError as error:
                why = error
                self.study.tell(trial, state=TrialState.FAIL)
        raise SearchError(f"{CONFLICTS} choices in a row do not go together, the last one: {why}")

    def _take_over(self):
        """Put back the trials of searches that were killed, here or, if not heard of for long, elsewhere."""
        with locked(Path("runs"), wait=True):  # only one of us
            for trial in self.trials(TrialState.RUNNING):
                told = trial.user_attrs
                silence = time.time() - told.get("seen", (trial.datetime_start or datetime.now()).timestamp())
                if told.get("host") == platform.node() and "process" in told:
                    lost = not living(told["process"])
                else:
                    lost = silence > LOST_AFTER
                if lost:
                    if told.get("host") == platform.node() and (left := living(told.get("trainer"))):
                        left.terminate()  # it saves, and this search goes on with it
                        left.wait()
                    self.put_back(trial)

    def _is_over(self, trial):
        return self.study.get_trials(deepcopy=False)[trial.number].state.is_finished()

    def put_back(self, trial):
        """Another trial will have its settings, and go on with its runs; unless another machine has seen to it."""
        if self._is_over(trial):
            return
        names = {"name": trial.user_attrs["name"]} if "name" in trial.user_attrs else {}
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.study.enqueue_trial(trial.params, user_attrs=names)

    def best_first(self):
        """Completed trials, the best first."""
        return sorted(self.trials(TrialState.COMPLETE), key=lambda trial: -sign(self.study) * trial.value)

    def importances(self):
        """{key: share of the values' variance} by fANOVA (Hutter et al. 2014); {} where too little is known."""
        completed = self.trials(TrialState.COMPLETE)
        if len({trial.value for trial in completed}) < 2 or len(completed) < 4:
            return {}
        forest = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(self.study, evaluator=forest)


class Attempt:
    """A trial under way. `jobs`: its runs, one per seed; see sweep.Job."""

    def __init__(self, search, trial, jobs):
        self.search, self.trial, self.jobs = search, trial, jobs
        self.process, self.values, self.reported, self.seen = None, [], 0, time.time()

    def advance(self, parent):
        """Looks at the run of the moment and starts the next; what is to be said when the trial is over, else None.

        parent: the id of an MLflow run, or None.
        """
        search, job = self.search, self.jobs[len(self.values)]
        ended = self.process is not None and self.process.poll() is not None  # asked before its files are read
        self._note_that_it_is_seen()
        metrics = self._metrics(job)
        value = None if metrics is None else self._value(job, metrics, ended)
        if value is not None:
            self._report(job, metrics, STEPS)
            self.end()
            self.values.append(value)
        elif ended:
            search.study.tell(self.trial, state=TrialState.FAIL)
            search.failures += 1
            return f"{job.folder} ended with {self.process.returncode}; see its train.log"
        elif metrics is not None and self._hopeless(job, metrics):
            self.end()
            search.study.tell(self.trial, state=TrialState.PRUNED)
            search.failures = 0
            return f"stopped early in {job.folder}, after {metrics['frames'][-1] / 1e6:.2f} M frames"
        elif self.process is None:
            self.process = job.start(parent, own_log=True)
            with suppress(psutil.NoSuchProcess):  # it is over already
                self.trial.set_user_attr("trainer", identity(self.process.pid))
        if len(self.values) < len(self.jobs):
            return None
        value = statistics.median(self.values)
        search.study.tell(self.trial, value)
        search.failures = 0
        return f"{value:.3g} {GOALS[search.goal][0]}"

    def signal(self, number):
        """Tell its run to end, which saves it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def put_back(self):
        """Once its run has ended: a later search goes on with it. Trouble with the study is only told."""
        if self.process is not None:
            self.process.wait()
        try:
            self.search.put_back(self.trial)
        except (*DATABASE_ERRORS, ValueError) as error:  # the next search sees that nobody is at this trial
            print(f"trial {self.trial.number}: {first_line(error.__cause__ or error)}", file=sys.stderr)

    def end(self):
        """Its run ends, saved."""
        self.signal(signal.SIGTERM)
        if self.process is not None:
            self.process.wait()
        self.process = None

    def _note_that_it_is_seen(self):
        if time.time() - self.seen > SEEN_EVERY:
            self.seen = time.time()
            self.trial.set_user_attr("seen", self.seen)

    def _metrics(self, job):
        with suppress(PlotError):  # nothing there yet
            return read_metrics(job.folder)

    def _value(self, job, metrics, ended):
        """What this run is worth; None as long as that is open.

        A run that has not reached the mark counts as if it had gone on as steadily as from its first to its best
        return: as longer than it was, but FARTHEST times at most.
        """
        goal, mark = self.search.goal, job.config.env.task.solved
        over = (ended or self.process is None) and job.done()
        if goal == "score":
            return job.score() if over else None
        if hit := reached(metrics, mark):
            frames, seconds = hit
        elif over:
            returns = metrics["rollout/return_mean"]
            returns = returns[np.isfinite(returns)]
            way = returns.max() - returns[0] if returns.size else 0.0
            times = min((mark - returns[0]) / way, FARTHEST) if way > 0 else FARTHEST
            frames, seconds = metrics["frames"][-1] * times, metrics["speed/total_seconds"][-1] * times
        else:
            return None
        return float(frames / 1e6 if goal == "frames" else seconds / 60)

    def _hopeless(self, job, metrics):
        """Whether a step has passed since, at which this trial was behind the others."""
        passed = int(metrics["frames"][-1] * STEPS / job.config.ppo.total_frames)
        return self._report(job, metrics, min(passed, STEPS)) and self.trial.should_prune()

    def _report(self, job, metrics, steps):
        """Tell the study the best return until each of a run's `steps` that it does not know; whether there were any.

        A run that has reached its goal stays at its best for the rest of its steps.
        """
        before, direction = self.reported, sign(self.search.study)
        while self.reported < len(self.values) * STEPS + steps:
            until = (self.reported % STEPS + 1) / STEPS * job.config.ppo.total_frames
            returns = metrics["rollout/return_mean"][metrics["frames"] <= until]
            if np.isfinite(returns).any():
                self.trial.report(direction * float(np.nanmax(returns)), self.reported)
            self.reported += 1
        return self.reported > before
