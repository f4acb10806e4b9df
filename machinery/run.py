"""A training run from start to end: its checkpoints, scores, records and faults.

    with open_run(args, processes, play, evaluate, draw_run) as run:  # begins runs/NAME, or goes on with it
        trainer = Trainer(run.config, run.state, processes)
        with run.recording(trainer):                                  # metrics.csv, MLflow
            with run.saving_on_exit():                                # the last iteration is saved, whatever happens
                metrics = run.iterate_with_retries(trainer)
                run.score_candidate(metrics)
                run.record(metrics)
                run.save_when_due()
            run.score()                                               # the best policy on unseen episodes

Of many processes the first alone scores, records and writes.
"""

import math
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import torch

from machinery.checkpoint import (
    POLICY_FILE,
    CheckpointError,
    load_policy,
    policy_bytes,
    read_checkpoint,
    save_checkpoint,
)
from machinery.config import masked
from machinery.diagnostics import Diagnostics
from machinery.errors import UserError
from machinery.files import is_newer, write_atomically
from machinery.flight import FlightRecorder
from machinery.processes import launcher
from machinery.run_folder import is_over, start_run
from machinery.signals import Interrupted, SignalWatch
from machinery.terminal import Progress
from machinery.tracking import Tracker
from machinery.video import VideoRecorder
from machinery.workers import WorkerError
from task import SELECTION_SEED

MAX_FAILURES = 3  # of workers, in one rollout
# Name: a metric, and from what value on the milestone is reached; if several at once, the last is filmed.
LANDER_MILESTONES = {
    "first-landing": ("rollout/landed_rate", 0.01),
    "return-100": ("rollout/return_mean", 100),
    "return-200": ("rollout/return_mean", 200),
}


def milestones(task):
    """Those of a landing; of any other task, that it is solved."""
    if task.landed is not None:
        return LANDER_MILESTONES
    return {} if task.solved is None else {"solved": ("rollout/return_mean", task.solved)}


class TrainingError(UserError):
    """Training cannot go on."""


def is_as_good(returns, best):
    """Whether the mean of `returns`, (n,), is at most its standard error below the highest so far, None if none was.

    Of policies whose scores hardly differ the newest is the one to keep: it learned for longer, and with smaller steps,
    and the highest of many scores of a few episodes owes much to luck.
    """
    return best is None or returns.mean() + returns.std() / len(returns) ** 0.5 >= best


@contextmanager
def open_run(args, processes, play, evaluate, draw_run):
    """The Run that the command line asks for: `args` has config, resume and overrides.

    play and evaluate are evaluate.py's functions, draw_run is plot.py's. An early end, by a signal, a lost process or
    for want of memory, is told in one line.
    """
    run = Run(processes, play, evaluate, draw_run)
    try:
        with ExitStack() as lock:
            processes.join()
            found = start_run(args, lock, processes.size) if processes.rank == 0 else None
            run.config, run.folder, run.state = processes.broadcast(found)
            run.start_or_resume(run.state)
            yield run
    except Interrupted as interruption:
        if processes.rank == 0:
            print(f"{interruption}: {run.resume_hint()}", flush=True)
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if processes.lost(error):
            if processes.rank:
                sys.exit(1)  # the first process tells
            raise TrainingError(f"another process of this training ended: {run.resume_hint()}") from None
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise  # what torch raises on a CPU says that it cannot allocate memory
        raise TrainingError(
            f"{(str(error) or 'Out of memory.').splitlines()[0]} A larger ppo.num_minibatches, or smaller "
            "env.num_envs, ppo.num_steps or model, needs less.") from None


class Run:
    """All of a run except PPO: its folder, its records, its best policy, its signals."""

    def __init__(self, processes, play, evaluate, draw_run):
        self.processes, self.play, self.evaluate, self.draw_run = processes, play, evaluate, draw_run
        self.watch = SignalWatch(processes)
        self.folder = self.trainer = self.tracker = self.run_id = None
        self.resume_command = f"{launcher(processes.size, processes.size // processes.local_size)} train.py --resume"
        self.unsaved_best = None  # bytes of the policy file that a full disk did not take

    def start_or_resume(self, state):
        """Counters of a new run, or those of `state`, the dict of a checkpoint."""
        self.counters = {
            "seconds": 0.0,  # of training and of scoring candidates
            "best": None,  # highest score so far
            "next_evaluation": self.config.evaluation.interval,  # in environment frames
            "milestones": [],
            "scored": None}  # episodes of the final score, once it is done
        if not state:
            return
        saved = state["counters"]
        self.counters |= {key: saved[key] for key in self.counters if key in saved}
        latest = saved["env_frames"] + self.config.evaluation.interval  # the interval may be another than before
        self.counters["next_evaluation"] = min(self.counters["next_evaluation"], latest)
        self.run_id = state.get("run_id")

    def finished(self):
        """Whether nothing is left to do, which is said then."""
        if not (self.state and is_over(self.config, self.state)):
            return False
        if self.processes.rank == 0:
            frames = self.state["counters"]["env_frames"]
            print(f"{self.folder}: finished, {frames:,} frames; a larger ppo.total_frames goes on")
        return True

    def resume_hint(self):
        """How to go on after an early end."""
        if self.folder and any(self.folder.glob("checkpoints/*.ckpt")):
            return f"saved; go on with: {self.resume_command} {self.folder}"
        return "stopped before there was anything to save"

    @contextmanager
    def recording(self, trainer):
        """metrics.csv and MLflow are open; at the end the MLflow run says how it ended."""
        self.trainer = trainer
        many, count = self.processes.size > 1, trainer.gauge.num_threads
        self.num_threads = count
        threads = f"{self.processes.size} processes of {count}" if many else count
        self.watch.deferred = True  # a run that MLflow has begun is to be ended there
        first = self.processes.rank == 0
        gpu = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else ""
        before = None if many or not self.state else self.state.get("num_threads")
        tracker = Tracker(self.config, self.folder, threads, self.run_id, gpu, before) if first else nullcontext()
        with tracker as self.tracker:
            self.watch.check_all()
            if self.tracker:
                self.run_id = self.tracker.run_id
                words = [f"{self.config.ppo.total_frames:,} frames", f"{threads} thread{'s' * (count > 1)}"]
                words += [f"MLflow store {masked(self.tracker.settings.uri)}"] if self.tracker.client else []
                print(f"{self.folder}: {self.config.model.name}, {trainer.device.type}, {', '.join(words)}", flush=True)
            yield
            self.watch.deferred = True
        if first:
            self._mark_scored(self.tracker.complete)

    @contextmanager
    def saving_on_exit(self):
        """The last whole iteration is saved, however the block ends. A signal waits for the end of the iteration."""
        frames = self.trainer.counters["env_frames"]
        silent = self.tracker is None or not self.config.tracking.progress
        self.progress = Progress(self.config.ppo.total_frames, frames, silent=silent)
        self.diagnostics = Diagnostics(self.config)
        self._take_snapshot()
        self.saved_frames = frames
        self.watch.deferred = True
        try:
            self.save()  # a disk that takes none is found out now, not in an hour
        except OSError as error:
            raise TrainingError(
                f"{self.folder}/checkpoints: {error.strerror}; nothing is trained before that") from None
        try:
            yield
        finally:
            self.progress.close()
            if self.processes.size == 1 and (
                    self.trainer.counters["updates"] > self.last_snapshot["counters"]["updates"]):
                self._take_snapshot()  # the iteration was done; its score or its record failed
            # Collecting changes no weights: if the iteration was cut off there, they still match the last snapshot.
            whole = self.trainer.weights_match_snapshot or "policy" in self.last_snapshot
            if whole and self.last_snapshot["counters"]["env_frames"] != self.saved_frames:
                try:
                    self.save()
                except OSError as error:
                    raise TrainingError(
                        f"the last checkpoint could not be saved ({error.strerror}); those in "
                        f"{self.folder}/checkpoints are older") from None
        self.watch.deferred = False
        self.watch.check()  # for a signal after the last iteration

    def iterate_with_retries(self, trainer):
        """The metrics of one iteration. A rollout whose workers fail is played again, bit for bit, by new ones."""
        failures = 0
        while True:
            try:
                if failures:
                    trainer.restart_workers(self.last_snapshot)
                return trainer.iterate()
            except WorkerError as error:
                time.sleep(0.2)  # a signal to the whole group may reach the workers before it reaches us
                self.watch.check()
                failures += 1
                if failures > MAX_FAILURES:
                    raise TrainingError(f"{error}, after {MAX_FAILURES} restarts") from error
                self.progress.say(f"{error}; going on with new workers, which repeat this rollout")
            except FloatingPointError as error:
                raise TrainingError(
                    f"update {trainer.counters['updates'] + 1}: {error}. The checkpoints in {self.folder}/checkpoints "
                    "are good, but resuming would come to the same; a new run with a smaller ppo.learning_rate, "
                    "ppo.max_grad_norm or ppo.reward_scale usually helps") from None

    def score_candidate(self, metrics):
        """Every evaluation.interval frames, play greedy episodes on seeds of their own; keep what `is_as_good`.

        Adds eval/return_mean and eval/landed_rate to `metrics`, nan where nothing was played.
        """
        settings, counters, start = self.config.evaluation, self.counters, time.perf_counter()
        frames, policy = self.trainer.counters["env_frames"], self.trainer.policy
        counters["scored"] = None
        counters["seconds"] += metrics.get("speed/collect_seconds", 0) + metrics.get("speed/update_seconds", 0)
        task, metrics["eval/return_mean"] = self.config.env.task, math.nan
        metrics |= {} if task.landed is None else {"eval/landed_rate": math.nan}
        if self.processes.rank:
            return  # and wait for the first process at the next exchange
        if frames < min(counters["next_evaluation"], self.config.ppo.total_frames):
            return
        seeds = range(SELECTION_SEED, SELECTION_SEED + settings.selection_episodes)
        self.flight = FlightRecorder()
        returns, _, outcomes = self.play(policy, self.config.env, seeds, recorder=self.flight)
        if frames >= counters["next_evaluation"]:  # at the end it may not be
            counters["next_evaluation"] = (frames // settings.interval + 1) * settings.interval
        metrics["eval/return_mean"] = float(returns.mean())
        metrics |= {} if task.landed is None else {"eval/landed_rate": float((outcomes == task.landed).mean())}
        if is_as_good(returns, counters["best"]):
            self.unsaved_best = policy_bytes(policy, self.config, frames)
            counters["best"] = max(float(returns.mean()), -math.inf if counters["best"] is None else counters["best"])
        counters["seconds"] += time.perf_counter() - start
        try:
            self._save_best()
        except OSError as error:
            self.progress.say(f"best policy not saved ({error.strerror}); training goes on and will try again")

    def record(self, metrics):
        """An iteration's numbers go to metrics.csv, MLflow and the terminal; now and then videos and curves, too."""
        frames, say = self.trainer.counters["env_frames"], self.progress.say
        if self.tracker:
            try:
                for video in self.film_milestones(metrics):
                    self.tracker.artifact(video, "videos")
            except OSError as error:
                say(f"milestone not filmed ({error.strerror}); training goes on")
            self.tracker.log(metrics | {"speed/total_seconds": self.counters["seconds"]}, frames)
            if not math.isnan(metrics["eval/return_mean"]):
                self._draw_curves(say)
                self.tracker.score(metrics, frames, self.flight)
            for sentence in self.diagnostics.watch(metrics):
                say(sentence)
            if self.trainer.gauge.num_threads < self.num_threads:
                self.num_threads = self.trainer.gauge.num_threads
                say("other work has the cores, and several threads lose their time waiting for each other: updates "
                    "go on with 1 thread, in a resumed run, too, unless run.num_threads says more")
        self.progress.show(frames, metrics, self.counters["seconds"])

    def film_milestones(self, metrics):
        """The videos of what was reached just now: the greedy policy of this moment on one selection seed.

        It draws no random number that training draws. What is reached is a counter, so a resumed run films none twice.
        """
        counters, start = self.counters, time.perf_counter()
        marks = milestones(self.config.env.task)
        reached = [name for name, (key, least) in marks.items() if metrics[key] >= least]
        new = [name for name in reached if name not in counters["milestones"]]
        counters["milestones"] = [*counters["milestones"], *new]  # a new list: the old one may be part of a snapshot
        if not new or not self.config.evaluation.videos:
            return []
        name = f"{self.trainer.counters['env_frames'] / 1e6:06.2f}M-{new[-1]}"  # names that sort
        with VideoRecorder(self.folder / "videos", 1, SELECTION_SEED, name) as recorder:
            self.play(
                self.trainer.policy, self.config.env, [SELECTION_SEED], rendered=True, recorder=recorder)
        counters["seconds"] += time.perf_counter() - start
        return [] if recorder.failure else recorder.paths

    def save_when_due(self):
        """The iteration is done: take a snapshot, stop if a signal came, save if checkpoint_interval says so."""
        self._take_snapshot()
        self.watch.check_all()
        frames = self.trainer.counters["env_frames"]
        if frames - self.saved_frames >= self.config.tracking.checkpoint_interval:
            try:
                if self.tracker:
                    self.tracker.flush()
                self.save()
                self.saved_frames = frames
            except OSError as error:
                self.progress.say(f"checkpoint not saved ({error.strerror}); training goes on and will try again")

    def _take_snapshot(self):
        self.last_snapshot = self.snapshot()
        self.trainer.weights_match_snapshot = True

    def snapshot(self):
        """A checkpoint's content besides the config, and of a single process besides weights and optimizer."""
        snapshot = self.trainer.snapshot()
        return snapshot | {"counters": snapshot["counters"] | self.counters, "run_id": self.run_id}

    def save(self):
        """Write a checkpoint of the last snapshot, and before it the best policy that a full disk refused.

        OSError leaves the old checkpoints.
        """
        if self.processes.rank:
            return
        self._save_best()
        folder, frames = self.folder / "checkpoints", self.last_snapshot["counters"]["env_frames"]
        config = {"config": self.config.saved()}
        save_checkpoint(folder / f"{frames:012d}.ckpt", config | self.trainer.state_dicts() | self.last_snapshot)
        for old in sorted(folder.glob("*.ckpt"))[: -self.config.tracking.keep]:
            old.unlink(missing_ok=True)

    def _save_best(self):
        if self.unsaved_best:
            write_atomically(self.folder / "checkpoints" / POLICY_FILE, self.unsaved_best)
            self.unsaved_best = None

    def _draw_curves(self, say):
        try:
            self.draw_run(self.folder, self.folder / "curves.png")
            self.tracker.artifact(self.folder / "curves.png")
        except (UserError, OSError) as error:
            say(f"no curves: {error}; training goes on")

    def score(self):
        """Training is done: score the best policy on unseen episodes, greedy and sampled, and record videos."""
        self.processes.leave()
        if not self.tracker:
            return
        self.watch.deferred = True  # an exception that a handler raises in the midst of a library may be lost there
        try:
            self._score()
        except OSError as error:
            raise TrainingError(f"{error.filename or self.folder}: {error.strerror}; training is done and saved, and "
                                f"{self.resume_command} {self.folder} scores it") from None

    def _score(self):
        config, folder, settings = self.config, self.folder, self.config.evaluation
        if self.counters["best"] is None:  # total_frames was lowered to less than what was trained without a score
            self.score_candidate({})
            self._save_best()
        if not is_newer(folder / "curves.png", folder / "metrics.csv"):  # else they were drawn at the last score
            self._draw_curves(print)
        for name in ("config.yaml", "metrics.csv"):
            self.tracker.artifact(folder / name)
        best = folder / "checkpoints" / POLICY_FILE
        self.tracker.artifact(best, "checkpoints")
        if not settings.episodes:
            self.tracker.best(best, [])
            return
        policy, reports = load_policy(folder)[0].to(self.trainer.device), []
        for sample, name, videos in ((False, "report.json", settings.videos), (True, "report_sampled.json", 0)):
            reports.append(self.evaluate(
                policy, config, folder, folder, settings.episodes, videos=videos, sample=sample, report_name=name,
                video_name="best-seed-{seed}", check=self.watch.check))
            self.tracker.artifact(folder / name)
        self.tracker.artifact(folder / "videos", "videos")
        self.tracker.best(best, reports)
        print(f"  written  {folder}/report.json, report_sampled.json, curves.png and videos/")

    def _mark_scored(self, sent):
        """Note in the last checkpoint that nothing is left to train or score; unless `sent`, a resumed run sends it."""
        counters = self.trainer.counters | self.counters | {"scored": self.config.evaluation.episodes, "sent": sent}
        file = self.folder / "checkpoints" / f"{counters['env_frames']:012d}.ckpt"
        with suppress(OSError, CheckpointError):  # then a resumed run only scores again
            save_checkpoint(file, read_checkpoint(file) | {"counters": counters})
