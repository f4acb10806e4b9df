"""Where the numbers of a run go: metrics.csv, MLflow, and the progress line.

    with Tracker(config, "runs/NAME", threads=2) as tracker:
        tracker.log({"rollout/return_mean": 12.3, ...}, env_frames)

The CSV gets exactly what MLflow gets, the machine's load apart, so a curve survives without a server.
"""

import csv
import errno
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from checkpoint import write_atomically

# MLflow reads these when it is imported; its default of 7 retries would take minutes to notice a dead server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

PACKAGES = ("torch", "gymnasium", "box2d", "pygame-ce", "opencv-python-headless", "numpy", "mlflow")


class TrackingError(Exception):
    """MLflow cannot be reached at the start; one line."""


def machine_tags(threads):
    """Git commit, package versions, machine and threads: what a run's numbers may depend on besides its config."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    tags = {"git_commit": git.stdout.strip() or "unknown", "python": platform.python_version()}
    tags |= {f"version.{package}": version(package) for package in PACKAGES}
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    machine = f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores"
    return tags | {"machine": machine, "threads": str(threads)}


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Metrics:
    """metrics.csv: one row per update, first column `frames`. Columns are fixed by the first row."""

    def __init__(self, path):
        self.path, self.columns, self.waiting = Path(path), None, []
        if self.path.exists():
            with open(self.path, newline="") as file:
                self.columns = next(csv.reader(file), None)

    def drop_after(self, frames):
        """Forget rows beyond `frames`: they belong to what a resumed run is about to do again."""
        if self.columns:
            header, *rows = self.path.read_text().splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",", 1)[0]) <= frames]
            write_atomically(self.path, (header + "".join(kept)).encode())

    def append(self, row):
        """OSError leaves the file as it was; the row is written together with the next one."""
        if self.columns is None:
            self.columns = list(row)
            self.waiting.append(",".join(self.columns) + "\n")
        self.waiting.append(",".join(str(row[key]) for key in self.columns) + "\n")
        with open(self.path, "ab", buffering=0) as file:
            size, data = file.tell(), "".join(self.waiting).encode()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self.waiting.clear()


class Sender(threading.Thread):
    """Sends metrics and files to MLflow beside the training; what cannot be sent is kept until the store takes it."""

    def __init__(self, client, run_id, interval=5.0):
        super().__init__(daemon=True)
        self.client, self.run_id, self.interval = client, run_id, interval
        self.waiting, self.ended, self.trouble = deque(), threading.Event(), None
        self.files, self.file_trouble = deque(), None  # (path, folder in the run's artifacts)
        self.machine, self.load = None, {}  # MLflow's monitors; the latest {system metric: number} until it is logged

    def run(self):
        with suppress(Exception):  # a machine whose load cannot be read
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self.machine = SystemMetricsMonitor(self.run_id)  # asked here, never started: it would give up on trouble
        while not self.ended.wait(self.interval):
            self.read_load()
            self.send()
            self.send_files()

    def read_load(self):
        with suppress(Exception):
            self.machine.collect_metrics()
            self.load = {f"system/{key}": value for key, value in self.machine.aggregate_metrics().items()}
            for monitor in self.machine.monitors:
                monitor.clear_metrics()

    def send(self):
        """Send what waits, oldest first; False if the store did not take it."""
        while self.waiting:
            rows = [self.waiting[i] for i in range(min(len(self.waiting), 25))]  # MLflow takes 1,000 metrics a call
            try:
                self.client.log_batch(self.run_id, [metric for row in rows for metric in row])
            except Exception as error:  # whatever the store raises, training must not notice
                if not self.trouble:
                    print(f"MLflow: {_first_line(error)}; training goes on, and metrics are kept to be sent later",
                          file=sys.stderr)
                self.trouble = error
                return False
            for _ in rows:
                self.waiting.popleft()
            if self.trouble:
                print("MLflow answers again; what was kept is sent", file=sys.stderr)
            self.trouble = None
        return True

    def send_files(self):
        """As `send`, the files."""
        while self.files and not self.trouble:
            path, folder = self.files[0]
            try:
                if path.exists():
                    (self.client.log_artifacts if path.is_dir() else self.client.log_artifact)(
                        self.run_id, str(path), folder)
            except Exception as error:
                if not self.file_trouble:
                    print(f"MLflow: {path.name}: {_first_line(error)}; training goes on", file=sys.stderr)
                self.file_trouble = error
                return False
            self.files.popleft()
        return not self.files

    def close(self, patience=30.0):
        """Send the rest, until nothing gets through for `patience` seconds; what could not be sent: updates, files."""
        self.ended.set()
        while self.is_alive():
            left = len(self.waiting), len(self.files)
            self.join(patience)
            if left == (len(self.waiting), len(self.files)):
                break
        deadline = time.monotonic() + patience
        while not self.is_alive() and not (self.send() and self.send_files()) and time.monotonic() < deadline:
            time.sleep(1)
        return len(self.waiting), len(self.files)


class Tracker:
    """Use as a context: leaving it ends the MLflow run as FINISHED, KILLED (interrupted) or FAILED (any error)."""

    def __init__(self, config, run_folder, threads, run_id=None):
        self.folder, self.settings = Path(run_folder), config.tracking
        self.metrics, self.tags = Metrics(self.folder / "metrics.csv"), machine_tags(threads)
        self._tell_differences()
        self.client, self.run_id, self.sender, self.trouble = None, run_id, None, None
        if self.settings.mlflow:
            self._start_mlflow(config)

    def _tell_differences(self):
        """A run is repeated bit for bit only by the same code, packages, machine and number of threads."""
        file = self.folder / "machine.json"
        before = json.loads(file.read_text()) if file.exists() else self.tags
        changed = [f"{key} was {before.get(key)}, is {now}" for key, now in self.tags.items() if before.get(key) != now]
        if changed:
            print(f"this run began elsewhere, so it goes on well but not bit for bit: {'; '.join(changed)}")
        file.write_text(json.dumps(self.tags, indent=2) + "\n")

    def _start_mlflow(self, config):
        import mlflow
        from mlflow.entities import Param, RunTag

        try:
            mlflow.set_tracking_uri(self.settings.uri)
            self.client = mlflow.MlflowClient()
            experiment = mlflow.set_experiment(self.settings.experiment).experiment_id
            if self.run_id is None or not self._reopen():
                tags = self.tags | {"mlflow.runName": self.folder.name, "mlflow.source.name": "train.py"}
                tags |= {"mlflow.parentRunId": self.settings.parent} if self.settings.parent else {}
                self.run_id = self.client.create_run(experiment, tags=tags).info.run_id
                params = [Param(key, str(value)) for key, value in config.flat().items()]
                self.client.log_batch(self.run_id, params=params, tags=[RunTag("run_folder", self.folder.name)])
        except Exception as error:  # whatever the store raises, the user needs one line of it
            raise TrackingError(
                f"MLflow store {self.settings.uri} cannot be used: {_first_line(error)}; tracking.mlflow=false trains "
                "without it") from error
        self.sender = Sender(self.client, self.run_id)
        self.sender.start()

    def _reopen(self):
        """Go on with the MLflow run of a resumed training; False if it is no longer there."""
        try:
            if self.client.get_run(self.run_id).info.lifecycle_stage == "active":
                self.client.update_run(self.run_id, status="RUNNING")
                return True
        except Exception as error:
            print(f"MLflow: {_first_line(error)}", file=sys.stderr)
        print(f"MLflow run {self.run_id} is gone; a new one takes its place", file=sys.stderr)
        return False

    def log(self, metrics, frames):
        """metrics: {name: number}, nan for what this update did not measure; `frames` is the x axis."""
        self._try("metrics.csv", self.metrics.append, {"frames": frames} | metrics)
        if self.sender:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            load, self.sender.load = self.sender.load, {}
            row = [Metric(k, float(v), now, frames) for k, v in (metrics | load).items() if v == v]
            self.sender.waiting.append(row)

    def artifact(self, path, folder=None):
        """Send a file, or what is in a folder, beside the training, to `folder` among the run's artifacts."""
        if self.sender and (Path(path), folder) not in self.sender.files:
            self.sender.files.append((Path(path), folder))

    def _try(self, what, call, *args):
        """Trouble with records never costs training: it is told once."""
        try:
            call(*args)
        except Exception as error:
            if not self.trouble:
                self.trouble = error
                print(f"{what}: {_first_line(error)}; training goes on", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not self.client:
            return
        updates, files = self.sender.close()
        if updates:
            print(f"MLflow lacks the last {updates} updates; {self.folder / 'metrics.csv'} has them", file=sys.stderr)
        if files:
            print(f"MLflow lacks {files} files; they are in {self.folder}", file=sys.stderr)
        # What is no Exception, as KeyboardInterrupt, was the user's wish.
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._try("MLflow", self.client.set_terminated, self.run_id, status)


class Progress:
    """One live line on a terminal; plain lines, one every `seconds`, where the output is a file; nothing if silent."""

    def __init__(self, total, initial, seconds=10, silent=False):
        self.silent = silent
        self.bar = tqdm(  # short, so that all but the entropy is seen on 80 columns
            total=total, initial=initial, unit="", unit_scale=True, disable=silent or None, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}")
        self.total, self.initial, self.seconds, self.elapsed, self.printed = total, initial, seconds, 0.0, -seconds

    def show(self, frames, metrics, elapsed):
        """`elapsed`: seconds of training so far, as in speed/total_seconds."""
        if self.silent:
            return
        line = (
            f"return {metrics['rollout/return_mean']:.0f}, landed {100 * metrics['rollout/landed_rate']:.0f}%, "
            f"KL {metrics['update/approx_kl']:.3f}, clip {metrics['update/clip_fraction']:.2f}, "
            f"entropy {metrics['update/entropy']:.2f}")
        if not self.bar.disable:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update(frames - self.bar.n)
        elif elapsed - self.printed >= self.seconds or frames >= self.total:
            self.printed = elapsed
            speed = metrics["speed/frames_per_second"]
            left = max(self.total - frames, 0) / speed / 60
            print(f"{frames / 1e6:.2f} of {self.total / 1e6:.2f} M frames, {elapsed / 60:.1f} min, {line}, "
                  f"{speed:.0f} frames/s, {left:.0f} min left", flush=True)

    def say(self, text):
        """A line of its own that does not tear the live one."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self):
        self.bar.close()
