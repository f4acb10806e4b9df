"""Files that are whole or not there, and folders that one process holds at a time."""

import fcntl
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from machinery.errors import UserError


def write_atomically(path, data):
    """`data` (bytes) under `path` whole or not at all, also through a power cut; OSError leaves the old file there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk is reported without a name
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_unfinished(folder):
    """Remove what a kill in the middle of `write_atomically` left anywhere in `folder`."""
    for file in Path(folder).rglob(".*.tmp"):
        file.unlink()


def newest_run(root="runs", holding="checkpoints/*.ckpt"):
    """The run whose newest file matching `holding` was written last, or None."""
    files = [file for run in Path(root).glob("*/") for file in run.glob(holding)]
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return newest and Path(*newest.parts[: len(Path(root).parts) + 1])


@contextmanager
def locked(folder, wait=False):
    """Hold `folder`; the operating system lets go of it when the process ends, however it ends.

    If another process holds it: UserError, or with `wait` wait for its end.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(f"{folder}: another process is at this run; let it end, or stop it, first") from None
        yield
    finally:
        os.close(descriptor)
