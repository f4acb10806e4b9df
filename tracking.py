"""Where the numbers of a run go: metrics.csv, MLflow, and the progress line.

    with Tracker(config, "runs/NAME", threads=2) as tracker:
        tracker.log({"rollout/return_mean": 12.3, ...}, env_frames)

The CSV gets exactly what MLflow gets, the machine's load apart, so a curve survives without a server.
"""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from checkpoint import write_atomically

# MLflow reads these when it is imported; its default of 7 retries would take minutes to notice a dead server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

PACKAGES = (  # one of the two Box2D packages, whichever gymnasium asked for
    "torch", "torchvision", "gymnasium", "box2d", "box2d-py", "pygame-ce", "opencv-python-headless", "numpy", "mlflow")


class TrackingError(Exception):
    """MLflow cannot be reached at the start; one line."""


def machine_tags(threads):
    """Git commit, package versions, machine and threads: what a run's numbers may depend on besides its config."""
    here = Path(__file__).parent
    commit = ""
    with suppress(OSError):  # no git on this machine
        git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip()
    tags = {"git_commit": commit or "unknown", "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            tags[f"version.{package}"] = version(package)
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    machine = f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores"
    return tags | {"machine": machine, "threads": str(threads)}


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def first_line(error):
    """What a user is told of an exception."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Metrics:
    """metrics.csv: one row per update, first column `frames`. Columns are fixed by the first row."""

    def __init__(self, path):
        self.path, self.columns, self.waiting = Path(path), None, []
        header = self.path.read_text(errors="replace").partition("\n")[0] if self.path.exists() else ""
        if header.startswith("frames,"):
            self.columns = header.split(",")

    def rows(self):
        """The whole rows: a list of (line, its numbers in the order of `columns`)."""
        rows = []
        for line in self.path.read_text(errors="replace").splitlines(keepends=True)[1:] if self.columns else ():
            fields = line.split(",")
            with suppress(ValueError):  # a line that a power cut or an editor left
                if line.endswith("\n") and len(fields) == len(self.columns):
                    rows.append((line, [int(fields[0]), *map(float, fields[1:])]))
        return rows

    def drop_after(self, frames):
        """Forget rows beyond `frames`: they belong to what a resumed run is about to do again.

        A file that is not one of metrics is put aside. Returns the frames of the last row that is left, 0 if none.
        """
        if not self.columns:
            if self.path.exists() and self.path.stat().st_size:
                self.path.rename(self.path.with_suffix(".csv.damaged"))
            return 0
        kept = [(line, row) for line, row in self.rows() if row[0] <= frames]
        write_atomically(self.path, (",".join(self.columns) + "\n" + "".join(line for line, _ in kept)).encode())
        return kept[-1][1][0] if kept else 0

    def append(self, row):
        """OSError leaves the file as it was; the row is written together with the next one, or by `flush`."""
        self.columns = self.columns or list(row)
        self.waiting.append(",".join(str(row.get(key, float("nan"))) for key in self.columns) + "\n")
        self.flush()

    def flush(self):
        """Write what waits, down to the disk: a checkpoint must never be newer than the rows that led to it."""
        if not self.waiting:
            return
        with open(self.path, "ab", buffering=0) as file:
            size, data = file.tell(), "".join(self.waiting)
            data = (data if size else ",".join(self.columns) + "\n" + data).encode()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self.waiting.clear()


def load_monitors():
    """MLflow's own monitors of the machine; not its thread around them, which ends at the first trouble."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # no GPU, or no library to ask it with
        monitors.append(GPUMonitor())
    return monitors


def read_load(monitors):
    """{"system/cpu_utilization_percentage": number, ...}, under MLflow's names."""
    load = {}
    for monitor in monitors:
        monitor.collect_metrics()
        load |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return load


class Sender(threading.Thread):
    """Sends metrics and files to MLflow beside the training; what cannot be sent is kept until the store takes it."""

    def __init__(self, client, run_id, interval=5.0):
        super().__init__(daemon=True)
        self.client, self.run_id, self.interval = client, run_id, interval
        self.waiting, self.ended, self.trouble = deque(), threading.Event(), None
        self.files, self.file_trouble = deque(), None  # (path, folder in the run's artifacts)
        self.load = {}  # the latest {"system/...": number}, until it is logged

    def run(self):
        monitors = load_monitors()
        with suppress(Exception):
            read_load(monitors)  # a processor's share is measured since the last reading
        while not self.ended.wait(self.interval):
            self.send()
            self.send_files()
            with suppress(Exception):  # a machine whose load cannot be read
                self.load = read_load(monitors)

    def send(self):
        """Send what waits, oldest first; False if the store did not take it."""
        while self.waiting:
            rows = [self.waiting[i] for i in range(min(len(self.waiting), 25))]  # MLflow takes 1,000 metrics a call
            try:
                self.client.log_batch(self.run_id, [metric for row in rows for metric in row])
            except Exception as error:  # whatever the store raises, training must not notice
                if not self.trouble:
                    print(f"MLflow: {first_line(error)}; training goes on, and metrics are kept to be sent later",
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
                    print(f"MLflow: {path.name}: {first_line(error)}; training goes on", file=sys.stderr)
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


def connect(settings, folder):
    """MLflow's client and the id of the experiment; both are made where they are missing.

    `folder` is what all runs of the store have in common, runs/. TrackingError if the store cannot be used.
    """
    import mlflow
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 4  # as above: it would try a database that cannot be opened for 102 seconds; so for 1.1
    try:
        mlflow.set_tracking_uri(settings.uri)
        with alone(folder):
            return mlflow.MlflowClient(), mlflow.set_experiment(settings.experiment).experiment_id
    except Exception as error:  # whatever the store raises, the user needs one line of it
        raise store_error(settings, error) from error


def store_error(settings, error):
    return TrackingError(
        f"MLflow store {settings.uri} cannot be used: {first_line(error)}; tracking.mlflow=false trains without it")


@contextmanager
def alone(folder):
    """One process after the other: of two that find no store, each would make its tables, and one would fail."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Tracker:
    """Use as a context: leaving it ends the MLflow run as FINISHED, KILLED (interrupted) or FAILED (any error)."""

    def __init__(self, config, run_folder, threads, run_id=None):
        self.folder, self.settings = Path(run_folder), config.tracking
        self.metrics, self.tags = Metrics(self.folder / "metrics.csv"), machine_tags(threads)
        self._tell_differences()
        self.client, self.run_id, self.sender, self.told = None, run_id, None, set()
        if self.settings.mlflow:
            self._start_mlflow(config)

    def _tell_differences(self):
        """A run is repeated bit for bit only by the same code, packages, machine and number of threads."""
        file = self.folder / "machine.json"
        try:
            before = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # a new run, or a damaged file
            before = self.tags
        changed = [f"{key} was {before.get(key)}, is {now}" for key, now in self.tags.items() if before.get(key) != now]
        if changed:
            print(f"this run began elsewhere, so it goes on well but not bit for bit: {'; '.join(changed)}")
        write_atomically(file, (json.dumps(self.tags, indent=2) + "\n").encode())

    def _start_mlflow(self, config):
        from mlflow.entities import Param, RunTag

        self.client, experiment = connect(self.settings, self.folder.parent)
        try:
            if self.run_id is None or not self._reopen():
                tags = self.tags | {"mlflow.runName": self.folder.name, "mlflow.source.name": "train.py"}
                tags |= {"mlflow.parentRunId": self.settings.parent} if self.settings.parent else {}
                self.run_id = self.client.create_run(experiment, tags=tags).info.run_id
                params = [Param(key, str(value)) for key, value in config.flat().items()]
                self.client.log_batch(self.run_id, params=params, tags=[RunTag("run_folder", self.folder.name)])
            self.sender = Sender(self.client, self.run_id)
            self._fill_gap()
        except Exception as error:
            raise store_error(self.settings, error) from error
        self.sender.start()

    def _fill_gap(self):
        """Send the rows of metrics.csv that MLflow lacks: those of a killed run, of a lost store, of a deleted run."""
        rows = [row for _, row in self.metrics.rows()]
        self.there = {m.step for m in self.client.get_metric_history(self.run_id, "update/entropy")}
        lacking = [dict(zip(self.metrics.columns, row, strict=True)) for row in rows if row[0] not in self.there]
        for row in lacking:
            self._send(row, row.pop("frames"))
        if lacking:
            print(f"MLflow lacked {len(lacking)} updates of {self.metrics.path}; they are sent now")

    def _reopen(self):
        """Go on with the MLflow run of a resumed training; False if it is no longer there."""
        from mlflow.exceptions import MlflowException

        try:
            there = self.client.get_run(self.run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # a store in trouble may still have it
                raise
            there = False
        if there:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            print(f"MLflow run {self.run_id} is gone; a new one takes its place", file=sys.stderr)
        return there

    def log(self, metrics, frames):
        """metrics: {name: number}, nan for what this update did not measure; `frames` is the x axis."""
        self._try("metrics.csv", self.metrics.append, {"frames": frames} | metrics)
        if self.sender and frames not in self.there:  # a killed run may have sent what is done again now
            self._send(metrics, frames)

    def _send(self, metrics, frames):
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        load, self.sender.load = self.sender.load, {}
        row = [Metric(k, float(v), now, frames) for k, v in (metrics | load).items() if v == v]
        self.sender.waiting.append(row)

    def artifact(self, path, folder=None):
        """Send a file, or what is in a folder, beside the training, to `folder` among the run's artifacts."""
        if self.sender and (Path(path), folder) not in list(self.sender.files):  # a copy: the sender takes from it
            self.sender.files.append((Path(path), folder))

    def _try(self, what, call, *args):
        """Trouble with records never costs training: it is told once of each."""
        try:
            call(*args)
        except Exception as error:
            if what not in self.told:
                print(f"{what}: {first_line(error)}; training goes on", file=sys.stderr)
            self.told.add(what)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._try("metrics.csv", self.metrics.flush)
        if self.metrics.waiting:
            print(f"{self.metrics.path} lacks the last {len(self.metrics.waiting)} updates", file=sys.stderr)
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


class Outlet:
    """A standard stream that may break, as a pipe to `head` or a log on a full disk: no run ends for its messages."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - None where the shell has closed it
        self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *args):
        try:
            call(*args)
        except BrokenPipeError:  # for good: what is still to be written goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:
            pass


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
