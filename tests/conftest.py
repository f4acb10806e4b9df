import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("DISPLAY", None)  # everything here must work without a screen
for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup; what tests start would ignore it too
        signal.signal(number, action)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small batches: threads would only wait for each other
