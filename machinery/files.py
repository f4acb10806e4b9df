"""Files that are whole or not there, and folders that one process holds at a time."""

import errno
import fcntl
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from machinery.errors import UserError

# How a file system says that it cannot open a folder as a file, or cannot bring it, or anything, down to the disk.
UNSUPPORTED = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}


def write_atomically(path, data):
    """`data` (bytes) under `path` whole or not at all, also through a power cut; OSError leaves the old file there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first one is told
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk is reported without a name
        raise


def sync(descriptor):
    """Bring what was written down to the disk, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_folder(folder):
    descriptor = _open_folder(folder)
    if descriptor is None:
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _open_folder(folder):
    """A descriptor, or None where the file system opens no folders."""
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None


def remove_unfinished(folder):
    """Remove what a kill in the middle of `write_atomically` left anywhere in `folder`."""
    for file in Path(folder).rglob(".*.tmp"):
        file.unlink()


def newest_run(root="runs", holding="checkpoints/*.ckpt"):
    """The run whose newest file matching `holding` was written last, or None."""
    files = [file for run in Path(root).glob("*/") for file in run.glob(holding)]
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return newest and Path(*newest.parts[: len(Path(root).parts) + 1])


def is_newer(file, than):
    """Whether `file` is there, and was written after the other one or at the same time."""
    try:
        return file.stat().st_mtime_ns >= than.stat().st_mtime_ns
    except OSError:
        return False


@contextmanager
def locked(folder, wait=False):
    """Hold `folder`; the operating system lets go of it when the process ends, however it ends.

    If another process holds it: UserError, or with `wait` wait for its end.
    """
    descriptor = _open_folder(folder)
    if descriptor is None:  # then there is nothing to lock
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(f"{folder}: another process is at this run; let it end, or stop it, first") from None
        yield
    finally:
        os.close(descriptor)
