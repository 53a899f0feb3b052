"""How tests run: on the CPU, whatever the machine has, each process on one thread; with `--device cuda` on the GPU."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FOR_THE_GPU = ("core", "learner", "recording", "test_gpu.py", "test_recorder.py", "test_together.py")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the tests of the algorithm, the Learner and the recorder, and of what only a GPU shows, on the GPU",
    )


def pytest_configure(config):
    "Before PyTorch is imported, which reads these once; what tests start in processes of their own inherits them."
    on_gpu = config.getoption("device") == "cuda"
    os.environ["OMP_NUM_THREADS"] = "1"  # the models are small, and there is a process for each core
    if on_gpu:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it the same training gives other bits each time
        refuse_without_gpu()
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.getoption("dist", "no") == "no":  # a process that runs tests, not the one that deals them out
        config.pluginmanager.import_plugin("left_behind")
        tell_libraries(on_gpu)


def refuse_without_gpu():
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no NVIDIA GPU")


def tell_libraries(on_gpu):
    import torch
    from fastai.torch_core import default_device

    default_device(use=on_gpu)
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = False  # with it, convolutions are good to three digits; tests look at six
        torch.cuda.init()  # its random stream is looked at before anything lies there


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cuda":
        config.hook.pytest_deselected(items=[item for item in items if not for_the_gpu(item)])
        items[:] = filter(for_the_gpu, items)


def for_the_gpu(item):
    return room(item) in FOR_THE_GPU and not item.get_closest_marker("cpu")


def room(item):
    "The folder or file of `tests` that a test is in."
    return next(iter(item.path.relative_to(TESTS).parts), None) if item.path.is_relative_to(TESTS) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    "What a module of tests makes as it is imported."
    with on_the_device(collector):
        return (yield)


@pytest.fixture(autouse=True)
def models_on_the_device(request):
    with on_the_device(request.node):
        yield


def on_the_device(item):
    "The algorithm's tests make their models and batches there; a Learner brings its own."
    if item.config.getoption("device") == "cpu" or room(item) != "core":
        return nullcontext()
    from fastai.torch_core import default_device
    from placement import MadeOnTheCPU

    return MadeOnTheCPU(default_device())
