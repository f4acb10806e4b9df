"""Where the network computes, and how: CPU or GPU, threads, bfloat16, memory."""

import ctypes
import os
from pathlib import Path

import torch

from machinery.errors import UserError


def choose_device(name, processes):
    """The torch.device of run.device=`name`; of many processes each takes the GPU of its own number."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
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


def cores_for(processes):
    """How many cores each of this machine's processes has to itself."""
    return max(len(os.sched_getaffinity(0)) // processes.local_size, 1)


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
