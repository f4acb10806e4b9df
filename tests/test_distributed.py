"""Many processes: real ones, started by torchrun, over gloo."""

import os
import re
import subprocess
import sys

import psutil
import pytest
import torch

from machinery.checkpoint import load_checkpoint
from runs import CONFIG, HANGS, HELD, ROOT, TINY, go, only_run, output_of, refused, rows, wait_until_held, without_speed

SETTINGS = ["--config", CONFIG, *TINY, "env.num_workers=1", "evaluation.episodes=0", "ppo.num_steps=16"]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, args)],
        cwd=folder, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True)


def ended(process, expected=0):
    output = output_of(process)
    assert process.returncode == expected, output
    return output


def trainers(process):
    """The processes that train, by rank."""
    children = psutil.Process(process.pid).children()
    return sorted((child for child in children if "RANK" in child.environ()), key=lambda c: int(c.environ()["RANK"]))


def test_first_update_of_two_processes_is_that_of_one_with_twice_the_landers(tmp_path):
    script = ROOT / "tests" / "first_update.py"
    both = torchrun(tmp_path, script, tmp_path / "update")
    subprocess.run([sys.executable, script, tmp_path / "update"], check=True, timeout=HANGS)
    ended(both)
    first, second, alone = (torch.load(tmp_path / f"update-{name}") for name in ("2-0", "2-1", "1-0"))
    for key, tensor in alone["policy"].items():
        assert torch.equal(first["policy"][key], second["policy"][key]), key
        # 16 steps of Adam at a learning rate of 1e-3 apart by no more than float32's rounding.
        torch.testing.assert_close(first["policy"][key], tensor, atol=2e-6, rtol=0)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A short run of two processes that nothing disturbed; each leaves its last weights beside it."""
    folder = tmp_path_factory.mktemp("many")
    ended(torchrun(folder, HELD, "", *SETTINGS, "run.name=whole"))
    return folder


def test_two_processes_make_one_run(whole_run):
    here = whole_run / "runs" / "whole"
    client, found = only_run(whole_run)
    assert found.info.status == "FINISHED"
    table = rows(here)
    history = client.get_metric_history(found.info.run_id, "update/entropy")
    assert [metric.step for metric in history] == [int(row["frames"]) for row in table]
    state = load_checkpoint(here)
    assert state["counters"]["env_frames"] == int(table[-1]["frames"]) >= 3000
    # 2 processes x 4 landers x 16 decisions of at most 4 frames; one process alone would make at most half of that.
    assert 256 < int(table[0]["frames"]) <= 512
    own, (peer,) = state["landers"], [part["landers"] for part in state["peers"]]
    assert len(own) == len(peer) == 4
    assert own != peer
    assert not torch.equal(state["torch_rng"], state["peers"][0]["torch_rng"])
    weights = [torch.load(whole_run / f"weights-{rank}") for rank in range(2)]
    for key, tensor in state["policy"].items():
        assert torch.equal(weights[0][key], tensor), key
        assert torch.equal(weights[1][key], tensor), key


def test_stopped_and_killed_it_goes_on_bit_for_bit(whole_run, tmp_path):
    here = tmp_path / "runs" / "hurt"
    process = torchrun(tmp_path, HELD, 2, *SETTINGS, "run.name=hurt", "tracking.mlflow=false")
    wait_until_held(process, tmp_path, 2, processes=2)
    trainers(process)[1].terminate()  # a signal to one is a signal to all
    go(tmp_path, 2)
    output = ended(process, expected=1)
    assert "SIGTERM: saved; go on with: torchrun --standalone --nproc_per_node=2 train.py --resume runs/hurt" in output
    saved = load_checkpoint(here)["counters"]["env_frames"]
    assert saved == int(rows(here)[-1]["frames"])

    process = torchrun(tmp_path, HELD, 4, "--resume", "latest")
    wait_until_held(process, tmp_path, 4, processes=2)
    children = psutil.Process(process.pid).children(recursive=True)
    trainers(process)[1].kill()
    go(tmp_path, 4)
    output = ended(process, expected=1)
    assert re.search("another process of this training ended|SIGTERM: saved", output), output
    assert psutil.wait_procs(children, timeout=HANGS)[1] == []
    assert load_checkpoint(here)["counters"]["env_frames"] == int(rows(here)[-1]["frames"]) > saved

    line = refused(tmp_path, "--resume", "latest")
    assert "of 2 process(es), but 1 were started; go on with: torchrun" in line

    ended(torchrun(tmp_path, ROOT / "train.py", "--resume", "latest"))
    assert without_speed(rows(here)) == without_speed(rows(whole_run / "runs" / "whole"))
    resumed, whole = load_checkpoint(here), load_checkpoint(whole_run / "runs" / "whole")
    assert resumed["landers"] == whole["landers"]
    assert resumed["peers"][0]["landers"] == whole["peers"][0]["landers"]
    for key, tensor in whole["policy"].items():
        assert torch.equal(resumed["policy"][key], tensor), key


def test_a_mistake_is_one_line_and_no_process_waits(tmp_path):
    process = torchrun(tmp_path, ROOT / "train.py", "--config", CONFIG, "ppo.gama=1")
    output = ended(process, expected=1)
    assert [line for line in output.splitlines() if "train.py:" in line and "ppo.gamma" in line]
    assert "process 1:" not in output
