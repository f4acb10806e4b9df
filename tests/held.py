"""train.py, held before some updates, so that what a test does to it comes in time however fast the machine is.

    python held.py 3,6 --config ...

holds before what would be the fourth and the seventh update of the run, says so by a file held-3-RANK, or held-6-RANK,
in the working folder, and waits for a file go-3, or go-6. Of many processes each leaves its last weights there, as
weights-RANK.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train


class Trainer(train.Trainer):
    def iterate(self):
        updates = self.counters["updates"]
        if updates in held:
            Path(f"held-{updates}-{self.processes.rank}").touch()
            for _ in range(50 * 900):  # a test that failed meanwhile leaves no process behind
                if Path(f"go-{updates}").exists():
                    break
                time.sleep(0.02)
            else:
                raise TimeoutError(f"no go-{updates}")
        return super().iterate()

    def close(self):
        if self.processes.size > 1:
            torch.save(self.policy.state_dict(), f"weights-{self.processes.rank}")
        super().close()


if __name__ == "__main__":
    held = set(map(int, filter(None, sys.argv[1].split(","))))
    train.Trainer = Trainer
    train.main(sys.argv[2:])
