import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("DISPLAY", None)  # everything here must work without a screen
for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
    os.environ.pop(variable, None)  # a developer's own store
for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup; what tests start would ignore it too
        signal.signal(number, action)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small batches: threads would only wait for each other


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory):
    """A run's folder with nothing but a policy in it, which acts at random, but not alike."""
    from machinery.checkpoint import build_policy, policy_bytes
    from machinery.config import Config

    torch.manual_seed(3)
    config, folder = Config(), tmp_path_factory.mktemp("run") / "checkpoints"
    policy = build_policy(config)
    policy.eye.direction.copy_(torch.tensor([0.33, -0.81, 0.48]))
    torch.nn.init.normal_(policy.actor.weight)  # so that actions differ
    folder.mkdir()
    (folder / "policy.safetensors").write_bytes(policy_bytes(policy, config, 0))
    return folder.parent
