import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from machinery.checkpoint import (
    CheckpointError,
    build_policy,
    load_checkpoint,
    load_policy,
    policy_bytes,
    read_checkpoint,
    save_checkpoint,
    save_config,
)
from machinery.config import Config, ConfigError
from machinery.files import newest_run
from runs import no_room


def test_checkpoint_reads_back(tmp_path):
    state = {"tensor": torch.arange(5.0), "list": [1, 2.5, "x", None], "rng": torch.get_rng_state(), "big": 2**100}
    save_checkpoint(tmp_path / "a.ckpt", state)
    loaded = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["tensor"], state["tensor"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert (loaded["list"], loaded["big"]) == (state["list"], 2**100)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_bytes(b"hello"), "not a checkpoint"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    (damage_bit, "damaged"),
])
def test_damaged_checkpoint_is_refused_and_the_one_before_it_used(damage, message, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_checkpoint(folder / "000000000001.ckpt", {"frames": 1, "weights": torch.randn(1000)})
    save_checkpoint(folder / "000000000002.ckpt", {"frames": 2, "weights": torch.randn(1000)})
    damage(folder / "000000000002.ckpt")
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(folder / "000000000002.ckpt")
    assert "000000000002.ckpt" in str(error.value)
    told = []
    assert load_checkpoint(tmp_path, told.append)["frames"] == 1
    assert len(told) == 1
    assert "000000000002.ckpt" in told[0]
    damage_bit(folder / "000000000001.ckpt")
    with pytest.raises(CheckpointError, match="none of its 2"):
        load_checkpoint(tmp_path, told.append)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [False, True])
def test_malicious_pickle_does_not_run(wrap, tmp_path):
    planted, file = tmp_path / "planted", tmp_path / "evil.ckpt"
    if wrap:  # with the right magic and hash
        save_checkpoint(file, {"state": Bomb(planted)})
    else:
        file.write_bytes(pickle.dumps(Bomb(planted)))
    with pytest.raises(CheckpointError):
        read_checkpoint(file)
    assert not planted.exists()


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A real limit on the size of files stops the write halfway."""
    save_checkpoint(tmp_path / "a.ckpt", {"frames": 1})
    code = (
        "import resource, signal, sys, torch; from machinery.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save_checkpoint(sys.argv[1], {'frames': 2, 'weights': torch.randn(100_000)})\n"
        "except OSError as error: print('refused', error.errno)\n")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.ckpt")], capture_output=True, text=True,
                         cwd=os.path.dirname(os.path.dirname(__file__)), check=True)
    assert "refused" in out.stdout
    assert read_checkpoint(tmp_path / "a.ckpt") == {"frames": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_killed_while_saving_leaves_a_good_checkpoint(tmp_path):
    code = (
        "import itertools, sys, torch; from machinery.checkpoint import save_checkpoint\n"
        "for i in itertools.count(): save_checkpoint(sys.argv[1] + f'/checkpoints/{i:012d}.ckpt', "
        "{'i': i, 'weights': torch.full((300_000,), float(i))}); print(i, flush=True)\n")
    (tmp_path / "checkpoints").mkdir()
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               cwd=os.path.dirname(os.path.dirname(__file__)))
    for _ in range(5):
        last = int(process.stdout.readline())
    time.sleep(0.0137)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = load_checkpoint(tmp_path, pytest.fail)
    assert state["i"] >= last
    assert torch.equal(state["weights"], torch.full((300_000,), float(state["i"])))


def test_policy_file_reads_back_and_notices_damage(tmp_path):
    config = Config()
    policy = build_policy(config)
    policy.eye.direction.copy_(torch.tensor([0.1, 0.2, 0.3]))
    file = tmp_path / "policy.safetensors"
    file.write_bytes(policy_bytes(policy, config, 123))
    loaded, loaded_config, path = load_policy(tmp_path)
    assert (loaded_config, path) == (config, file)
    for key, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    good = file.read_bytes()
    damage_bit(file)
    with pytest.raises(CheckpointError, match="damaged"):
        load_policy(file)
    for old, new in ((rb'frame_skip\": 4', rb'frame_skip\": 5'), (b'"env_frames":"123"', b'"env_frames":"122"')):
        assert old in good
        file.write_bytes(good.replace(old, new))
        with pytest.raises(CheckpointError, match="damaged"):
            load_policy(file)
    file.write_bytes(good[:50])
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        load_policy(file)
    file.write_bytes(good)
    with safe_open(file, "pt") as whole:
        metadata = whole.metadata()
    file.write_bytes(save({key: tensor.bfloat16() for key, tensor in load(good).items()}, metadata))  # NumPy has none
    with pytest.raises(CheckpointError, match="damaged"):
        load_policy(file)


def test_missing_policy_names_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="train one first"):
        load_policy("runs/nothing")
    for name, file in (("there", "policy.safetensors"), ("begun", "1.ckpt")):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoints" / file).touch()
    with pytest.raises(CheckpointError, match=r"runs/nothing.*there are runs/there$"):
        load_policy("runs/nothing")
    with pytest.raises(CheckpointError, match=r"runs/nothing.*there are runs/begun$"):
        load_checkpoint("runs/nothing")


def test_policy_of_a_checkpoint(tmp_path):
    config, file = Config(), tmp_path / "1.ckpt"
    policy = build_policy(config)
    state = {"config": config.model_dump(mode="json"), "policy": policy.state_dict()}
    save_checkpoint(file, state)
    loaded, loaded_config, _ = load_policy(file)
    assert loaded_config == config
    for key, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)

    del state["policy"]["actor.weight"]
    save_checkpoint(file, state)
    with pytest.raises(CheckpointError, match=r"1\.ckpt: its weights do not fit.*actor\.weight") as error:
        load_policy(file)
    assert "\n" not in str(error.value)
    state["config"]["ppo"]["gama"] = 1
    save_checkpoint(file, state)
    with pytest.raises(ConfigError, match=r"1\.ckpt: unknown key ppo\.gama; did you mean ppo\.gamma"):
        load_policy(file)


def test_file_that_a_full_disk_does_not_take_is_named(tmp_path):
    save_config(Config(), tmp_path / "config.yaml")
    before = (tmp_path / "config.yaml").read_bytes()
    with no_room(), pytest.raises(OSError, match=r"File too large: .*config\.yaml"):
        save_config(Config(), tmp_path / "config.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_newest_run(tmp_path):
    assert newest_run(tmp_path) is None
    for age, name in ((100, "b"), (0, "a"), (200, "c")):
        file = tmp_path / name / "checkpoints" / "1.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    assert newest_run(tmp_path) == tmp_path / "a"
