"""What only a GPU shows: its autocast, half-precision models, its memory formats, random streams, waits and nccl."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from audit import audit, moved, parameter_bits
from fastai.distributed import DistributedTrainer  # (here, since accelerate adds a warnings filter as it is imported)
from fastai.vision.all import Callback, MixedPrecision  # noqa: F401  (with it `to_fp16` and its like)
from learners import Spy, digits, learner, ran, small_cnn
from models import mlp, rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, lsuv_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and --device cuda")
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def dls():
    return digits(device=torch.device("cuda"), shuffle=False)


def near(records, eps):
    return all(abs(r.std - 1) <= 1e-3 + 4 * eps * max(1, abs(r.mean)) for r in records)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_measured_under_the_training_s_autocast(dls, dtype, norm, tmp_path):
    learn = learner(dls, small_cnn(norm), path=tmp_path, cbs=[LSUVCallback(), spy := Spy()])
    learn = learn.to_fp16() if dtype == torch.float16 else learn.to_bf16()
    x = next(iter(learn.dls.train))[0].as_subclass(torch.Tensor)
    learn.fit(1)
    assert ran(learn) and learn.lsuv_report.converged
    fresh = small_cnn(norm).cuda()
    with torch.autocast("cuda", dtype):
        lsuv_(fresh, x)
    assert parameter_bits(fresh) == spy.states[0]
    with torch.autocast("cuda", dtype):
        assert near(audit(fresh, x), EPS[dtype])


def test_model_to_half(dls, tmp_path):
    learn = learner(dls, path=tmp_path, cbs=LSUVCallback()).to_non_native_fp16()
    learn.fit(1)
    assert ran(learn) and learn.lsuv_report.converged
    assert all(abs(row.std_after - 1) <= 1e-3 + 4 * EPS[torch.float16] for row in learn.lsuv_report)


def test_channels_last_stays(dls, tmp_path):
    learn = learner(dls, path=tmp_path, cbs=LSUVCallback()).to_channelslast(use_amp=False)
    learn.fit(1)
    assert ran(learn)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in learn.model.parameters() if p.dim() == 4)


def test_the_random_stream_of_the_device():
    model = nn.Sequential(small_cnn(), nn.Dropout(0.5)).cuda().train()
    x = torch.randn(32, 1, 8, 8, device="cuda")  # drawn from the stream that is looked at
    before = torch.cuda.get_rng_state()
    lsuv_(model, x)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_the_cpu_and_the_gpu_agree():
    models, x = [small_cnn(), small_cnn().cuda()], torch.randn(64, 1, 8, 8)
    for model, inputs in zip(models, (x, x.cuda())):
        lsuv_(model, inputs)
    for a, b in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-4)


def waits(model, x, **options):
    "How often LSUV waits for the device."
    model, x = model.cuda(), x.cuda()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = lsuv_(model, x, **options)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(row.status == "corrected" for row in report)
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.parametrize("options", [{}, dict(per_channel=True)], ids=["pooled", "per channel"])
def test_the_number_of_waits_does_not_grow_with_depth(options):
    nets = [mlp(32, *[64] * depth, 10) for depth in (4, 40)]
    few, many = (waits(net, rows(256, 32), **options) for net in nets)
    assert 0 < few <= many <= few + 1, "one more where a deep network's values are in two precisions"


def test_lsuv_init_before_any_fit_moves_the_model(dls, tmp_path):
    learn = learner(dls, path=tmp_path)
    before = parameter_bits(learn.model)
    learn.lsuv_init()
    assert next(learn.model.parameters()).is_cuda
    assert len(moved(before, learn.model)) == len(before)


@pytest.fixture
def one_rank(monkeypatch):
    "A process group of one, over nccl."
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(True)


def test_messages_between_ranks_travel_by_nccl(dls, tmp_path, one_rank, monkeypatch):
    learn, alone = learner(dls, path=tmp_path, cbs=LSUVCallback()), learner(dls, path=tmp_path, cbs=LSUVCallback())
    trainer = DistributedTrainer(sync_bn=False)  # whose accelerate doesn't wrap the model of a process that is alone
    monkeypatch.setattr(trainer.accelerator, "prepare", lambda m: DistributedDataParallel(m.cuda(), device_ids=[0]))
    learn.add_cbs([trainer, spy := Spy()])
    alone.add_cb(spy_alone := Spy())
    learn.fit(1)
    alone.fit(1)
    assert ran(learn)
    assert list(spy.states[0].values()) == list(spy_alone.states[0].values())


class NoWait(Callback):
    "From the recorder's `before_batch` on, and in the backward, no operation may wait for the device."

    order = 99

    def before_batch(self):
        torch.cuda.set_sync_debug_mode("error")

    def after_pred(self):
        torch.cuda.set_sync_debug_mode("default")

    before_backward, after_backward = before_batch, after_pred


@pytest.mark.parametrize(
    "options", [{}, dict(with_hist=True), dict(with_hist=True, with_grad=True, valid=True)], ids=str
)
def test_no_hook_waits_for_the_device(dls, tmp_path, options):
    "Neither those of the forward nor of the backward, nor what is computed of their samples when the batch is over."
    model = nn.Sequential(
        nn.Conv2d(1, 512, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(512, 8, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    learn = learner(dls, model, path=tmp_path, metrics=[], cbs=[rec := ActivationStatsRecorder(**options), NoWait()])
    end = rec._end_batch

    def watched():
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            end()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    rec._end_batch = watched
    try:
        learn.fit(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    frame = rec.to_frame()
    assert len(frame[frame.phase == "train"].step.unique()) == len(dls.train) and frame["std"].notna().all()


class Functional(nn.Module):
    "What a layer does, by a module of no known type."

    def __init__(self, layer, function):
        super().__init__()
        self.weight, self.bias, self.function = layer.weight, layer.bias, function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (nn.Linear(64, 64), F.linear),
        (nn.Conv2d(64, 64, 3), F.conv2d),
        (nn.Conv3d(64, 64, 3), F.conv3d),
        (nn.ConvTranspose1d(64, 64, 3), F.conv_transpose1d),
    ],
)
def test_what_only_the_probe_finds_is_found_in_tf32(layer, function, monkeypatch):
    "In which PyTorch computes convolutions unless it is told otherwise, and products if it is told to."
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x = torch.randn(32, 64, *[8] * (layer.weight.dim() - 2))
    (row,) = lsuv_(Functional(layer, function).cuda(), x.cuda())
    assert row.status == "corrected", row
