"""Where the network computes, and how: CPU or GPU, threads, bfloat16, memory."""

import ctypes
import math
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from machinery.errors import UserError
from machinery.workers import unpinned_cores


def open_device(settings, processes):
    """(torch.device, ThreadGauge, autocast) of a config's `run` section, for this one of many processes."""
    keep_freed_memory()
    device = choose_device(settings.device, processes)
    gauge = ThreadGauge(settings.num_threads, cores_for(processes), device)
    return device, gauge, make_autocast(device, settings.bf16)


def choose_device(name, processes):
    """The torch.device of run.device=`name`; of many processes each takes the GPU of its own number."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if name == "auto" else name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"run.device={name}: torch has no Metal here, which is the GPU of a Mac with Apple silicon; "
                        "run.device=auto takes what there is")
    if device.type == "mps" and processes.size > 1:
        raise UserError("run.device=mps: it is one GPU, and many processes need one each; run.device=cpu")
    if device.type == "cuda" and processes.size > 1:
        if device.index is not None:
            raise UserError(f"run.device={name}: many processes need a GPU each; run.device=cuda gives it")
        device = torch.device("cuda", processes.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device={name}: this machine has {torch.cuda.device_count()} GPUs that torch can use; "
                        "run.device=auto takes what there is")
    if device.type == "cuda" and processes.size > 1:
        torch.cuda.set_device(device)
    return device


def cores_for(processes, cgroups="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """How many cores each of this machine's processes has to itself, by its affinity and its control groups."""
    cores = len(unpinned_cores())
    pins = [name for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY") if name in os.environ]
    if pins and cores < processes.local_size and processes.rank == 0:
        print(f"torchrun has {cores} core(s) for {processes.local_size} processes: {pins[0]} pins it; unset {pins[0]}")
    return max(math.ceil(min(cores, cpu_quota(cgroups, membership))) // processes.local_size, 1)


def rng_state(device):
    """States of the random numbers that `device` draws itself, uint8 tensors: one of a GPU, none of the CPU."""
    if device.type == "mps":
        return [torch.mps.get_rng_state()]
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []


def set_rng_state(device, states):
    """Put back what rng_state gave; states of another kind of device are left alone."""
    for own, state in zip(rng_state(device), states, strict=False):
        if own.shape != state.shape:
            continue
        if device.type == "mps":
            torch.mps.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


class ThreadGauge:
    """Tells when the threads of an update should be one, because other work has the cores.

    Threads of one small computation wait for each other thousands of times in an update. Beside other busy processes
    each wait may cost a turn at the scheduler, so that all of them together get less than what one alone would.
    """

    LEAST = 1.2  # cores' worth of time; on two quiet cores two threads get 1.6, and one alone gets up to 1
    LONG = 3  # updates in a row

    def __init__(self, chosen, cores, device):
        """chosen: run.num_threads; 0: one per core, until other work takes the cores. On a GPU they matter little."""
        self.num_threads, self.starved = chosen or cores, 0
        self.fixed = chosen > 0 or device.type != "cpu"

    def restore(self, snapshot):
        """Go on with as many threads as a run had at a Trainer.snapshot."""
        if not self.fixed:
            self.num_threads = min(self.num_threads, snapshot.get("num_threads", self.num_threads))

    @contextmanager
    def measured(self):
        """The block is an update. Afterwards num_threads is what the next one should use: as before, or 1 for good."""
        torch.set_num_threads(self.num_threads)
        wall, cpu = time.perf_counter(), time.process_time()  # the latter of all threads of this process
        yield
        if self.num_threads > 1 and not self.fixed:
            got = (time.process_time() - cpu) / (time.perf_counter() - wall)
            self.starved = self.starved + 1 if got < self.LEAST else 0
            if self.starved == self.LONG:
                self.num_threads = 1


def cpu_quota(cgroups, membership):
    """How many CPUs' time this process's control groups allow it, such as 0.5; infinity if they set no limit.

    A container may show its own group as the root of `cgroups` and still name it by the path that it has outside.
    """
    quotas = [math.inf]
    with suppress(OSError, ValueError):
        for line in Path(membership).read_text().splitlines():
            _, controllers, group = line.split(":", 2)  # version 2: "0::/a/b"; version 1: "4:cpu,cpuacct:/a/b"
            if controllers and "cpu" not in controllers.split(","):
                continue
            parts = [part for part in group.split("/") if part]
            for root in {Path(cgroups, controllers), Path(cgroups, "cpu")} if controllers else {Path(cgroups)}:
                quotas += [_own_quota(root.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
    return min(quotas)


def _own_quota(folder):
    """The limit of one control group, without those around it."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
        # No such file; "max" or -1, which is no limit.
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota > 0:
                return quota / period
    return math.inf


def make_autocast(device, bf16):
    """The context in which a policy is called. bf16 is run.bf16; None: where the hardware computes it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device) if bf16 is None else bf16)


def fast_bf16(device):
    """Whether bfloat16 is computed in hardware; a CPU without such instructions emulates it many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, ARM


def keep_freed_memory():
    """Tell glibc to keep what is freed, in pieces of up to 32 MiB, the most it allows, for what is allocated next.

    By itself it may give the tensors of a minibatch back to the kernel, which clears every page of the next one's.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 2**25)
        mallopt(m_trim_threshold, 2**31 - 1)
