"""The MLflow run whose children are the runs of a sweep."""

import sys
from pathlib import Path

from machinery.outbox import cause
from machinery.tracking import connect, lost_artifacts, store_error, with_store


class ParentRun:
    """Opened with the sweep's name; a stopped sweep's goes on. `id` is None without MLflow, and nothing is recorded.

    Trouble with records is told, and no reason to end a sweep or to withhold what it found; except at the start.
    """

    def __init__(self, settings, name):
        self.id = None
        if not settings.mlflow:
            return
        Path("runs").mkdir(exist_ok=True)
        self.uri = with_store(settings).uri
        self.client, self.experiment = connect(settings, "runs")
        try:
            found = self.client.search_runs([self.experiment], f"tags.sweep = '{name}'")
            if found:
                self.client.update_run(found[0].info.run_id, status="RUNNING")
                self.id = found[0].info.run_id
            else:
                tags = {"sweep": name, "mlflow.runName": name, "mlflow.source.name": "sweep.py"}
                self.id = self.client.create_run(self.experiment, tags=tags).info.run_id
        except Exception as error:
            raise store_error(settings, error) from error

    def close(self, status):
        if self.id:
            self._try(lambda: self.client.set_terminated(self.id, status))

    def keep(self, file):
        if self.id:
            self._try(lambda: self._keep(file))

    def _keep(self, file):
        if not lost_artifacts(self.uri, self.client.get_run(self.id).info.artifact_uri):
            self.client.log_artifact(self.id, str(file))

    def log(self, key, value, step):
        if self.id:
            self._try(lambda: self.client.log_metric(self.id, key, value, step=step))

    def tag_child(self, name, key, value, finished):
        """Tag the child of that name. `finished`: if it was stopped, it has reached what it was for."""
        if self.id:
            self._try(lambda: self._tag(name, key, value, finished))

    def _tag(self, name, key, value, finished):
        children = f"tags.`mlflow.parentRunId` = '{self.id}' and attributes.run_name = '{name}'"
        for run in self.client.search_runs([self.experiment], children):
            self.client.set_tag(run.info.run_id, key, value)
            if finished and run.info.status == "KILLED":
                self.client.set_terminated(run.info.run_id, "FINISHED")

    @staticmethod
    def _try(work):
        try:
            work()
        except Exception as error:
            print(f"MLflow: {cause(error)}", file=sys.stderr)
