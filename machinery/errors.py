"""How a script ends when something is wrong that is not the program's fault: with one line."""

import sys
from contextlib import contextmanager


class UserError(Exception):
    """Something that the user can mend. The message is one line: what is wrong, where, and what to do about it."""


def first_line(error):
    """What a user is told of an exception that somebody else's code raised."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_line(script, *others, hint=""):
    """End `script` with one line and exit status 1 after a UserError, one of `others`, or a file that fails.

    `hint` follows what is said of a file. Every other exception is the program's own fault and keeps its traceback.
    """
    try:
        yield
    except (UserError, *others) as error:
        sys.exit(f"{script}: {error}")
    except OSError as error:
        said = f"{error.filename}: {error.strerror or error}" if error.filename else error
        sys.exit(f"{script}: {said}{hint}")
