"""What a person reads while a run goes on: a live line on a terminal, plain lines in a file."""

import os
from contextlib import suppress

from tqdm import tqdm


class Outlet:
    """A standard stream that may break, as a pipe to `head` or a log on a full disk does; messages then get lost.

    A run goes on without its messages. Notebooks and loggers put streams of their own in place of the standard ones;
    such a stream need have no more than `write`.
    """

    def __init__(self, stream):
        if isinstance(stream, Outlet):  # a notebook's %run leaves it there for the next one
            stream = stream.stream
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - None: the shell closed it
        with suppress(AttributeError, ValueError):  # no text file, or a closed one
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self._try(self.stream.write, text)
        except UnicodeEncodeError:  # could not be reconfigured
            self._try(self.stream.write, text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self):
        with suppress(AttributeError):
            self._try(self.stream.flush)

    def isatty(self):
        try:
            return self.stream.isatty()
        except (AttributeError, OSError, ValueError):
            return False

    def _try(self, call, *args):
        try:
            call(*args)
        except BrokenPipeError:  # nobody will read again, so the rest goes nowhere
            with suppress(AttributeError, OSError):  # no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):  # ValueError: it is closed
            pass


class Progress:
    """One live line on a terminal, or plain lines in a file, one every `seconds`; none of them if `silent`.

    total, initial: frames of the whole run, frames done before.
    """

    def __init__(self, total, initial, seconds=10, silent=False):
        self.total, self.seconds, self.silent = total, seconds, silent
        self.printed = -seconds  # seconds of training at the last plain line
        self.bar = tqdm(  # short, so that 80 columns show all but the entropy
            total=total, initial=initial, unit="", unit_scale=True, disable=silent or None, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}")

    def show(self, frames, metrics, elapsed):
        """`elapsed`: seconds of training so far, as in speed/total_seconds."""
        if self.silent:
            return
        landed = metrics.get("rollout/landed_rate")
        line = (
            f"return {metrics['rollout/return_mean']:.0f}, "
            f"{'' if landed is None else f'landed {100 * landed:.0f}%, '}"
            f"KL {metrics['update/approx_kl']:.3f}, clip {metrics['update/clip_fraction']:.2f}, "
            f"entropy {metrics['update/entropy']:.2f}")
        if not self.bar.disable:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update(min(frames, self.total) - self.bar.n)  # the last rollout may go beyond the total
        elif elapsed - self.printed >= self.seconds or frames >= self.total:
            self.printed = elapsed
            speed = metrics["speed/frames_per_second"]
            left = max(self.total - frames, 0) / speed / 60
            print(f"{frames / 1e6:.2f} of {self.total / 1e6:.2f} M frames, {elapsed / 60:.1f} min, {line}, "
                  f"{speed:.0f} frames/s, {left:.0f} min left", flush=True)

    def say(self, text):
        """Print a line of its own that does not tear the live one."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self):
        self.bar.close()
