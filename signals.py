"""Ctrl-C and SIGTERM end a run in order: they wait for the end of what must not be torn."""

import signal

from distributed import ALONE


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP; `code` is the exit status. It is no error, so no Exception."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class SignalWatch:
    """Turns the first SIGINT, SIGTERM or SIGHUP into Interrupted, at once or, if `patient`, at the next `check`.

    The same one again ends the process as if there were no watch; but torchrun passes on to each of many processes what
    they may all have got already, and kills them itself after half a minute, so there a second one means nothing.
    """

    def __init__(self, world=ALONE):
        self.received, self.patient, self.world = None, False, world
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._receive)

    def _receive(self, number, _):
        first, self.received = self.received is None, self.received or number
        if self.world.size == 1:
            signal.signal(number, signal.SIG_DFL)
        if first and not self.patient:
            self.check()

    def check(self):
        if self.received:
            raise Interrupted(self.received)

    def check_all(self):
        """A signal to any process is one to all: they stop at the same boundary.

        One that comes while they tell each other is not yet known to all, and counts at the next boundary.
        """
        told = next(filter(None, self.world.gather(self.received)), None)
        self.received = told or self.received
        if told:
            self.check()
