"""Landings as films: H.264 while they are played, and GIF or WebP for pages."""

import errno
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from machinery.errors import first_line


class VideoRecorder:
    """Writes the first `count` episodes as H.264 files, frame by frame while they are played.

    `name` is that of each file, with {seed} where the episode's shall stand. `make_panel`, if given, makes the Panel of
    an episode from its title; what it shows is filmed beside, as NAME-panel.mp4.
    A missing or failing encoder, or a failing panel, costs the videos, never the score: it is reported once, and
    playing goes on.
    """

    def __init__(self, folder, count, seed, name="seed-{seed}", make_panel=None):
        self.folder, self.count, self.seed, self.name, self.make_panel = Path(folder), count, seed, name, make_panel
        self.paths, self.failure, self.panel_failure = [], None, None
        self.writers, self.films = {}, {}  # by index of the episode

    def __enter__(self):
        if self.count:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception):
        for index in list(self.writers):
            self._close(index)
        for path in self.paths if exception[0] is None else ():
            try:  # the encoder does not tell when a full disk cut it off
                whole = _ffmpeg("-i", path, "-map", "0:v:0", "-f", "null", "-").returncode == 0
            except (OSError, RuntimeError):
                whole = False
            if not whole:
                path.unlink(missing_ok=True)
                if not (self.panel_failure and path.stem.endswith("-panel")):  # of which it has been told
                    self._fail(OSError(f"{path} is not whole"))

    def begin(self, index, env):
        env.on_frame = None
        if index >= self.count or self.failure:
            return
        name = self.name.format(seed=self.seed + index)
        try:
            send = self._open(index, f"{name}.mp4", *reversed(env.task.viewport), env.task.fps)
        except (OSError, RuntimeError) as error:
            return self._fail(error)
        if self.make_panel:
            with self._panel_trouble(index):
                panel = self.make_panel(f"seed {self.seed + index}")
                self.films[index] = PanelFilm(panel, self._open(
                    index, f"{name}-panel.mp4", panel.width, panel.height, env.task.fps))

        def on_frame(frame):
            try:
                send(frame)
            except (OSError, StopIteration) as error:
                env.on_frame = None
                self._fail(error)
            with self._panel_trouble(index) as film:
                if film:
                    film.show(frame)

        env.on_frame = on_frame

    def decide(self, index, env, frames, output, row, action):
        """`action` was taken on `frames`; `output`: the PolicyOutput of a batch in which that decision is `row`."""
        with self._panel_trouble(index) as film:
            if film:
                film.decide(env, frames, output, row, action)

    def end(self, index, env):
        with self._panel_trouble(index) as film:
            if film:
                film.end(env)
        self.films.pop(index, None)
        self._close(index)

    def _open(self, index, name, width, height, fps):
        """A function that takes the frames, uint8 (height, width, 3), of a new file of episode `index`."""
        path = self.folder / name
        # yuv420p is what browsers play; it needs even sides, so an odd one is scaled.
        writer = imageio_ffmpeg.write_frames(
            str(path), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2,
            output_params=["-movflags", "+faststart"])
        writer.send(None)
        self.writers.setdefault(index, []).append(writer)
        self.paths.append(path)
        return lambda frame: writer.send(np.ascontiguousarray(frame))

    def _close(self, index):
        """End the encoders of an episode; each takes a hundred megabytes while it lives."""
        for writer in self.writers.pop(index, ()):
            try:
                writer.close()
            except OSError as error:
                self._fail(error)

    @contextmanager
    def _panel_trouble(self, index):
        """Gives the episode's PanelFilm, or None; whatever goes wrong with it ends it."""
        try:
            yield self.films.get(index)
        except Exception as error:
            self.films.pop(index, None)
            if not self.panel_failure:
                print(f"no panel: {first_line(error)}; scores are not affected", file=sys.stderr)
            self.panel_failure = error

    def _fail(self, error):
        if not self.failure:
            self.failure = error
            print(f"no videos: the encoder failed ({first_line(error)}); scores are not affected", file=sys.stderr)


class PanelFilm:
    """Films a Panel. Each frame waits for the next, so that it is shown beside the decision that was made on it."""

    def __init__(self, panel, send):
        self.panel, self.send, self.waiting = panel, send, None

    def show(self, frame):
        if self.waiting is not None:
            self.send(self.panel.picture(self.waiting))
        self.waiting = None if frame is None else frame.copy()

    def decide(self, env, frames, output, row, action):
        """As VideoRecorder.decide."""
        distribution, value = output.distribution, float(output.value[row])
        numbers = (distribution.mean if env.task.continuous else distribution.probs)[row].cpu().numpy()
        self.panel.decide(frames, numbers, value, action, env.episode_return, env.episode_length, env.conditions())

    def end(self, env):
        self.panel.end(env.episode_return, env.episode_length, env.task.outcomes[env.outcome()].replace("_", " "))
        self.show(None)


def write_gif(video, output, width=450, fps=25):
    """A video as an endlessly repeating GIF; OSError if the encoder fails."""
    filters = f"fps={fps},scale={width}:-1:flags=lanczos,split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
    _encode(video, output, "-vf", filters)


def write_webp(video, output, fps=12.5, hold=2):
    """A video as an endlessly repeating WebP that rests at its end for `hold` seconds; OSError if the encoder fails."""
    filters = f"fps={fps},tpad=stop_mode=clone:stop_duration={hold}"
    _encode(video, output, "-vf", filters, "-codec:v", "libwebp_anim", "-quality", "60", "-loop", "0", "-f", "webp")


def _encode(video, output, *options):
    try:
        done = _ffmpeg("-y", "-i", video, *options, output)
    except RuntimeError as error:
        raise OSError(errno.ENOENT, first_line(error), str(output)) from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["the encoder failed"]
        raise OSError(errno.EIO, reason[0], str(output))


def _ffmpeg(*words):
    """Run ffmpeg to its end; RuntimeError if there is none.

    It gets no input. It would read the caller's, such as the rest of a loop's list; and it would change the settings of
    a terminal, which stops a job in the background.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", *map(str, words)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)


