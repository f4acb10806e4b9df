"""Many processes that learn as one: which of them this is, and what they exchange.

    torchrun --standalone --nproc_per_node=2 train.py --config configs/cnn.yaml

Every process has its own landers, minibatches and random numbers; DistributedDataParallel averages their gradients, so
all hold the same weights. The numbers that steer a schedule are gathered here, so all take the same decisions. A single
process has size 1, and every method hands back what it was given. Names are those of torch.distributed.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=30)  # for a process that is busy, as the first is while it scores; a dead one is noticed


@dataclass(frozen=True)
class Processes:
    rank: int = 0  # this process's number among all; the first writes and reports
    size: int = 1
    local_rank: int = 0  # its number on this machine, and that of its GPU
    local_size: int = 1

    @classmethod
    def launched(cls):
        """As torchrun's environment says; without torchrun, a single process."""
        if not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    def join(self):
        """Meet the others: gloo carries what lies in memory, NCCL what lies on GPUs."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)

    def leave(self):
        if dist.is_initialized():
            dist.destroy_process_group()

    def seed(self, seed):
        """A seed of this process's own; the first keeps the one given."""
        return seed if self.rank == 0 else int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])

    def all_gather_object(self, thing):
        """The `thing` of each process, in the order of their ranks."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def broadcast(self, thing):
        """The `thing` of the first process, for all."""
        box = [thing]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, number):
        return sum(self.all_gather_object(number)) / self.size

    def all_gather(self, tensor):
        """The tensors of all processes, of equal shape (B, ...), as one: (size * B, ...)."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def parallel(self, policy, minibatch):
        """`policy` as the update calls it: made equal to the first process's; from now on backward averages gradients.

        minibatch: any, to learn the shapes from.
        """
        if self.size == 1:
            return policy
        learner = DistributedDataParallel(policy).train()
        # After its first pass DDP lays gradients out anew, and with the layout a sum of three or more changes in its
        # last bits. That must not fall into the first update after a resume.
        output = learner(minibatch.frame_store, minibatch.frame_ids, minibatch)
        sum([output.distribution.entropy().sum(), output.value.sum(), *output.losses.values()]).backward()
        learner.zero_grad()
        return learner

    def lost(self, error):
        """Whether `error` says that another process is gone. gloo's errors have no class of their own."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


SINGLE_PROCESS = Processes()


def launcher(processes, machines=1):
    """How a user starts a script as so many processes."""
    if machines > 1:
        return "the same torchrun on every machine, with"
    return "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
