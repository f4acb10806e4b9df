"""Episodes live in a window, at real speed and with the instrument panel: `evaluate.py --watch`.

    watch(policy, config, play, seeds=range(1_000_000, 1_000_010), sample_seed=None)

An episode is played a little ahead of what is shown, in a thread, since the panel of a decision takes longer to draw
than a frame may stay. Every frame is shown, each beside the decision that was made on it. Where a machine is too slow
for that, the window says how slow.
"""

import os
import queue
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress

import cv2
import numpy as np
import pygame

from machinery.errors import UserError
from machinery.panel import Panel
from machinery.video import PanelFilm

AHEAD = 0.5  # seconds of an episode that wait to be shown
HOLD = 1.5  # seconds for which an episode's last frame stays
LATE = 0.2  # seconds that the frames after a late one may make up for by being shown sooner
HELP = "space: pause     . or right: one frame     n: next seed     q: quit"
BAR, INK, PAPER = 28, (163, 169, 179), (27, 30, 36)  # height of the line of help in pixels; the panel's colours
STEP_KEYS = (pygame.K_PERIOD, pygame.K_RIGHT)
NEXT, QUIT = "next", "quit"


def watch(policy, config, play, seeds, sample_seed=None):
    """Show one episode per seed until the window is closed. play: that of evaluate.py; sample_seed: as it takes it."""
    title, task = f"{config.model.name}, {'greedy' if sample_seed is None else 'sampled'}", config.env.task
    with open_window(Panel(policy, config, title)) as window:
        for seed in seeds:
            panel, results = Panel(policy, config, f"{title}, seed {seed}"), []

            def produce(send, seed=seed, panel=panel, results=results):
                results.append(play(
                    policy, config.env, [seed], sample_seed=sample_seed, rendered=True,
                    recorder=LiveEpisode(panel, send)))

            with made_ahead(produce, depth=max(round(AHEAD * task.fps), 2)) as pictures:
                whole = window.show(pictures, task.fps, f"{title}, seed {seed}")
            if whole:
                (episode_return,), (length,), (outcome,) = results[0]
                how = task.outcomes[outcome].replace("_", " ")
                print(f"seed {seed}: return {episode_return:.1f}, {length} steps, end: {how}", flush=True)
            if window.asked == QUIT:
                return


class LiveEpisode:
    """The recorder of the one episode that `play` plays: its frames, with the panel around them, go to `send`."""

    def __init__(self, panel, send):
        self.film = PanelFilm(panel, send)

    def begin(self, index, env):
        env.on_frame = self.film.show

    def decide(self, index, *decision):
        self.film.decide(*decision)

    def end(self, index, env):
        self.film.end(env)


class _Left(Exception):
    """Nobody wants to see the rest."""


@contextmanager
def made_ahead(produce, depth):
    """An iterator of what `produce(send)` sends from a thread of its own, where `depth` of it may wait.

    It gives None when nothing has come for a moment, so that keys are obeyed meanwhile. Leaving the block ends the
    thread at its next `send`. An exception in it is raised here.
    """
    made, left = queue.Queue(depth), threading.Event()  # of pairs: what was sent; whether it is the end

    def put(item, is_end):
        while not left.is_set():
            try:
                return made.put((item, is_end), timeout=0.05)
            except queue.Full:
                pass
        raise _Left

    def run():
        with suppress(_Left):
            error = None
            try:
                produce(lambda item: put(item, False))
            except Exception as raised:
                error = raised
            put(error, True)

    def items():
        while True:
            try:
                item, is_end = made.get(timeout=0.02)
            except queue.Empty:
                yield None
                continue
            if is_end:
                if item is not None:
                    raise item
                return
            yield item

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        left.set()
        thread.join()


def video_driver():
    """SDL's name of where a window can be shown; UserError if there is no such place.

    task.py sets SDL_VIDEODRIVER to "dummy", which shows nothing, for all who only draw into memory. Any other value is
    the user's. SDL is never left to choose by itself: without a display it would take a driver that shows nothing.
    """
    if (chosen := os.environ.get("SDL_VIDEODRIVER", "dummy")) != "dummy":
        return chosen
    if sys.platform == "darwin":
        return "cocoa"
    displays = {"x11": "DISPLAY", "wayland": "WAYLAND_DISPLAY"}
    if found := [driver for driver, variable in displays.items() if os.environ.get(variable)]:
        return ",".join(found)
    raise UserError("--watch needs a display, and neither DISPLAY nor WAYLAND_DISPLAY names one; --videos 1 --panel "
                    "films the same")


@contextmanager
def open_window(panel):
    """A Window in which that Panel finds room."""
    driver, usual = video_driver(), os.environ.get("SDL_VIDEODRIVER")
    pygame.display.quit()  # an environment may have begun it without a display
    os.environ["SDL_VIDEODRIVER"] = driver
    try:
        pygame.display.init()
        window = Window(panel.width, panel.height)
    except pygame.error as error:
        raise UserError(f"--watch needs a display, and SDL cannot use this one ({' '.join(str(error).split())}); "
                        "--videos 1 --panel films the same") from None
    finally:
        os.environ["SDL_VIDEODRIVER"] = usual or "dummy"
    try:
        yield window
    finally:
        pygame.display.quit()


def next_due(due, now, period):
    """When the next frame shall be shown, if the last was due at `due` and shown at `now`, seconds.

    A frame that was a little late takes nothing from the clock; after a longer wait the clock goes on from now.
    """
    return (due if now - due < LATE else now) + period


class Window:
    """A window of the desktop, and what its keys ask for.

    It is no `pygame.display.set_mode`: surfaces that environments make after that would take over its format of pixels.
    """

    def __init__(self, width, height):
        height += BAR
        screen = pygame.display.get_desktop_sizes()[0]
        scale = min(1, 0.9 * screen[0] / width, 0.9 * screen[1] / height)  # leaves room for the desktop's own bars
        self.window = pygame.Window("", (round(scale * width), round(scale * height)), resizable=True)
        pygame.font.init()
        self.font = pygame.font.Font(None, 20)
        self.picture = np.zeros((height - BAR, width, 3), np.uint8)
        self.paused, self.steps, self.asked = False, 0, None  # steps: frames asked for while paused
        self.fps, self.shown = 1, deque(maxlen=2)  # when the frames of about the last second were shown

    def show(self, pictures, fps, title):
        """Show pictures, each uint8 (height, width, 3), `fps` a second; whether all were. `asked`: what ended it."""
        self.window.title, self.asked, due = title, None, 0
        self.fps, self.shown = fps, deque(maxlen=max(round(fps), 1) + 1)
        for picture in pictures:
            if picture is None:
                self.obey()
            else:
                if due:  # an episode's first frame is shown at once, even while paused
                    self.wait(due)
                now = time.perf_counter()
                self.shown.append(now)
                self.picture = picture
                self.draw()
                due = next_due(due or now, now, 1 / fps)
            if self.asked:
                return False
        self.wait(due + HOLD)
        return True

    def wait(self, due):
        """Obey the keys until `due`; while paused, until a step is asked for."""
        self.obey()
        while not self.asked:
            if self.paused and self.steps:
                self.steps -= 1
                return
            left = 0.1 if self.paused else due - time.perf_counter()
            if left <= 0:
                return
            self.obey(left)

    def obey(self, seconds=0):
        """What keys and mouse asked for; without anything yet, wait for it that long."""
        event = pygame.event.wait(max(int(1000 * seconds), 1)) if seconds else pygame.event.poll()
        while event.type != pygame.NOEVENT:
            if event.type in (pygame.QUIT, pygame.WINDOWCLOSE):
                self.asked = QUIT
            elif event.type in (pygame.WINDOWEXPOSED, pygame.WINDOWSIZECHANGED):
                self.draw()
            elif event.type == pygame.KEYDOWN:
                self.press(event.key)
            event = pygame.event.poll()

    def press(self, key):
        if key in (pygame.K_q, pygame.K_ESCAPE):
            self.asked = QUIT
        elif key == pygame.K_n:
            self.asked = self.asked or NEXT
        elif key == pygame.K_SPACE:
            self.paused, self.steps = not self.paused, 0
            self.shown.clear()
            self.draw()
        elif key in STEP_KEYS and self.paused:
            self.steps += 1

    def pace(self):
        """What the window says of its speed."""
        if self.paused:
            return "paused"
        if len(self.shown) < self.shown.maxlen:
            return ""
        speed = (len(self.shown) - 1) / (self.shown[-1] - self.shown[0]) / self.fps
        return "real speed" if speed > 0.95 else f"{speed:.0%} of real speed: this machine is too slow"

    def draw(self):
        """The picture as large as the window allows, and below it the line of help."""
        surface, (height, width) = self.window.get_surface(), self.picture.shape[:2]
        room = surface.get_width(), surface.get_height() - BAR
        scale = min(room[0] / width, room[1] / height)
        size, picture = (max(round(scale * width), 1), max(round(scale * height), 1)), self.picture
        if size != (width, height):
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        surface.fill(PAPER)
        left = (room[0] - size[0]) // 2
        surface.blit(pygame.image.frombuffer(np.ascontiguousarray(picture), size, "RGB"), (left, 0))
        help_line, pace = (self.font.render(text, True, INK) for text in (HELP, self.pace()))
        y, x = surface.get_height() - (BAR + pace.get_height()) // 2, room[0] - pace.get_width() - 16
        surface.blit(pace, (x, y))
        if x > help_line.get_width() + 32:
            surface.blit(help_line, (16, y))
        self.window.flip()
