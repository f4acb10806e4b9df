"""AsyncVectorEnv with care for its processes: what fails is named, and none of them outlives the trainer.

    workers = Workers([make_env, make_env])     # each called in a process of its own
    with workers.worker_errors(workers.timeout) as timeout:
        workers.step_async(actions)
        result = workers.step_wait(timeout)

Nothing here imports torch: the processes start by importing this module.
"""

import atexit
import ctypes
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager, suppress
from functools import wraps
from multiprocessing import resource_tracker

from gymnasium.error import AlreadyPendingCallError
from gymnasium.vector import AsyncVectorEnv, AutoresetMode


class EnvError(Exception):
    """An exception of a worker's environment, named: its own class may be one that cannot be sent to the trainer."""


def sendable_errors(method):
    """Exceptions cross from worker to trainer by pickle, which those that hold a foreign object do not survive."""
    @wraps(method)
    def call(*args, **settings):
        try:
            return method(*args, **settings)
        except Exception as error:
            raise EnvError(f"{type(error).__name__}: {error}") from error
    return call


class WorkerError(Exception):
    """A worker died, froze or raised; says which, and why."""


class Workers(AsyncVectorEnv):
    """AsyncVectorEnv that says what went wrong in which worker, and can be closed whatever happened."""

    timeout = 15.0  # seconds; a step takes hundredths of one
    long_timeout = 180.0  # seconds; to start, or to play the current episodes again, takes a few

    def __init__(self, make_groups):
        try:
            # copy=False: the caller copies what it keeps. spawn: forking a process whose libraries have started
            # threads can hang; and a worker is a child of the trainer itself, as it is not with forkserver.
            # DISABLED: an envs.EnvGroup resets by itself.
            with (_time_limit(self.long_timeout, self._kill), _main_script_hidden(), _input_hidden(),
                  _interrupt_blocked()):
                super().__init__(make_groups, copy=False, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        except BaseException as error:
            if not getattr(self, "processes", None):  # it failed in the trainer itself
                if isinstance(error, OSError):
                    raise WorkerError(f"workers' shared memory: {error.strerror}") from error
                raise
            cause = self.cause(error, self.long_timeout)
            self._kill()
            if not isinstance(error, Exception):  # a signal
                raise
            raise WorkerError(f"{cause}; it could not start, and what it said itself is above") from error
        # multiprocessing joins its processes at exit, and waits for a frozen one for ever.
        processes = self.processes
        self._at_exit = atexit.register(lambda: _kill(processes))

    @contextmanager
    def worker_errors(self, timeout):
        """Whatever goes wrong in a worker becomes a WorkerError that names it."""
        try:
            yield timeout
        except AlreadyPendingCallError:  # a step was interrupted, and its answers would pass for the next one's
            raise
        except Exception as error:
            cause = self.cause(error, timeout)
            # They hold bytes on their way to a worker, on which the garbage collector of Python 3.12.1 would crash.
            traceback.clear_frames(error.__traceback__)
            raise WorkerError(cause) from error

    def cause(self, error, timeout):
        """Which worker is to blame for `error`, and how."""
        for i, (process, pipe) in enumerate(zip(self.processes, self.parent_pipes, strict=True)):
            told = error if isinstance(error, EnvError) else f"{type(error).__name__}: {error}"
            if pipe is None:  # gymnasium has taken its error message
                return f"worker {i} raised {told}"
            if process.pid is None:
                return f"worker {i} was not started: {told}"
            # Between the end of its pipe and its own end a process may take a second, for the libraries it has loaded.
            ending = isinstance(error, (EOFError, ConnectionError)) and pipe.poll(0)
            process.join(timeout=5 if ending else 0.1)
            if not process.is_alive():
                return f"worker {i} died, exit code {process.exitcode}"
        silent = [i for i, pipe in enumerate(self.parent_pipes) if not pipe.poll(0)]
        return f"worker {', '.join(map(str, silent))} did not answer for {timeout:.0f} s"

    def close_extras(self, **_):
        """Kill the workers: they hold nothing that is not known here, and one that died or froze cannot be asked."""
        self._kill()
        atexit.unregister(getattr(self, "_at_exit", None))
        for pipe in getattr(self, "parent_pipes", ()):
            if pipe:
                pipe.close()

    def _kill(self):
        _kill(getattr(self, "processes", ()))


def _kill(processes):
    started = [process for process in processes if process.pid]
    for process in started:
        process.kill()
    for process in started:
        process.join(timeout=5)

def end_with(trainer):
    """In a worker: end when the process `trainer`, a pid, ends, or the thread of it that started this worker.

    Not even a frozen worker is left behind, on Linux.
    """
    if os.getpid() != trainer and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != trainer:  # it has died already
            os._exit(1)


def unpinned_cores():
    """The cores that this process was given, sorted; where OpenMP has pinned this thread to one, it is set free.

    As OMP_PROC_BIND, OMP_PLACES and GOMP_CPU_AFFINITY ask for, OpenMP pins the thread that loads it, as `import torch`
    does, to the first of its places. What that thread starts afterwards, workers among it, would share that core.
    """
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return list(range(os.cpu_count()))
    allowed = os.sched_getaffinity(0)
    cores = set(allowed)
    with suppress(OSError, AttributeError):  # no /proc; an OpenMP that knows no places
        with open("/proc/self/maps") as maps:
            found = {re.search(r"/.*/lib[gi]?omp\d*[-.].*", line) for line in maps}
        for library in [ctypes.CDLL(path) for path in {match[0] for match in found if match}]:
            for place in range(library.omp_get_num_places()):
                numbers = (ctypes.c_int * library.omp_get_place_num_procs(place))()
                library.omp_get_place_proc_ids(place, numbers)
                cores.update(numbers)
        if cores != allowed:
            os.sched_setaffinity(0, cores)  # places may name cores that there are not, or that are not ours
    return sorted(os.sched_getaffinity(0))


def spread(processes):
    """Give each worker a core of its own, where they share the cores evenly, and let none push the trainer from its.

    Left to itself, the kernel often wakes two workers on the same core and moves one of them a millisecond too late; or
    the first that is woken takes the trainer's core before it has woken the others.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):
        if len(processes) % len(cores) == 0:
            with suppress(OSError):  # it has died, which its next step will tell
                os.sched_setaffinity(process.pid, {cores[i % len(cores)]})
        with suppress(OSError):  # or this is not allowed here
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))  # it waits its turn when it wakes


@contextmanager
def _time_limit(seconds, kill):
    """Call `kill` after so many seconds, or at once at a signal, if the block has not ended by then.

    gymnasium waits for new workers without a limit, and meanwhile no handler of a signal can run.
    """
    reader, writer = socket.socketpair()
    reader.settimeout(seconds)
    writer.setblocking(False)

    def wait():
        try:
            ended = reader.recv(1) == b"\0"  # else it is the number of a signal
        except TimeoutError:
            ended = False
        if not ended:
            kill()

    watch = threading.Thread(target=wait, daemon=True)
    watch.start()  # before a signal may be blocked, so that one thread at least takes it
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False) if in_main_thread else -1
    try:
        yield
    finally:
        if in_main_thread:
            signal.set_wakeup_fd(before)
        with suppress(BlockingIOError):
            writer.send(b"\0")
        watch.join()
        reader.close()
        writer.close()


@contextmanager
def _main_script_hidden():
    """Processes that start meanwhile do not import the main script: train.py would load torch, 400 MB in 2 s."""
    main = sys.modules["__main__"]
    file = vars(main).pop("__file__", None)
    try:
        yield
    finally:
        if file:
            main.__file__ = file


@contextmanager
def _input_hidden():
    """Processes that start meanwhile do not hold the caller's standard input, a terminal or a pipe, while they live.

    multiprocessing closes their `sys.stdin`, but that leaves the file itself open.
    """
    if sys.__stdin__ is None:  # it was closed before we began, and 0 may be another file by now
        yield
        return
    caller, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)  # neither is inherited
    try:
        os.dup2(nothing, 0)
        yield
    finally:
        os.dup2(caller, 0)
        os.close(caller)
        os.close(nothing)


@contextmanager
def _interrupt_blocked():
    """Signals to all are for the trainer, which ends its workers itself. Processes that start meanwhile inherit this.

    So does multiprocessing's tracker of resources: at its start it lets SIGINT through again, which it ignores itself.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def check_shared_memory(size):
    """multiprocessing maps a file; where it does not fit, the first write to it ends the process without a word."""
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(folder)]
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    if max(free.values()) < size:
        there = ", ".join(f"{folder} has {room / 1e6:.1f}" for folder, room in free.items())
        raise WorkerError(f"the frames that workers share need {size / 1e6:.1f} MB, but {there}; make room, or choose "
                          "a smaller env.num_envs or env.frame_stack")
