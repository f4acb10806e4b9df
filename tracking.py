"""Where the numbers of a run go: metrics.csv, MLflow, and the progress line.

    with Tracker(config, "runs/NAME") as tracker:
        tracker.log({"rollout/return_mean": 12.3, ...}, env_frames)

The CSV gets exactly what MLflow gets, so a curve survives without a server.
"""

import csv
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

# MLflow reads these when it is imported; its default of 7 retries would take minutes to notice a dead server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

PACKAGES = ("torch", "gymnasium", "box2d", "pygame-ce", "opencv-python-headless", "numpy", "mlflow")


class TrackingError(Exception):
    """MLflow cannot be reached at the start; one line."""


def machine_tags():
    """Git commit, package versions and machine, as MLflow tags."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    tags = {"git_commit": git.stdout.strip() or "unknown", "python": platform.python_version()}
    tags |= {f"version.{package}": version(package) for package in PACKAGES}
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return tags | {"machine": f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores"}


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class Metrics:
    """metrics.csv: one row per update, first column `frames`. Columns are fixed by the first row."""

    def __init__(self, path):
        self.path, self.columns = Path(path), None
        if self.path.exists():
            with open(self.path, newline="") as file:
                self.columns = next(csv.reader(file), None)

    def drop_after(self, frames):
        """Forget rows beyond `frames`: they belong to what a resumed run is about to do again."""
        if self.columns:
            header, *rows = self.path.read_text().splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",", 1)[0]) <= frames]
            self.path.write_text(header + "".join(kept))

    def append(self, row):
        new = self.columns is None
        self.columns = self.columns or list(row)
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


class Tracker:
    """Use as a context: leaving it ends the MLflow run as FINISHED, KILLED (interrupted) or FAILED (any error)."""

    def __init__(self, config, run_folder, run_id=None):
        self.folder, self.settings = Path(run_folder), config.tracking
        self.metrics = Metrics(self.folder / "metrics.csv")
        self.tags = machine_tags()
        (self.folder / "machine.json").write_text(json.dumps(self.tags, indent=2) + "\n")
        self.client, self.run_id, self.trouble = None, run_id, None
        if self.settings.mlflow:
            self._start_mlflow(config)

    def _start_mlflow(self, config):
        import mlflow
        from mlflow.entities import Param, RunTag

        try:
            mlflow.set_tracking_uri(self.settings.uri)
            self.client = mlflow.MlflowClient()
            experiment = mlflow.set_experiment(self.settings.experiment).experiment_id
            if self.run_id is not None:
                self.client.update_run(self.run_id, status="RUNNING")
                return
            tags = self.tags | {"mlflow.runName": self.folder.name, "mlflow.source.name": "train.py"}
            self.run_id = self.client.create_run(experiment, tags=tags).info.run_id
            params = [Param(key, str(value)) for key, value in config.flat().items()]
            self.client.log_batch(self.run_id, params=params, tags=[RunTag("run_folder", self.folder.name)])
        except Exception as error:  # whatever the store raises, the user needs one line of it
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TrackingError(
                f"MLflow store {self.settings.uri} cannot be used: {line}; tracking.mlflow=false trains without it"
            ) from error

    def log(self, metrics, frames):
        """metrics: {name: number}, nan for what this update did not measure; `frames` is the x axis."""
        self.metrics.append({"frames": frames} | metrics)
        if self.client:
            self._try(self._send, {k: v for k, v in metrics.items() if v == v}, frames)

    def _send(self, metrics, frames):
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self.client.log_batch(
            self.run_id, [Metric(k, float(v), now, frames) for k, v in metrics.items()], synchronous=False)

    def artifact(self, path, folder=None):
        if self.client and Path(path).exists():
            log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
            self._try(log, self.run_id, str(path), folder)

    def _try(self, call, *args):
        """MLflow trouble never costs training: it is told once, and metrics.csv has the numbers."""
        try:
            call(*args)
        except Exception as error:
            if not self.trouble:
                self.trouble = error
                print(f"MLflow: {str(error).strip().splitlines()[0]}; training goes on, metrics.csv has every number",
                      file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not self.client:
            return
        # What is no Exception, as KeyboardInterrupt, was the user's wish.
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"

        def finish():
            import mlflow

            mlflow.flush_async_logging()
            self.client.set_terminated(self.run_id, status)

        self._try(finish)


class Progress:
    """One live line on a terminal; plain lines, one every `seconds`, where the output is a file."""

    def __init__(self, total, initial, seconds=10):
        self.bar = tqdm(total=total, initial=initial, unit="frames", unit_scale=True, disable=None, dynamic_ncols=True)
        self.total, self.initial, self.seconds, self.elapsed, self.printed = total, initial, seconds, 0.0, -seconds

    def show(self, frames, metrics, elapsed):
        """`elapsed`: seconds of training so far, as in speed/total_seconds."""
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
