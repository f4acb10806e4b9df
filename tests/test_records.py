"""Records of a run whatever happens to them: metrics.csv, MLflow's store, the streams that messages go to."""

import inspect
import os

import mlflow
import pytest

from config import load_config
from runs import no_room
from tracking import Metrics, Outlet, Tracker, TrackingError, machine_tags

HEADER = "frames,update/entropy\n"


def test_rows_that_a_full_disk_refused_are_written_later(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.append({"frames": 1, "update/entropy": 0.5})
    with no_room():
        for frames in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                metrics.append({"frames": frames, "update/entropy": 0.5})
        assert metrics.path.read_text() == HEADER + "1,0.5\n"
    metrics.flush()
    assert metrics.path.read_text() == HEADER + "1,0.5\n2,0.5\n3,0.5\n"
    assert metrics.waiting == []


def test_header_that_a_full_disk_refused(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    with no_room(5), pytest.raises(OSError, match="No space left"):  # five bytes fit, and are taken back
        metrics.append({"frames": 1, "update/entropy": 0.5})
    metrics.append({"frames": 2, "update/entropy": 0.5})
    assert metrics.path.read_text() == HEADER + "1,0.5\n2,0.5\n"


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


def settings(uri):
    return load_config(None, [f"tracking.uri={uri}"])


@pytest.mark.parametrize("uri", [
    "sqlite:///{}/text.db", "sqlite:///{}/folder.db", "sqlite:///file:{}/absent.db?mode=ro&uri=true", "foo://bar"])
def test_store_that_cannot_be_used_is_one_line(uri, tmp_path):
    (tmp_path / "text.db").write_text(100 * "this is no database, ")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(TrackingError, match=r"cannot be used: .*tracking\.mlflow=false trains without it") as error:
        Tracker(settings(uri.format(tmp_path)), tmp_path, threads=1)
    assert "\n" not in str(error.value)


def test_mlflow_still_lets_us_say_how_often_it_tries_a_database():
    from mlflow.store.db import utils

    assert "MAX_RETRY_COUNT" in inspect.getsource(utils.create_sqlalchemy_engine_with_retry)


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
                tracker.log({"update/entropy": frames / 2}, frames)
        assert steps(run_id) == list(range(1, frames + 1))
    assert client.get_run(run_id).info.status == "FINISHED"
