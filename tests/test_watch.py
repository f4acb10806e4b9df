"""`evaluate.py --watch`: a real window, real keys, and what it shows is what the environment rendered."""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from ctypes.util import find_library

import numpy as np
import pygame
import pytest
import torch
from conftest import ROOT

import evaluate
from machinery import watch
from machinery.checkpoint import build_policy, load_policy
from machinery.config import load_config
from machinery.errors import UserError
from machinery.panel import FRAME_TOP, MARGIN, Panel
from machinery.watch import BAR, INK, PAPER, QUIT, Window, made_ahead, next_due
from runs import HANGS

WIDTH, HEIGHT = 1280, 1024  # pixels of the virtual screen
KEYSYMS = {"space": 0x20, "period": 0x2E, "right": 0xFF53, "n": 0x6E, "q": 0x71}
CARTPOLE = ["env.id=CartPole-v1", "env.shrink_factor=8", "env.frame_skip=2", "model.mirror=false"]


def rendered_frames(policy, config, seed, sample_seed=None):
    """The frames of one episode as `render()` gives them, and (returns, lengths, outcomes)."""
    frames = []

    class Recorder:
        def begin(self, index, env):
            env.on_frame = lambda frame: frames.append(frame.copy())

        def decide(self, *_):
            pass

        def end(self, *_):
            pass

    return frames, evaluate.play(
        policy, config.env, [seed], sample_seed=sample_seed, rendered=True, recorder=Recorder())


class Screen:
    """A virtual screen that can be photographed, and a keyboard: the keys are real ones for whoever has the focus."""

    def __init__(self, folder):
        reading, writing = os.pipe()
        self.server = subprocess.Popen(
            ["Xvfb", "-displayfd", str(writing), "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-fbdir", folder,
             "-nolisten", "tcp"], pass_fds=[writing], stderr=subprocess.DEVNULL)
        os.close(writing)
        with os.fdopen(reading) as number:
            self.name = f":{number.readline().strip()}"
        self.file = folder / "Xvfb_screen0"
        self.x11, self.xtest = (ctypes.CDLL(find_library(name)) for name in ("X11", "Xtst"))
        self.x11.XOpenDisplay.restype = ctypes.c_void_p
        self.display = ctypes.c_void_p(self.x11.XOpenDisplay(self.name.encode()))
        assert self.display.value, self.name

    def close(self):
        self.x11.XCloseDisplay(self.display)
        self.server.terminate()
        self.server.wait()

    def press(self, key):
        code = self.x11.XKeysymToKeycode(self.display, ctypes.c_ulong(KEYSYMS[key])) & 0xFF
        for down in (1, 0):
            self.xtest.XTestFakeKeyEvent(self.display, code, down, ctypes.c_ulong(0))
        self.x11.XSync(self.display, 0)

    def photo(self):
        """uint8 (HEIGHT, WIDTH, 3)"""
        content = self.file.read_bytes()  # an X window dump
        header = struct.unpack(">25I", content[:100])
        pixel, row, start = header[11] // 8, header[12], header[0] + 12 * header[19]
        rows = np.frombuffer(content, np.uint8, HEIGHT * row, start).reshape(HEIGHT, row)
        return rows[:, : WIDTH * pixel].reshape(HEIGHT, WIDTH, pixel)[..., 2::-1]


@pytest.fixture
def screen(tmp_path):
    if not shutil.which("Xvfb"):
        pytest.skip("a window needs a screen: apt-get install xvfb")
    if not (find_library("X11") and find_library("Xtst")):
        pytest.skip("real keys need XTEST: apt-get install libxtst6")
    screen = Screen(tmp_path)
    yield screen
    screen.close()


def until(look, patience=90):
    """The first true answer of `look`; patience, seconds, is for machines that do much else."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if answer := look():
            return answer
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_keys_in_a_real_window(screen, tmp_path):
    """It runs, pauses, steps by single frames, goes on, goes to the next seed and ends; nothing is written."""
    policy, config, _ = load_policy(ROOT / "results" / "cnn")
    numbers = {}  # of a frame: (seed, step), or several if they look alike
    for seed in (1000001, 1000002):
        for step, frame in enumerate(rendered_frames(policy, config, seed)[0]):
            numbers.setdefault(frame.tobytes(), []).append((seed, step))
    height = Panel(policy, config, "").height + BAR
    left, top = (WIDTH - Panel.width) // 2, (HEIGHT - height) // 2  # no window manager: it stands in the middle
    pygame.font.init()
    word = pygame.font.Font(None, 20).render("paused", True, INK, PAPER)
    paused = pygame.surfarray.array3d(word).transpose(1, 0, 2)

    def shown():
        return numbers.get(screen.photo()[top + FRAME_TOP :, left + MARGIN :][:400, :600].tobytes())

    def says_paused():
        bar = screen.photo()[top + height - BAR : top + height, left : left + Panel.width]
        y, x = BAR - (BAR + paused.shape[0]) // 2, Panel.width - 16 - paused.shape[1]
        difference = bar[y:, x:][: paused.shape[0], : paused.shape[1]].astype(int) - paused
        return np.abs(difference).max() < 8

    shelf = sorted((ROOT / "results" / "cnn").rglob("*"))
    watching = subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", "--checkpoint", ROOT / "results" / "cnn", "--watch", "--seed", "1000001",
         "--episodes", "2"], env=os.environ | {"DISPLAY": screen.name}, cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: (seen := shown()) and seen[-1] >= (1000001, 3))
        assert not says_paused()
        screen.press("space")
        until(says_paused)
        seed, step = until(shown)[0]
        time.sleep(0.5)
        assert (seed, step) in shown()
        for key in ("period", "right"):
            screen.press(key)
            before, step = step, step + 1
            until(lambda before=before: (seen := shown()) and (seed, before) not in seen)
            assert (seed, step) in shown()
        assert says_paused()
        screen.press("space")
        until(lambda: (seen := shown()) and seen[0] > (seed, step))
        assert not says_paused()
        screen.press("n")
        until(lambda: (seen := shown()) and seen[0][0] == 1000002)
        screen.press("q")
        out, err = watching.communicate(timeout=HANGS)
    finally:
        watching.kill()
    assert (watching.returncode, out, err) == (0, "", "")  # neither episode was seen to its end
    assert sorted((ROOT / "results" / "cnn").rglob("*")) == shelf
    assert [path.name for path in tmp_path.iterdir()] == ["Xvfb_screen0"]


@pytest.mark.parametrize(("overrides", "sample_seed"), [
    ([], None), (["env.continuous=true"], 1000003), (CARTPOLE, 1000003)], ids=["greedy", "continuous", "cartpole"])
def test_each_frame_is_shown_once_and_in_order(overrides, sample_seed, monkeypatch, capsys):
    """And the returns are those of the same episodes in a report."""
    threads = threading.active_count()
    monkeypatch.setenv("SDL_VIDEODRIVER", "offscreen")
    monkeypatch.setattr(watch, "HOLD", 0)
    torch.manual_seed(3)
    config = load_config(None, overrides)
    policy, pictures, said = build_policy(config).eval(), [], ""
    draw = Window.draw
    monkeypatch.setattr(Window, "draw", lambda window: (pictures.append(window.picture), draw(window)))
    monkeypatch.setattr(Window, "obey", lambda window, seconds=0: time.sleep(seconds))  # no other reason to draw
    watch.watch(policy, config, evaluate.play, [1000003, 1000004], sample_seed)
    frames = []
    for seed in (1000003, 1000004):
        rendered, ((total,), (length,), _) = rendered_frames(policy, config, seed, sample_seed)
        frames += rendered
        said += f"seed {seed}: return {total:.1f}, {length} steps, end: "
    assert "".join(line.rpartition(" end: ")[0] + " end: " for line in capsys.readouterr().out.splitlines()) == said
    panel = Panel(policy, config, "")
    panel.drawn = np.zeros((panel.height, panel.width, 3), np.uint8)  # to scale frames as the panel does
    assert len(pictures) == len(frames)
    for picture, frame in zip(pictures, frames, strict=True):
        where = (slice(FRAME_TOP, FRAME_TOP + 400), slice(MARGIN, MARGIN + 600))
        expected = panel.picture(frame)[where]
        columns = expected.any((0, 2))  # beside a narrower frame there is the panel's own colour
        assert (picture[where][:, columns] == expected[:, columns]).all()
    assert os.environ["SDL_VIDEODRIVER"] == "offscreen"  # a user's own stays
    assert threading.active_count() == threads


@pytest.mark.parametrize(("environment", "told"), [
    ({}, "neither DISPLAY nor WAYLAND_DISPLAY names one"), ({"DISPLAY": ":20999"}, "x11 not available"),
    ({"SDL_VIDEODRIVER": "papyrus"}, "papyrus not available")], ids=["none", "dead", "no such driver"])
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has a display")
def test_without_a_display_it_says_so_in_one_line(environment, told, policy_file):
    bare = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")}
    done = subprocess.run(
        [sys.executable, evaluate.__file__, "--checkpoint", policy_file, "--watch", "--episodes", "1"],
        capture_output=True, text=True, check=False, env=bare | environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("evaluate.py: --watch needs a display")
    assert told in done.stderr
    assert "--videos 1 --panel films the same" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--grid", "--videos=1", "--webp=x.webp", "--output=x"])
def test_watching_writes_nothing(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--watch", option])
    assert "--watch writes nothing" in capsys.readouterr().err


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "offscreen")

    class Size:
        width, height = 640, 480

    with watch.open_window(Size) as window:
        window.obey()
        yield window


@pytest.mark.parametrize("event", [
    pygame.event.Event(pygame.KEYDOWN, key=pygame.K_q), pygame.event.Event(pygame.KEYDOWN, key=pygame.K_ESCAPE),
    pygame.event.Event(pygame.QUIT), pygame.event.Event(pygame.WINDOWCLOSE)], ids=["q", "escape", "quit", "close"])
def test_each_way_to_end(event, window):
    pictures = [np.zeros((480, 640, 3), np.uint8)] * 100_000
    pygame.event.post(event)
    assert window.show(pictures, 50, "title") is False
    assert window.asked == QUIT


def test_a_picture_keeps_its_shape_in_a_window_of_any_size(window):
    window.picture = np.full((480, 640, 3), 200, np.uint8)
    for size in ((320, 300), (900, 480 + BAR), (50, 40)):
        window.window.size = size
        window.draw()
        shown = (pygame.surfarray.array3d(window.window.get_surface()) == 200).all(2)  # (width, height)
        columns, rows = shown.any(1).sum(), shown[:, : size[1] - BAR].any(0).sum()
        assert columns / rows == pytest.approx(640 / 480, rel=0.1)
        assert columns == size[0] or rows == size[1] - BAR


def test_the_clock(window):
    """Small delays are made up for, long ones are not; and the window says what the machine manages."""
    assert next_due(10.0, 10.015, 0.02) == pytest.approx(10.02)
    assert next_due(10.0, 13.0, 0.02) == pytest.approx(13.02)
    window.show([window.picture] * 60, 1000, "title")
    assert window.pace() == ""  # too few to tell
    for speed, said in ((1.0, "real speed"), (0.5, "50% of real speed: this machine is too slow")):
        window.shown.clear()
        window.shown.extend(i / 1000 / speed for i in range(window.shown.maxlen))
        assert window.pace() == said


def test_what_is_made_ahead_waits_and_ends_with_its_reader():
    sent, threads = [], threading.active_count()

    def produce(send):
        for i in range(100):
            send(i)
            sent.append(i)

    with made_ahead(produce, depth=3) as items:
        assert [item for item, _ in zip((i for i in items if i is not None), range(5), strict=False)] == [0, 1, 2, 3, 4]
        until(lambda: len(sent) >= 6)
    assert len(sent) <= 5 + 1 + 3
    assert threading.active_count() == threads

    def fail(send):
        send(0)
        raise UserError("no ink")

    with pytest.raises(UserError, match="no ink"), made_ahead(fail, depth=3) as items:
        list(items)
