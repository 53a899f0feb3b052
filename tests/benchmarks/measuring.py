"""Seconds and bytes, on a CPU or a GPU, and what they were measured on."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def settle():
    "Wait for the GPU, if this process uses one."
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(f, *args):
    settle()
    started = time.perf_counter()
    f(*args)
    settle()
    return time.perf_counter() - started


def peak_bytes(device, f, *args):
    "The most that PyTorch held at a time, beyond what was there, by its allocator's own account."
    return (_peak_on_gpu if device == "cuda" else _peak_on_cpu)(f, *args)


def _peak_on_gpu(f, *args):
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f(*args)
    settle()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(f, *args):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        f(*args)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        peak = max(peak, held)
    return peak


def machine(device):
    "In words."
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"one thread of an {cpu()}"
    return f"{hardware}, PyTorch {version()}, its defaults"


def version():
    return torch.__version__.partition("+")[0]


def cpu():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
