"""Ctrl-C, SIGTERM and a scheduler's warning end a run in order: they wait until the work of the moment is whole."""

import ctypes
import os
import signal
import sys

from machinery.processes import SINGLE_PROCESS

WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a person's, or the system's
# A scheduler's, before a job's time is over: Slurm's --signal, LSF and Grid Engine send SIGUSR1 or SIGUSR2, a limit on
# CPU time SIGXCPU. What does not know them dies of them.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Interrupted(SystemExit):
    """A signal that ends the run: no error. Its `code` is the exit status that shells expect."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.number = number

    def __str__(self):
        return signal.Signals(self.number).name


class SignalWatch:
    """Raises Interrupted after the first of these signals: at once, or at the next `check` if `deferred`.

    The same wish again ends the process as if there were no watch. A warning may come several times: from the system
    every second, from Slurm through srun as well. Under torchrun a second signal means nothing: torchrun sends each
    process a signal that it may have received already, and kills all of them after half a minute.
    """

    def __init__(self, processes=SINGLE_PROCESS):
        self.received, self.deferred, self.processes = None, False, processes
        for number in (*WISHES, *WARNINGS):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._receive)
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # PR_SET_PDEATHSIG: torchrun itself dies of a warning, and its processes would go on unseen.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def _receive(self, number, _):
        first, self.received = self.received is None, self.received or number
        if self.processes.size == 1 and number in WISHES:
            signal.signal(number, signal.SIG_DFL)
        if first and not self.deferred:
            self.check()

    def check(self):
        if self.received:
            raise Interrupted(self.received)

    def check_all(self):
        """A signal to any process is one to all: they stop after the same iteration.

        One that comes while they tell each other is not yet known to all, and counts after the next iteration.
        """
        told = next(filter(None, self.processes.all_gather_object(self.received)), None)
        self.received = told or self.received
        if told:
            self.check()
