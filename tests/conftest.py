import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("DISPLAY", None)  # everything here must work without a screen


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small batches: threads would only wait for each other
