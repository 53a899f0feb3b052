"Each architecture in a process of its own, so that one that crashes, hangs or needs too much memory ends nothing else."

from __future__ import annotations

import multiprocessing
import sys
import warnings
from pathlib import Path

import torch

from . import fastai_family, huggingface_family, tables, timm_family, torch_family, torchvision_family
from .architecture import Architecture
from .verdict import Verdict, judge

FAMILIES = (torch_family, fastai_family, huggingface_family, torchvision_family, timm_family)  # short ones first


def architectures() -> dict[str, Architecture]:
    "All, by path."
    return {a.path: a for family in FAMILIES for a in family.architectures()}


def sources() -> dict[str, str]:
    "What the verdict on each architecture depends on, by path."
    hashes = {family: tables.sources(Path(family.__file__)) for family in FAMILIES}
    return {a.path: hashes[family] for family in FAMILIES for a in family.architectures()}


def judge_apart(path: str, timeout: float, memory: float) -> Verdict:
    "The verdict on the architecture at `path`, from another process that may take `timeout` seconds and `memory` GB."
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # fork: imports are done once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(path, memory, sender))
    process.start()
    sender.close()
    family, _, name = path.partition("/")
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        return Verdict(family, name, "crashed", faults=[f"no answer after {timeout:.0f} s"])
    except EOFError:
        process.join()
        return Verdict(family, name, "crashed", faults=[f"the process ended with {process.exitcode}"])
    finally:
        process.kill()
        process.join()


def _work(path, memory, sender):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    sender.send(judge(architectures()[path]))
