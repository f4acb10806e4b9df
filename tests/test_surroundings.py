"""The places that users start the program from: a terminal's background, loops, notebooks, odd file systems."""

import codecs
import errno
import fcntl
import io
import os
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

import sweep
from machinery import files
from machinery.errors import UserError
from machinery.files import locked, write_atomically
from machinery.terminal import Outlet, Progress
from runs import BARE, CONFIG, HANGS, ROOT, TINY, read_terminal

SCORE = f"{sys.executable} {ROOT}/evaluate.py --checkpoint {ROOT}/results/cnn --episodes 1"


def in_a_terminal(folder, *lines):
    """What an interactive bash, the leader of a terminal of its own, shows after these lines have been typed."""
    master, slave = os.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], cwd=folder, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"HISTFILE": ""})
    os.close(slave)
    os.write(master, "".join(line + "\n" for line in lines).encode())
    shown = read_terminal(master)
    shell.wait()
    return shown.decode()


def test_a_job_in_the_background_of_a_terminal_is_not_stopped(tmp_path):
    shown = in_a_terminal(
        tmp_path, f"{SCORE} --videos 1 --webp landing.webp --output . >log 2>&1 &",
        "while jobs %1 | grep -q Running; do sleep 0.1; done; jobs; kill -9 %1; exit",
        "exit")  # bash leaves only when told twice, while a job is stopped
    log = (tmp_path / "log").read_text()
    assert "Stopped" not in shown
    assert "landing.webp" in log
    assert (tmp_path / "landing.webp").stat().st_size > 1000
    assert "no videos" not in log


def test_a_loop_that_reads_keeps_its_input(tmp_path):
    (tmp_path / "seeds.txt").write_text("1000001\n1000002\n")
    encoder = tmp_path / "ffmpeg"  # tells what each of them gets
    encoder.write_text(f'#!/bin/sh\nreadlink /proc/self/fd/0 >>{tmp_path}/inputs\nexec {get_ffmpeg_exe()} "$@"\n')
    encoder.chmod(0o755)
    loop = f"while read s; do {SCORE} --seed $s --videos 1 --webp w$s.webp --output $s; done <seeds.txt"
    done = subprocess.run(["bash", "-c", loop], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=os.environ | {"IMAGEIO_FFMPEG_EXE": str(encoder)})
    assert sorted(path.name for path in tmp_path.glob("*.webp")) == ["w1000001.webp", "w1000002.webp"], done.stderr
    inputs = (tmp_path / "inputs").read_text().splitlines()
    assert len(inputs) == 6  # of each seed the film, the look whether it is whole, and the WebP
    assert all(name == "/dev/null" or name.startswith("pipe:") for name in inputs), inputs


def test_the_trainers_of_a_sweep_get_no_input(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("import os\nprint(os.readlink('/proc/self/fd/0'))\n")
    monkeypatch.setattr(sweep, "TRAIN", script)
    monkeypatch.chdir(tmp_path)
    (job,) = sweep.plan(CONFIG, "s", ["1"], [])
    assert job.start(None, own_log=True).wait() == 0
    assert (job.folder / "train.log").read_text() == "/dev/null\n"


WORKERS = """
import os
import psutil
from envs import make_vector_env
if __name__ == "__main__":
    envs = make_vector_env(num_envs=2, num_workers=2, seed=1)
    envs.reset()
    envs.step(envs.action_space.sample())
    for child in psutil.Process().children(recursive=True):
        print(os.readlink(f"/proc/{child.pid}/fd/0"))
    envs.close()
"""


def workers_inputs(command, **how):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **how)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_workers_do_not_hold_the_input():
    inputs = workers_inputs([sys.executable, "-c", WORKERS], input="1\n2\n")
    assert inputs == 3 * ["/dev/null"]  # two workers, and what keeps account of their shared memory


def test_workers_start_where_temporary_files_have_a_long_path_and_there_is_no_input(tmp_path):
    """A socket in there would have too long a name. As a scheduler may start us: with standard input closed."""
    folder = tmp_path / ("x" * 102)
    folder.mkdir()
    (tmp_path / "play.py").write_text(WORKERS.replace("print(", "print('played') #"))
    command = ["bash", "-c", f"{sys.executable} {tmp_path}/play.py <&-"]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    assert workers_inputs(command, env=environment) == 3 * ["played"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend", "tkagg"])
def test_a_notebooks_backend_does_not_matter(backend, tmp_path):
    """Nor one that needs a display."""
    shutil.copy(ROOT / "results" / "cnn" / "metrics.csv", tmp_path)
    done = subprocess.run([sys.executable, ROOT / "plot.py", tmp_path], capture_output=True, text=True, check=False,
                          env=os.environ | {"MPLBACKEND": backend})
    assert done.stdout == f"{tmp_path}/curves.png\n", done.stderr
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_notebook_itself_keeps_its_backend():
    code = "import os, plot, matplotlib as m; print(m.rcParams['backend'], os.environ['MPLBACKEND'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=os.environ | {"MPLBACKEND": "svg"})
    assert done.stdout == "svg svg\n"


class NotebookStream(io.TextIOBase):
    """As ipykernel's OutStream and IDLE's: a text stream without a file, and without `reconfigure`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


class LoggerStream:
    """As capturing loggers have them: it can be written to, and that is all."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("kind", [NotebookStream, LoggerStream])
def test_streams_that_are_no_files_take_messages(kind, monkeypatch):
    stream = kind()
    outlet = Outlet(Outlet(stream))
    assert outlet.stream is stream
    assert not outlet.isatty()
    print("±", file=outlet, flush=True)
    monkeypatch.setattr(sys, "stdout", outlet)
    monkeypatch.setattr(sys, "stderr", outlet)
    progress = Progress(100, 0)
    progress.say("said")
    progress.close()
    assert stream.text == "±\nsaid\n"


def test_a_stream_that_knows_few_letters_gets_the_others_spelled_out():
    file = io.BytesIO()
    print("1 ± 2", file=Outlet(codecs.getwriter("ascii")(file)), flush=True)
    assert file.getvalue() == b"1 \\xb1 2\n"


def test_a_stream_that_is_closed_or_broken_without_a_file_loses_messages():
    closed, broken = io.StringIO(), NotebookStream()
    closed.close()

    def write(text):
        raise BrokenPipeError

    broken.write = write
    for stream in (closed, broken):
        print("a message", file=Outlet(stream), flush=True)
        assert not Outlet(stream).isatty()


def test_cells_of_a_notebook_train_score_and_draw(tmp_path):
    """With %run, in the notebook's own process; what the notebook prints and draws later still arrives."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    score = f"%run {ROOT}/evaluate.py --checkpoint runs/x --episodes 1 --videos 0"
    cells = [
        f"%run {ROOT}/train.py --config {CONFIG} {' '.join([*TINY, *BARE])} run.name=x", score, score,
        f"!{sys.executable} {ROOT}/plot.py runs/x", "print('later')",
        "import matplotlib.pyplot as plt; plt.plot([1, 2]); print(plt.get_backend())"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    nbclient.NotebookClient(
        notebook, timeout=HANGS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, scored, again, drawn, later, own = (
        "".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells)
    assert "M frames" in trained
    assert "runs/x/evaluation/report.json" in scored
    assert "runs/x/evaluation/report.json" in again
    assert (drawn.strip(), later) == ("runs/x/curves.png", "later\n")
    assert "matplotlib_inline" in own
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].outputs)


NO_FOLDERS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
int fsync(int file) {
    struct stat found;
    if (fstat(file, &found) == 0 && S_ISDIR(found.st_mode)) { errno = EINVAL; return -1; }
    if (getenv("NO_FSYNC")) { errno = EINVAL; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, "fsync"))(file);
}
static int opened(const char *name, const char *path, int flags, mode_t mode) {
    struct stat found;
    if (getenv("NO_OPEN") && stat(path, &found) == 0 && S_ISDIR(found.st_mode)) { errno = EISDIR; return -1; }
    return ((int (*)(const char *, int, ...)) dlsym(RTLD_NEXT, name))(path, flags, mode);
}
#define OPEN(name) int name(const char *path, int flags, ...) { \\
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \\
    return opened(#name, path, flags, mode); }
OPEN(open)
OPEN(open64)
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    """A library that makes the file system one without fsync of folders; and more with NO_FSYNC or NO_OPEN set."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc to build such a file system's stand-in with")
    folder = tmp_path_factory.mktemp("preload")
    (folder / "no_folders.c").write_text(NO_FOLDERS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "no_folders.so", folder / "no_folders.c", "-ldl"],
                   check=True)
    return folder / "no_folders.so"


HELD = """
import os
import sys
from machinery.files import locked
folder = sys.argv[1]
try:
    os.fsync(os.open(folder, os.O_RDONLY))
except OSError as error:
    print(type(error).__name__)
with locked(folder):
    print("held")
"""


@pytest.mark.parametrize(("more", "refusal"), [
    ({}, "OSError"), ({"NO_FSYNC": "1"}, "OSError"), ({"NO_OPEN": "1"}, "IsADirectoryError")])
def test_a_file_system_without_fsync_or_open_of_folders(more, refusal, preload, tmp_path):
    environment = os.environ | {"LD_PRELOAD": str(preload)} | more
    held = subprocess.run([sys.executable, "-c", HELD, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=environment)
    assert held.stdout.split() == [refusal, "held"], held.stderr
    shutil.copy(ROOT / "results" / "cnn" / "metrics.csv", tmp_path)
    done = subprocess.run([sys.executable, ROOT / "plot.py", tmp_path], capture_output=True, text=True, check=False,
                          env=environment)
    assert done.stdout == f"{tmp_path}/curves.png\n", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_the_same_without_a_compiler(call, tmp_path, monkeypatch):
    usual = getattr(os, call)

    def refuse(first, *rest):
        if os.path.isdir(first):
            raise OSError(errno.EINVAL, "Invalid argument")
        return usual(first, *rest)

    monkeypatch.setattr(files.os, call, refuse)
    with locked(tmp_path):
        write_atomically(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "open"])
def test_an_error_of_the_disk_names_its_file(failing, tmp_path, monkeypatch):
    """And is none that a file system without such calls gives. Whichever call fails, the old content is whole."""
    target, call = tmp_path / "file", getattr(os, failing)
    target.write_bytes(b"old")

    def fail(first, *rest):
        if failing != "open" or Path(first).is_dir():
            raise OSError(5, "Input/output error")
        return call(first, *rest)

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match=f"Input/output error: '{target}'"):
        write_atomically(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == (b"new" if failing == "open" else b"old")
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_opened_is_still_one_that_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), locked(tmp_path / "absent"):
        pass
    with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
