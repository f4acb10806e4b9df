"""Records of a run whatever happens to them: metrics.csv, MLflow's store, the streams that messages go to."""

import json
import os
import sqlite3
import subprocess
import threading
import time

import mlflow
import pytest

from machinery import tracking
from machinery.config import load_config
from machinery.errors import UserError
from machinery.terminal import Outlet
from machinery.tracking import Metrics, Queue, Tracker, TrackingError, connect, git_commit, machine_tags, masked
from runs import ROOT, no_room

HEADER = "frames,update/entropy\n"


def test_rows_that_a_full_disk_refused_are_written_later(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.append({"frames": 1, "update/entropy": 0.5})
    with no_room():
        for frames in (2, 3):
            with pytest.raises(OSError, match=r"File too large: .*metrics\.csv"):
                metrics.append({"frames": frames, "update/entropy": 0.5})
        assert metrics.path.read_text() == HEADER + "1,0.5\n"
    metrics.flush()
    assert metrics.path.read_text() == HEADER + "1,0.5\n2,0.5\n3,0.5\n"
    assert metrics.queue.rows == []


def test_row_leaves_memory_once_the_disk_and_mlflow_have_it(tmp_path):
    queue = Queue("disk", "MLflow")
    metrics = Metrics(tmp_path / "metrics.csv", queue)
    for frames in (1, 2):
        metrics.append({"frames": frames, "update/entropy": 0.5})
    with no_room(), pytest.raises(OSError, match="File too large"):
        metrics.append({"frames": 3, "update/entropy": 0.5})

    def waiting(taker):
        return [row["frames"] for _, row in queue.waiting(taker)]

    assert (waiting("disk"), waiting("MLflow"), len(queue.rows)) == ([3], [1, 2, 3], 3)
    queue.took("MLflow", 1)
    assert (waiting("disk"), waiting("MLflow"), len(queue.rows)) == ([3], [2, 3], 2)
    queue.took("MLflow", 2)
    assert (waiting("disk"), waiting("MLflow"), len(queue.rows)) == ([3], [], 1)
    metrics.append({"frames": 4, "update/entropy": 0.5})
    assert (waiting("disk"), waiting("MLflow"), len(queue.rows)) == ([], [4], 1)
    assert metrics.path.read_text() == HEADER + "1,0.5\n2,0.5\n3,0.5\n4,0.5\n"


def test_header_that_a_full_disk_refused(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    with no_room(5), pytest.raises(OSError, match="No space left"):  # five bytes fit, and are taken back
        metrics.append({"frames": 1, "update/entropy": 0.5})
    metrics.append({"frames": 2, "update/entropy": 0.5})
    assert metrics.path.read_text() == HEADER + "1,0.5\n2,0.5\n"


def test_a_metric_that_comes_later_is_nan_in_the_rows_before(tmp_path):
    path = tmp_path / "metrics.csv"
    Metrics(path).append({"frames": 1, "update/entropy": 0.5})
    metrics, longer = Metrics(path), {"frames": 2, "rollout/fuel_mean": 3.0, "update/entropy": 0.25}
    with no_room(), pytest.raises(OSError, match="File too large"):
        metrics.append(longer)
    assert path.read_text() == HEADER + "1,0.5\n"
    metrics.append({"frames": 3, "update/entropy": 0.125})
    assert path.read_text() == "frames,update/entropy,rollout/fuel_mean\n1,0.5,nan\n2,0.25,3.0\n3,0.125,nan\n"
    assert list(tmp_path.iterdir()) == [path]


def test_machine_json_says_where_a_run_began_and_where_it_went_on(tmp_path, capsys):
    file, quiet = tmp_path / "machine.json", load_config(None, ["tracking.mlflow=false"])
    with Tracker(quiet, tmp_path, threads=1):
        began = json.loads(file.read_text())
    for _ in range(2):
        with Tracker(quiet, tmp_path, threads=2):
            pass
    assert json.loads(file.read_text()) == began | {"resumed": [began | {"threads": "2"}]}
    assert capsys.readouterr().out.count("threads was 1, is 2") == 1
    with Tracker(quiet, tmp_path, threads=1):
        pass
    assert [each["threads"] for each in json.loads(file.read_text())["resumed"]] == ["2", "1"]


@pytest.mark.parametrize("damage", [b"3,0.", b"3\n", b"\n", b"\0\0\0\0", b"\0\0\n", b"\xff,1\n", b"3,words\n"])
def test_lines_that_are_not_whole_are_left_out_when_a_run_goes_on(damage, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(HEADER.encode() + b"1,0.5\n2,0.25\n" + damage)
    assert Metrics(path).drop_after(2) == 2
    assert path.read_text() == HEADER + "1,0.5\n2,0.25\n"


def test_rows_of_what_is_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    assert Metrics(path).drop_after(7) == 0  # a missing file is none to be cut
    path.write_text(HEADER + "1,0.5\n2,nan\n3,0.25\n")
    assert Metrics(path).drop_after(2) == 2
    assert path.read_text() == HEADER + "1,0.5\n2,nan\n"


@pytest.mark.parametrize("content", ["no metrics\n", "fra", "\xff\xfe"])
def test_file_that_holds_no_metrics_is_put_aside(content, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    metrics = Metrics(path)
    assert metrics.drop_after(2) == 0
    metrics.append({"frames": 3, "update/entropy": 0.5})
    assert path.read_text() == HEADER + "3,0.5\n"
    assert (tmp_path / "metrics.csv.damaged").read_text() == content


def test_messages_that_nobody_takes_do_no_harm():
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (os.fdopen(writer, "w"), open("/dev/full", "w")):  # noqa: SIM115 - a broken one cannot be closed
        outlet = Outlet(stream)
        for _ in range(3):
            print("a message", file=outlet, flush=True)
    outlet = Outlet(None)  # closed by the shell
    print("a message", file=outlet, flush=True)


def test_a_machine_without_git_trains_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine_tags(2)["git_commit"] == "unknown"


def test_a_gpu_is_part_of_the_machine():
    machine, with_gpu = (machine_tags(1, *gpu)["machine"] for gpu in ((), ("NVIDIA H100",)))
    assert with_gpu == f"{machine}, NVIDIA H100"


def commit(folder):
    folder.mkdir()
    (folder / "file").write_text(folder.name)
    me = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "file"], [*me, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    short = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return short.stdout.strip()


def test_commit_is_our_own_or_unknown(tmp_path, monkeypatch):
    ours, other = tmp_path / "our own", tmp_path / "other"
    expected, tags = commit(ours), machine_tags(1)
    assert expected != commit(other)
    installed = other / "site-packages"  # the code copied into another repository
    installed.mkdir()
    for _ in range(2):
        assert git_commit(ours) == expected
        assert git_commit(installed) == git_commit(tmp_path / "absent") == "unknown"
        assert machine_tags(1) == tags
        monkeypatch.chdir(other)  # now as in a hook of another repository
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
        monkeypatch.setenv("GIT_WORK_TREE", str(other))
        monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    (ours / "file").write_text("changed")
    assert git_commit(ours) == f"{expected}-dirty"
    assert ROOT.resolve() == tracking.ROOT


def settings(uri):
    return load_config(None, [f"tracking.uri={uri}"])


@pytest.mark.parametrize(("uri", "cause"), [
    ("sqlite:///{}/text.db", "file is not a database"),
    ("sqlite:///{}/folder.db", r".*/folder\.db is a folder"),
    ("sqlite:///{}/text.db/new.db", ".*(Not a directory|File exists)"),
    ("sqlite:///file:{}/absent.db?mode=ro&uri=true", "unable to open database file"),
    ("sqlite:///file:{}/good.db?mode=ro&uri=true", "attempt to write a readonly database"),
    ("sqlite:////proc/new.db", "unable to open database file"),
    ("postgresql+no_such_driver://127.0.0.1:9/x", ".*no_such_driver"),
    ("foo://bar", ".*foo"),
    ("http://me:secret@127.0.0.1:9", ".*refused"),
])
def test_store_that_cannot_be_used_is_one_line(uri, cause, tmp_path):
    """It names the cause, within seconds, and no password."""
    (tmp_path / "text.db").write_text(100 * "this is no database, ")
    (tmp_path / "folder.db").mkdir()
    sqlite3.connect(tmp_path / "good.db").execute("CREATE TABLE x (y)")
    start = time.monotonic()
    with pytest.raises(
            TrackingError, match=rf"cannot be used: {cause}.*tracking\.mlflow=false trains without it") as error:
        Tracker(settings(uri.format(tmp_path)), tmp_path, threads=1)
    assert time.monotonic() - start < 30  # a limit for what is tried again and again, not for what is slow
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert isinstance(error.value, UserError)


def test_store_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    hanging, waited = threading.Event(), []
    monkeypatch.setattr(tracking, "experiment_id", lambda client, name: waited.append(hanging.wait(60)))
    monkeypatch.setattr(tracking, "TIMEOUT", 0.5)
    with pytest.raises(TrackingError, match=r"MLflow store .*mlflow\.db cannot be used: no answer within 0\.5 s"):
        connect(settings(f"sqlite:///{tmp_path}/mlflow.db").tracking, tmp_path)
    assert waited == []  # it still waits; the error did not
    hanging.set()


def test_store_that_another_process_holds_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TIMEOUT", 3)
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TrackingError, match="cannot be used: database is locked;"):
        connect(settings(f"sqlite:///{tmp_path}/mlflow.db").tracking, tmp_path)
    holder.close()


def test_store_in_a_folder_still_to_be_made(tmp_path):
    with Tracker(settings(f"sqlite:///{tmp_path}/a/b/mlflow.db"), tmp_path, threads=1):
        pass
    assert (tmp_path / "a" / "b" / "mlflow.db").exists()


@pytest.mark.parametrize(("uri", "shown"), [
    ("http://127.0.0.1:5000/x", "http://127.0.0.1:5000/x"),
    ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ("https://me:se@cr/et word@host:5000", "https://***@host:5000"),
    ("https://token@host", "https://***@host"),
    ("postgresql://host/db?user=me&password=secret&x=y", "postgresql://host/db?user=me&password=***&x=y"),
])
def test_credentials_in_a_uri_are_masked(uri, shown):
    assert masked(uri) == shown


def test_no_password_reaches_the_store(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    opened = connect(settings(uri).tracking, tmp_path)
    monkeypatch.setattr(tracking, "connect", lambda *_: opened)
    with Tracker(settings("http://me:secret@host"), tmp_path, threads=1) as tracker:
        pass
    found = mlflow.MlflowClient(uri).get_run(tracker.run_id)
    assert found.data.params["tracking.uri"] == "http://***@host"
    assert "secret" not in str(found.to_dictionary())


def test_what_mlflow_lacks_is_sent_when_the_run_goes_on(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client, metrics = mlflow.MlflowClient(uri), Metrics(tmp_path / "metrics.csv")
    (tmp_path / "machine.json").write_text("{half a fi")  # no reason to stop

    def steps(run_id):
        return sorted(m.step for m in client.get_metric_history(run_id, "update/entropy"))

    run_id = None
    for frames, lacking in ((1, 1), (2, 1), (3, 0)):
        if lacking:  # a killed run, whose last rows were still to be sent
            metrics.append({"frames": frames, "update/entropy": frames / 2})
        with Tracker(settings(uri), tmp_path, 1, run_id) as tracker:
            assert run_id in (None, tracker.run_id)
            run_id = tracker.run_id
            assert f"MLflow lacked {lacking} updates" in capsys.readouterr().out or not lacking
            if not lacking:
                for again in (2, 3):  # the killed run sent 2, and its checkpoint was older
                    tracker.log({"update/entropy": again / 2, "update/absent": float("nan")}, again)
        assert steps(run_id) == list(range(1, frames + 1))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(Metrics(metrics.path).rows()) == 4
    assert "update/absent" not in client.get_run(run_id).data.metrics
