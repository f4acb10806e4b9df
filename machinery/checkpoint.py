"""Checkpoint files: written whole or not at all, verified before they are read, never executed.

    save_checkpoint("runs/NAME/checkpoints/000000409600.ckpt", state)
    state = load_checkpoint("runs/NAME")        # a file, or a folder: its newest good one

A checkpoint is a line of magic, the SHA-256 of the rest, and `torch.save` of a dict of tensors and plain values. The
hash matters: torch loads a tensor with a flipped bit without a word. `weights_only` matters: a pickle is a program.
A policy alone is shared as `policy.safetensors`, with its config in the file's metadata.
"""

import hashlib
import io
import json
import pickle
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from frames import frame_planes
from machinery.config import check_config
from machinery.errors import UserError
from machinery.files import write_atomically
from models import Spaces, make_policy

MAGIC = b"lunar-pixels checkpoint 1\n"
POLICY_FILE = "policy.safetensors"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit."""


def save_config(config, path):
    """Write every key of the resolved config as YAML, but no credentials."""
    write_atomically(path, yaml.safe_dump(config.saved(), sort_keys=False).encode())


def save_checkpoint(path, state):
    """`state`: a dict of tensors, numbers, strings, None, and lists and dicts of those."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomically(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def read_checkpoint(path):
    """The state in one checkpoint file; CheckpointError says what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not data.startswith(MAGIC):
        raise CheckpointError(f"{path}: not a checkpoint of this program" if data else f"{path}: empty file")
    digest, payload = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path}: damaged (its SHA-256 does not match); use an older checkpoint")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path, warn=print):
    """The state in a checkpoint file, or in the newest good one of a run's folder; damaged ones are told to `warn`."""
    path = Path(path)
    if path.is_file():
        return read_checkpoint(path)
    folder = path / "checkpoints"
    files = sorted(folder.glob("*.ckpt"), reverse=True)
    for file in files:
        try:
            return read_checkpoint(file)
        except CheckpointError as error:
            warn(f"skipped {error}")
    if files:
        raise CheckpointError(f"{folder}: none of its {len(files)} checkpoints is good")
    raise CheckpointError(f"{path}: no checkpoint there{_alternatives(path, 'checkpoints/*.ckpt')}")


def policy_bytes(policy, config, env_frames):
    """Weights for sharing: safetensors, with config and the frames it was trained for in the metadata."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in policy.state_dict().items()}
    metadata = {"config": json.dumps(config.saved()), "env_frames": str(env_frames)}
    metadata["sha256"] = _digest(tensors, metadata)  # safetensors itself does not notice a flipped bit
    return safetensors_bytes(tensors, metadata)


def load_policy(path):
    """The policy in a safetensors file, a checkpoint, or a folder (a run's best, or results/NAME).

    Returns (policy, config, file).
    """
    path = Path(path)
    choices = [path] if path.is_file() else [path / "checkpoints" / POLICY_FILE, path / POLICY_FILE]
    file = next((choice for choice in choices if choice.is_file()), None)
    if file is None:
        raise CheckpointError(f"{path}: no {POLICY_FILE} there{_alternatives(path, f'**/{POLICY_FILE}')}")
    if file.suffix == ".ckpt":
        state = read_checkpoint(file)
        if not (isinstance(state, dict) and {"config", "policy"} <= state.keys()):
            raise CheckpointError(f"{file}: holds no policy")
        settings, weights = state["config"], state["policy"]
    else:
        settings, weights = _read_policy(file)
    config = check_config(settings, str(file))
    policy = build_policy(config)
    load_weights(policy, weights, file)
    return policy.eval(), config, file


def _read_policy(file):
    """(config as nested dicts, weights) in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            names = tensors.keys()  # it can be asked for its keys, not iterated over
            weights = {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None
    if "config" not in metadata:
        raise CheckpointError(f"{file}: has no config in its metadata, so it is not a policy of this program")
    if metadata.pop("sha256", None) != _digest(weights, metadata):
        raise CheckpointError(f"{file}: damaged (its SHA-256 does not match)")
    try:
        return json.loads(metadata["config"]), weights
    except ValueError as error:
        raise CheckpointError(f"{file}: the config in its metadata is not JSON ({error})") from None


def trained_frames(file):
    """For how many frames the policy in a safetensors file was trained; 0 if it cannot be told."""
    with suppress(SafetensorError, OSError, KeyError, ValueError), safe_open(file, framework="pt") as tensors:
        return int((tensors.metadata() or {})["env_frames"])
    return 0


def load_weights(policy, weights, file):
    """Put `weights`, which `file` held, into `policy`; CheckpointError if they are those of another one."""
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: its weights do not fit the policy of this program: {reason}") from None


def build_policy(config):
    """The untrained policy that `config` describes, for the frames and actions that it describes."""
    env, task = config.env, config.env.task
    height, width = (side // env.shrink_factor for side in task.viewport)
    spaces = Spaces(
        env.frame_stack, frame_planes(env.color), height, width, len(task.actions), task.mirrored_actions,
        task.continuous)
    return make_policy(config.model, spaces)


def _digest(tensors, metadata):
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        content = tensor.flatten().view(torch.uint8)  # NumPy has no bfloat16
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode() + content.numpy().tobytes())
    return digest.hexdigest()


def _alternatives(path, holding):
    there = sorted(
        str(run) for root in ("runs", "results") for run in Path(root).glob("*/")
        if run != path and any(run.glob(holding)))
    if not there:
        return "; train one first: python train.py --config configs/cnn.yaml"
    return f"; there are {', '.join(there)}"
