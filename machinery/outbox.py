"""What is on its way to MLflow: the rows, files and models of a run, sent by a thread beside the training.

Nothing here may cost training anything: what a store refuses is kept and sent later, and told in one line.
"""

import math
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress

import psutil
import torch

from machinery.config import masked
from machinery.errors import first_line


def cause(error):
    """The first line of an exception that MLflow raised, without credentials."""
    return masked(first_line(error))


class Queue:
    """Rows on their way to the disk and to MLflow, oldest first, with a cursor for each of these takers.

    A row leaves memory once all takers have it.
    """

    def __init__(self, *takers):
        self.rows, self.lock = [], threading.Lock()
        self.taken = dict.fromkeys(takers, 0)  # {taker: how many of `rows` it has}

    def put(self, row):
        with self.lock:
            self.rows.append((int(1000 * time.time()), row))

    def waiting(self, taker):
        """The rows that `taker` lacks: a list of (milliseconds of the Unix clock, row)."""
        with self.lock:
            return self.rows[self.taken[taker]:]

    def took(self, taker, count):
        """`taker` has the next `count` rows."""
        with self.lock:
            self.taken[taker] += count
            done = min(self.taken.values())
            del self.rows[:done]
            self.taken = {taker: taken - done for taker, taken in self.taken.items()}


class Load:
    """The load of the machine, under the names that MLflow gives it."""

    def __init__(self):
        self.network = None  # the counters at the first reading; traffic is counted from there

    def read(self):
        """{"system/cpu_utilization_percentage": number, ...}. The processor's share is that since the last reading."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        self.network = self.network or network
        load = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - self.network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self.network.bytes_sent) / 1e6}
        for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            if torch.cuda.memory_reserved(gpu):  # asking any other GPU would open it, which takes memory there
                free, total = torch.cuda.mem_get_info(gpu)
                load[f"gpu_{gpu}_memory_usage_megabytes"] = (total - free) / 1e6
                load[f"gpu_{gpu}_memory_usage_percentage"] = 100 * (total - free) / total
                with suppress(Exception):  # it needs NVIDIA's package nvidia-ml-py
                    load[f"gpu_{gpu}_utilization_percentage"] = torch.cuda.utilization(gpu)
        return {f"system/{key}": round(value, 1) for key, value in load.items()}


def send_file(client, run_id, path, folder):
    """Send a file, or what is in a folder, to `folder` among the run's artifacts."""
    if path.exists():
        send = client.log_artifacts if path.is_dir() else client.log_artifact
        send(run_id, str(path), folder)


class Sender(threading.Thread):
    """Sends rows, files and models to MLflow beside the training; all are kept until the store takes them.

    `there`: the frames of updates that MLflow already has. A killed run may have sent updates that are done again now.
    A file or a model is a job: (what a user is told of it, function, arguments after the client and the run's id).
    """

    def __init__(self, client, run_id, queue, there=(), interval=5.0):
        super().__init__(daemon=True)
        self.client, self.run_id, self.queue, self.there, self.interval = client, run_id, queue, there, interval
        self.jobs = {"files": deque(), "models": deque()}  # what is refused holds up no row, and none of the other kind
        self.trouble, self.told = False, set()  # told: the kinds that were refused once
        self.ended, self.given_up = threading.Event(), threading.Event()

    def run(self):
        machine, load = Load(), {}
        with suppress(Exception):
            machine.read()  # the next reading counts from here
        while True:
            ended = self.ended.wait(self.interval)
            with suppress(Exception):  # a machine whose load cannot be read trains all the same
                load = machine.read()
            done = self.send(load) and self.work_off("files") & self.work_off("models")
            if ended and (done or self.given_up.wait(1)):
                return

    def send(self, load):
        """Send the rows that wait, oldest first, and `load` with the newest; False if the store did not take them."""
        from mlflow.entities import Metric

        while waiting := self.queue.waiting("MLflow"):
            rows = waiting[:25]  # MLflow takes 1,000 metrics a call
            try:
                metrics = [
                    Metric(key, float(value), milliseconds, row["frames"])
                    for milliseconds, row in rows if row["frames"] not in self.there
                    for key, value in row.items() if key != "frames" and not math.isnan(value)]
                if len(rows) == len(waiting):
                    milliseconds, newest = rows[-1]
                    metrics += [Metric(key, value, milliseconds, newest["frames"]) for key, value in load.items()]
                self.client.log_batch(self.run_id, metrics)
            except Exception as error:  # whatever the store raises, training must not notice
                if not self.trouble:
                    print(f"MLflow: {cause(error)}; training goes on, and metrics are kept to be sent later",
                          file=sys.stderr)
                self.trouble = True
                return False
            self.queue.took("MLflow", len(rows))
            if self.trouble:
                print("MLflow answers again; the kept metrics are sent", file=sys.stderr)
            self.trouble = False
        return True

    def work_off(self, kind):
        """Do the jobs of that kind, oldest first; False if the store refused one."""
        jobs = self.jobs[kind]
        while jobs:
            name, function, *arguments = jobs[0]
            try:
                function(self.client, self.run_id, *arguments)
            except Exception as error:
                if kind not in self.told:
                    print(f"MLflow: {name}: {cause(error)}; training goes on", file=sys.stderr)
                self.told.add(kind)
                return False
            jobs.popleft()
        return True

    def close(self, timeout=30.0):
        """Wait until all is sent, or nothing gets through for `timeout` seconds.

        Returns how many updates, files and models are left.
        """
        self.ended.set()
        left, before = self.left(), None
        while self.is_alive() and left != before:
            self.join(timeout)
            left, before = self.left(), left
        self.given_up.set()
        return left

    def left(self):
        return len(self.queue.waiting("MLflow")), *map(len, self.jobs.values())
