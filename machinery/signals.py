"""Ctrl-C and SIGTERM end a run in order: they wait until the work of the moment is whole."""

import signal

from machinery.processes import SINGLE_PROCESS


class Interrupted(SystemExit):
    """SIGINT, SIGTERM or SIGHUP: the user's wish and no error. Its `code` is the exit status that shells expect."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.number = number

    def __str__(self):
        return signal.Signals(self.number).name


class SignalWatch:
    """Raises Interrupted after the first SIGINT, SIGTERM or SIGHUP: at once, or at the next `check` if `deferred`.

    The same signal again ends the process as if there were no watch. Under torchrun a second signal means nothing:
    torchrun sends each process a signal that it may have received already, and kills all of them after half a minute.
    """

    def __init__(self, processes=SINGLE_PROCESS):
        self.received, self.deferred, self.processes = None, False, processes
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._receive)

    def _receive(self, number, _):
        first, self.received = self.received is None, self.received or number
        if self.processes.size == 1:
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
