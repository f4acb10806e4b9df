"""The numbers of a run: metrics.csv on the disk, and MLflow.

    with Tracker(config, "runs/NAME", threads=2) as tracker:
        tracker.log({"rollout/return_mean": 12.3, ...}, env_frames)

metrics.csv holds all that MLflow gets except the machine's load, so a curve survives without a server.
"""

import errno
import json
import math
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer  # the built-in one since Python 3.11
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from machinery.checkpoint import trained_frames
from machinery.config import MASK, masked
from machinery.errors import UserError
from machinery.files import locked, sync, write_atomically
from machinery.mlflow_model import add_files, log_final_scores, log_lacking_scores, log_score, register
from machinery.outbox import Queue, Sender, cause, send_file

# MLflow reads these when it is imported; its default of 7 retries would take minutes to notice a dead server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# What it says while a model is packed would stand in the middle of the live line.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

try:
    Path.home()
except RuntimeError:  # no HOME, and a user id without a name, as in some containers: MLflow could not be imported
    os.environ["HOME"] = "/nonexistent"  # nothing can be planted there, as it could be in a folder for all

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (  # one of the two Box2D packages, whichever gymnasium asked for
    "torch", "torchvision", "gymnasium", "box2d", "box2d-py", "pygame-ce", "opencv-python-headless", "numpy", "mlflow")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
STORE, EXPERIMENT = "sqlite:///mlflow.db", "lunar-lander"  # where neither the config nor MLflow's variables name one
KIND = "mlflow.experimentKind"  # tag that tells MLflow's interface which pages to show: those of training
TIMEOUT = 90  # seconds for a store to answer: it makes a new store's tables in 6 s, on a busy machine in 30 s


class TrackingError(UserError):
    """MLflow cannot be used at the start."""


def machine_tags(threads, gpu=""):
    """Git commit, package versions, machine and threads: the numbers of a run depend on them besides its config.

    gpu: the name of the one that trains, if one does.
    """
    tags = {"git_commit": git_commit(ROOT), "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            tags[f"version.{package}"] = version(package)
    cpu = ""
    with suppress(OSError, StopIteration):  # not every system has the file, nor every processor the line
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    machine = f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores{gpu and f', {gpu}'}"
    return tags | {"machine": machine, "threads": str(threads)}


def git_commit(root):
    """The commit of the repository in `root`, else "unknown"; one around it, or that GIT_DIR names, does not count."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", f"--git-dir={root}/.git", f"--work-tree={root}", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    except OSError:  # no git on this machine
        return "unknown"
    return git.stdout.strip() or "unknown"


class Metrics:
    """metrics.csv: one row per update, first column `frames`. A metric that comes later is nan in the rows before."""

    def __init__(self, path, queue=None):
        self.path, self.columns, self.queue = Path(path), None, queue or Queue("disk")
        header = self.path.read_text(errors="replace").partition("\n")[0] if self.path.exists() else ""
        if header.startswith("frames,"):
            self.columns = header.split(",")

    def rows(self):
        """The whole rows of the file: a list of (line, its numbers in the order of `columns`)."""
        rows = []
        for line in self.path.read_text(errors="replace").splitlines(keepends=True)[1:] if self.columns else ():
            fields = line.split(",")
            with suppress(ValueError):  # a line that a power cut or an editor left
                if line.endswith("\n") and len(fields) == len(self.columns):
                    rows.append((line, [int(fields[0]), *map(float, fields[1:])]))
        return rows

    def drop_after(self, frames):
        """Remove the rows beyond `frames`, since a resumed run is about to do these updates again.

        A file that is not one of metrics is put aside. Returns the frames of the last row that is left, 0 if none.
        """
        if not self.columns:
            if self.path.exists() and self.path.stat().st_size:
                self.path.rename(self.path.with_suffix(".csv.damaged"))
            return 0
        kept = [(line, row) for line, row in self.rows() if row[0] <= frames]
        self._write(self.columns, [line for line, _ in kept])
        return kept[-1][1][0] if kept else 0

    def append(self, row):
        """Write {"frames": int, name: number, ...} at once. After an OSError it waits for the next row, or `flush`."""
        self.columns = self.columns or list(row)
        self.queue.put(row)
        self.flush()

    def _write(self, columns, lines):
        """The whole file anew."""
        write_atomically(self.path, (",".join(columns) + "\n" + "".join(lines)).encode())

    def _add_columns(self, names):
        columns, filler = [*self.columns, *names], ",nan" * len(names) + "\n"
        if self.path.exists():
            self._write(columns, [line.rstrip("\n") + filler for line, _ in self.rows()])
        self.columns = columns

    def flush(self):
        """Write the rows that wait, down to the disk; OSError leaves the file as it was.

        Call it before a checkpoint is saved: none must be newer than the rows that led to it.
        """
        rows = self.queue.waiting("disk")
        if not rows:
            return
        if gained := list(dict.fromkeys(key for _, row in rows for key in row if key not in self.columns)):
            self._add_columns(gained)
        lines = [",".join(str(row.get(key, math.nan)) for key in self.columns) + "\n" for _, row in rows]
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            data = "".join(lines if size else [",".join(self.columns) + "\n", *lines]).encode()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                sync(file.fileno())
            except OSError as error:
                file.truncate(size)
                error.filename = str(self.path)  # a full disk is reported without a name
                raise
        self.queue.took("disk", len(rows))


def with_store(settings):
    """A config's `tracking` whose store and experiment are MLflow's own variables, or the defaults, if it names none.

    A saved URI lacks its credentials, so a resumed run needs it again. TrackingError if it is not given.
    """
    uri, experiment = settings.uri, settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if MASK in uri and settings.mlflow:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            raise TrackingError(
                f"tracking.uri={settings.uri} was saved without its credentials; give it again, as tracking.uri=URI "
                "or in MLFLOW_TRACKING_URI, or train without it: tracking.mlflow=false")
    if not experiment:
        experiment = "" if os.environ.get("MLFLOW_EXPERIMENT_ID") else EXPERIMENT
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE
    return settings.model_copy(update={"uri": uri, "experiment": experiment})


def connect(settings, folder):
    """MLflow's client and the id of the experiment; the store and the experiment are made where they are missing.

    All runs of the store have `folder`, runs/, in common. TrackingError if the store cannot be used.
    """
    import mlflow

    settings, answer = with_store(settings), Future()

    def work():
        try:
            with locked(folder, wait=True):  # two processes that made the tables of one new store at once would fail
                # No mlflow.set_tracking_uri or set_experiment: they write to the environment, which the next run reads.
                client = mlflow.MlflowClient(check_database(settings.uri))
                answer.set_result((client, experiment_id(client, settings.experiment)))
        except Exception as error:  # whatever the store raises, the user needs one line of it
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: one that hangs does not keep the process alive
    try:
        return answer.result(TIMEOUT)
    except NoAnswer as error:
        if answer.done():  # an error of the store itself
            raise store_error(settings, error) from error
        raise store_error(settings, f"no answer within {TIMEOUT} s") from None
    except Exception as error:
        raise store_error(settings, error) from error


def experiment_id(client, name):
    """The id of the experiment of that name, which is made where it is missing; without a name, MLFLOW_EXPERIMENT_ID's.

    Unless somebody has chosen another, it gets the kind whose pages are those of model training.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name) if name else client.get_experiment(os.environ["MLFLOW_EXPERIMENT_ID"])
    if not found:
        try:
            return client.create_experiment(name, tags={KIND: "custom_model_development"})
        except MlflowException:  # somebody else has made it meanwhile
            found = client.get_experiment_by_name(name)
            if not found:
                raise
    if found.lifecycle_stage != "active":
        raise MlflowException(f"experiment {found.name!r} is deleted; choose another tracking.experiment or restore it")
    if found.tags.get(KIND, "no_inferred_type").endswith(("_inferred", "no_inferred_type")):  # the interface's guesses
        with suppress(MlflowException):  # not everybody may change an experiment
            client.set_experiment_tag(found.experiment_id, KIND, "custom_model_development")
    return found.experiment_id


def lost_artifacts(uri, artifacts):
    """The folder in which a moved store, or a copied one, would put a run's files; None: it is where it should be.

    MLflow stores the absolute path of its mlruns/, by default in the working folder of the first run. That is out of
    date once the folder has been moved, and in a copy it is the original's.
    """
    import sqlalchemy

    if not uri.startswith("sqlite") or urlsplit(artifacts).scheme not in ("", "file"):
        return None  # servers and clouds take care of their own
    store = Path(sqlalchemy.make_url(uri).database or "").resolve()
    folder = Path(unquote(artifacts.removeprefix("file://")) if artifacts.startswith("file:") else artifacts)
    root = next((parent for parent in folder.parents if parent.name == "mlruns"), None)
    if root is None:  # a folder that a user chose
        return None
    origin = root.parent.resolve()
    moved = origin not in (store.parent, Path.cwd()) and (not origin.exists() or (origin / store.name).exists())
    return root if moved else None


def check_database(uri):
    """Open the store once, if it is a database, since MLflow would retry for 102 s; the exception names the cause.

    Returns the URI, that of a file with its whole path: MLflow takes a relative one for the same in every folder.
    """
    import sqlalchemy

    if not uri.startswith(DATABASES):
        return uri
    url, is_sqlite = sqlalchemy.make_url(uri), uri.startswith("sqlite")
    if is_sqlite and url.database and not url.database.startswith(("file:", ":memory:")):
        if Path(url.database).is_dir():
            raise IsADirectoryError(f"{url.database} is a folder")
        if "?" not in os.getcwd():  # in a URI, settings begin there
            url = url.set(database=os.path.abspath(url.database))
            uri = url.render_as_string(hide_password=False)
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    # A SQLite database may be held by another process for so many seconds.
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": TIMEOUT / 3} if is_sqlite else {})
    try:
        with engine.connect() as connection:
            for statement in ("BEGIN IMMEDIATE", "PRAGMA user_version = 0", "ROLLBACK") if is_sqlite else ():
                connection.exec_driver_sql(statement)  # nothing is written, but the file must take it
    except sqlalchemy.exc.DBAPIError as error:
        raise error.orig from None  # without SQLAlchemy's words around it
    finally:
        engine.dispose()
    return uri


def store_error(settings, error):
    uri = masked(with_store(settings).uri)
    return TrackingError(
        f"MLflow store {uri} cannot be used: {cause(error)}; tracking.mlflow=false trains without it")


def _scores(metrics):
    """The greedy score among an update's metrics."""
    return {key: metrics[key] for key in ("eval/return_mean", "eval/landed_rate") if key in metrics}


class Tracker:
    """Use as a context: leaving it ends the MLflow run as FINISHED, KILLED (interrupted) or FAILED (any error)."""

    def __init__(self, config, run_folder, threads, run_id=None, gpu="", threads_before=None):
        """threads_before: how many a resumed run had last; None: as many as it began with."""
        self.folder, self.settings, self.config = Path(run_folder), with_store(config.tracking), config
        self.tags = machine_tags(threads, gpu)
        self.queue = Queue("disk", "MLflow") if self.settings.mlflow else Queue("disk")
        self.metrics = Metrics(self.folder / "metrics.csv", self.queue)
        self._tell_differences(threads_before)
        self.client, self.run_id, self.sender, self.told = None, run_id, None, set()
        self.keeps_files = False  # whether MLflow gets the run's files
        if self.settings.mlflow:
            self._start_mlflow()

    def _tell_differences(self, threads_before):
        """A run is repeated bit for bit only by the same code, packages, machine and number of threads.

        machine.json says with which it began, and under `resumed` with which it went on, where they differ.
        """
        file = self.folder / "machine.json"
        try:
            started = dict(json.loads(file.read_text()))
            resumed = list(started.pop("resumed", []))
            before = dict(resumed[-1]) if resumed else dict(started)
            if threads_before is not None:
                before["threads"] = str(threads_before)
        except (OSError, ValueError, TypeError):  # a new run, or a damaged file
            started, resumed, before = self.tags, [], self.tags
        changed = {key: now for key, now in self.tags.items() if before.get(key) != now}
        if changed:
            told = "; ".join(f"{key} was {before.get(key)}, is {now}" for key, now in changed.items())
            print(f"this run was elsewhere before, so it goes on well but not bit for bit: {told}")
            resumed.append(self.tags)
        written = started | ({"resumed": resumed} if resumed else {})
        write_atomically(file, (json.dumps(written, indent=2) + "\n").encode())

    def _start_mlflow(self):
        from mlflow.entities import Param, RunTag

        self.client, experiment = connect(self.settings, self.folder.parent)
        try:
            if self.run_id is None or not self._reopen():
                tags = self.tags | {"mlflow.runName": self.folder.name, "mlflow.source.name": "train.py"}
                tags |= {"mlflow.parentRunId": self.settings.parent} if self.settings.parent else {}
                self.run_id = self.client.create_run(experiment, tags=tags).info.run_id
                params = [Param(key, masked(str(value))) for key, value in self.config.flat().items()]
                self.client.log_batch(self.run_id, params=params, tags=[RunTag("run_folder", self.folder.name)])
            there = {metric.step for metric in self.client.get_metric_history(self.run_id, "update/entropy")}
            lost = lost_artifacts(self.settings.uri, self.client.get_run(self.run_id).info.artifact_uri)
        except Exception as error:
            raise store_error(self.settings, error) from error
        self.keeps_files = lost is None
        if lost:
            print(f"MLflow's store was moved or copied and still names {lost} for this run's files, so it gets none; "
                  f"they are in {self.folder}, and docs/tracking.md says how to mend the store", file=sys.stderr)
        self._fill_gap(there)
        self.sender = Sender(self.client, self.run_id, self.queue, there)
        self._fill_models()
        self.sender.start()

    def _fill_gap(self, there):
        """Send the rows of metrics.csv that MLflow lacks: those of a killed run, of a lost store, of a deleted run."""
        lacking = [row for _, row in self.metrics.rows() if row[0] not in there]
        for row in lacking:
            self.queue.put(dict(zip(self.metrics.columns, row, strict=True)))
        self.queue.took("disk", len(lacking))
        if lacking:
            print(f"MLflow lacked {len(lacking)} updates of {self.metrics.path}; they are sent now")

    def _fill_models(self):
        """Send the scores of metrics.csv for which MLflow has no model, as in `_fill_gap`."""
        rows = [dict(zip(self.metrics.columns, row, strict=True)) for _, row in self.metrics.rows()]
        scores = {row["frames"]: _scores(row) for row in rows if not math.isnan(row.get("eval/return_mean", math.nan))}
        if scores:
            self.sender.jobs["models"].append(("scores before", log_lacking_scores, self.config, scores))

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

    def flush(self):
        """Write what waits for metrics.csv down to the disk; OSError if it is refused."""
        self.metrics.flush()

    def artifact(self, path, folder=None):
        """Send a file, or what is in a folder, beside the training, to `folder` among the run's artifacts."""
        path = Path(path)
        job, jobs = (path.name, send_file, path, folder), self.sender.jobs["files"] if self.keeps_files else None
        if jobs is not None and job not in list(jobs)[1:]:  # a copy: the sender takes from it, and is at the first
            jobs.append(job)

    def score(self, metrics, frames, flight=None):
        """The greedy policy of now has a score, eval/... in `metrics`: it becomes a logged model of MLflow.

        flight: a FlightRecorder of one of its episodes; MLflow shows the pictures of a run one after another.
        """
        if self.sender:
            self.sender.jobs["models"].append((
                f"score at {frames:,} frames", log_score, self.config, frames, _scores(metrics),
                flight if self.keeps_files else None))

    def best(self, file, reports):
        """`file` holds the best policy, and `reports` are those of its final scores: all goes to its model in MLflow.

        The policy becomes one that MLflow can load. With tracking.register it also becomes a version in the registry.
        """
        if not self.sender:
            return
        config, frames, jobs = self.config, trained_frames(file), self.sender.jobs["models"]
        jobs.append(("final scores", log_final_scores, config, frames, reports))
        if self.keeps_files:
            jobs.append(("best policy", add_files, config, frames, file))
            if self.settings.register:
                jobs.append(("registry", register, config, frames, reports[0]["return_mean"]))

    @property
    def complete(self):
        """Whether MLflow has all that it was sent."""
        return not self.sender or not any(self.sender.left())

    def _try(self, what, call, *args):
        """Trouble with records never costs training: it is told once of each."""
        try:
            call(*args)
        except Exception as error:
            if what not in self.told:
                print(f"{what}: {cause(error)}; training goes on", file=sys.stderr)
            self.told.add(what)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._try("metrics.csv", self.metrics.flush)
        if waiting := self.queue.waiting("disk"):
            print(f"{self.metrics.path} lacks the last {len(waiting)} updates", file=sys.stderr)
        if not self.client:
            return
        updates, files, models = self.sender.close()
        if updates:
            print(f"MLflow lacks the last {updates} updates; {self.metrics.path} has them", file=sys.stderr)
        if files:
            print(f"MLflow lacks {files} files; they are in {self.folder}", file=sys.stderr)
        if models:
            print(f"MLflow lacks the last {models} scores or models; {self.folder} has them", file=sys.stderr)
        # An exception that is no Exception, such as KeyboardInterrupt, was the user's wish.
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._try("MLflow", self.client.set_terminated, self.run_id, status)
