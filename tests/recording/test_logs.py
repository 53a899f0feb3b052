"""Where the numbers go besides: a CSV that loses at most an epoch, TensorBoard's event files, W&B's run file."""

import io
import json
import struct

import pandas as pd
import pytest
from fastai.vision.all import Callback, CancelFitException, default_device
from fastcore.basics import init_args
from feeds import loaders
from learners import learner, small_cnn
from models import Stumble
from torch import nn
from witness import COLUMNS, records

from fastai_lsuv import ActivationStatsRecorder


def make(*cbs, model=None, tmp_path=".", **kwargs):
    return learner(loaders(), model or small_cnn(), path=tmp_path, cbs=[*cbs], **kwargs)


def assert_same(frame, logged, rel=1e-5):
    assert [*frame.columns] == [*logged.columns] and len(frame) == len(logged)
    for c in frame.columns:
        if frame[c].dtype.kind == "f":
            assert frame[c].to_numpy() == pytest.approx(logged[c].to_numpy(), rel=rel, abs=1e-12, nan_ok=True)
        else:
            assert [*frame[c]] == [*logged[c]]


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(valid=True), dict(with_grad=True, valid=True), dict(every=2)], ids=str)
def test_the_log_is_the_frame(tmp_path, options):
    learn = make(rec := ActivationStatsRecorder(fname=tmp_path / "log.csv", **options), tmp_path=tmp_path)
    for n in (2, 1):
        learn.fit(n)
    logged = pd.read_csv(tmp_path / "log.csv", dtype={"layer": str})
    assert [*logged.columns] == COLUMNS + (["grad_mean", "grad_std"] if "with_grad" in options else [])
    assert_same(rec.to_frame(), logged)


def test_a_name_is_beside_the_learner_s_files(tmp_path, monkeypatch):
    "As fastai's `CSVLogger` has it: under `learn.path`."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    make(ActivationStatsRecorder(fname="log.csv"), tmp_path=tmp_path / "run").fit(1)
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("log.csv")]


def test_the_log_is_never_thinned(tmp_path):
    learn = make(rec := ActivationStatsRecorder(fname=tmp_path / "log.csv", max_records=2), tmp_path=tmp_path)
    learn.fit(4)
    assert len(records(rec)) <= 2
    assert len(pd.read_csv(tmp_path / "log.csv")) == 4 * 3 * 7


class ReadsTheLog(Callback):
    def __init__(self, path):
        self.path, self.seen = path, []

    def before_epoch(self):
        self.seen.append(len(pd.read_csv(self.path)))

    after_fit = before_epoch


@pytest.mark.parametrize("valid", [False, True])
def test_every_epoch_is_on_disk_when_it_ends(tmp_path, valid):
    make(
        ActivationStatsRecorder(fname=tmp_path / "log.csv", valid=valid),
        reads := ReadsTheLog(tmp_path / "log.csv"),
        tmp_path=tmp_path,
    ).fit(3)
    assert reads.seen == [7 * (3 + 3 * valid) * n for n in range(4)]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_crash_loses_an_epoch_at_most(tmp_path, error):
    "The finished ones were there before; and the next fit goes on in the same file, with numbers that go on."
    model = nn.Sequential(*small_cnn(), stumble := Stumble(error, 17))
    learn = make(_rec := ActivationStatsRecorder(fname=tmp_path / "log.csv"), model=model, tmp_path=tmp_path)
    with pytest.raises(type(error)):
        learn.fit(9)
    crashed = pd.read_csv(tmp_path / "log.csv")
    assert {0, 1} <= set(crashed.epoch) and len(crashed) >= 2 * 3 * 7
    stumble.at = 0
    learn.fit(1)
    logged = pd.read_csv(tmp_path / "log.csv", dtype={"layer": str})
    assert not logged.duplicated(["step", "layer", "phase"]).any() and logged.step.is_monotonic_increasing
    assert len(logged[logged.fit == logged.fit.max()]) == 3 * 8, "the one that stumbled is a layer, too"


class Ends(Callback):
    "Ends the fit in its second epoch, ahead of the recorder, as `EarlyStoppingCallback` does."

    def __init__(self, event):
        self.event = event

    def after_batch(self):
        self.end("after_batch")

    def after_epoch(self):
        self.end("after_epoch")

    def end(self, event):
        if (event, self.training, self.epoch, self.iter) == (
            self.event,
            event == "after_batch",
            1,
            1 if event == "after_batch" else 2,
        ):
            raise CancelFitException


@pytest.mark.parametrize(("event", "batches"), [("after_batch", 5), ("after_epoch", 6)])
def test_a_fit_that_is_ended_is_logged_before_loggers_close(tmp_path, event, batches):
    "The last batch, too; and TensorBoard's writer isn't opened anew for it."
    from fastai.callback.tensorboard import TensorBoardCallback

    tb = TensorBoardCallback(tmp_path / "tb", trace_model=False, log_preds=False)
    reads = ReadsTheLog(tmp_path / "log.csv")
    make(rec := ActivationStatsRecorder(fname=tmp_path / "log.csv"), reads, tb, Ends(event), tmp_path=tmp_path).fit(3)
    assert len(records(rec)) == batches and reads.seen == [0, 3 * 7, batches * 7]
    assert [step for step, _ in events(tmp_path / "tb")["activations/1.3/std"]] == [*range(1, batches + 1)]
    assert len([*(tmp_path / "tb").iterdir()]) == 1


@pytest.mark.parametrize("how", ["the same", "a new one", "a new Learner"])
def test_an_existing_file_is_continued(tmp_path, how):
    learn = make(rec := ActivationStatsRecorder(fname=tmp_path / "log.csv"), tmp_path=tmp_path)
    learn.fit(1)
    old = (tmp_path / "log.csv").read_text()
    if how == "a new Learner":
        learn = make(tmp_path=tmp_path)
    elif how == "a new one":
        learn.remove_cb(rec)
    if how != "the same":
        learn.add_cb(ActivationStatsRecorder(fname=tmp_path / "log.csv"))
    learn.fit(2)
    new = (tmp_path / "log.csv").read_text()
    assert new.startswith(old) and new.count("near_zero") == 1
    logged = pd.read_csv(io.StringIO(new))
    assert [*logged.step.unique()] == [*range(9)] and [*logged.fit.unique()] == [0, 1]
    assert {*logged[logged.fit == 1].step} == {*range(3, 9)}


@pytest.mark.parametrize("text", ["a,b,c\n1,2,3\n", ",".join([*COLUMNS, "grad_mean", "grad_std"]) + "\n", "hello"])
def test_a_file_of_other_columns_is_left_alone(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    learn = make(ActivationStatsRecorder(fname=tmp_path / "log.csv"), tmp_path=tmp_path)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=r"log\.csv"):
        learn.fit(1)
    assert (tmp_path / "log.csv").read_text() == text
    assert all((p == q).all() for p, q in zip(before, learn.model.parameters())), "before training"


@pytest.mark.parametrize("text", ["", ",".join(COLUMNS) + "\n"], ids=["empty", "a header only"])
def test_a_file_without_rows_is_begun(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    make(rec := ActivationStatsRecorder(fname=tmp_path / "log.csv"), tmp_path=tmp_path).fit(1)
    assert_same(rec.to_frame(), pd.read_csv(tmp_path / "log.csv", dtype={"layer": str}))


def test_nothing_but_training_writes(tmp_path):
    learn = make(ActivationStatsRecorder(fname=tmp_path / "log.csv"), tmp_path=tmp_path)
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=5, show_plot=False)
    assert not (tmp_path / "log.csv").exists() or len((tmp_path / "log.csv").read_text().splitlines()) <= 1


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
        acc = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in acc.Tags()["scalars"]:
            if tag.startswith("activations"):
                found.setdefault(tag, []).extend((e.step, e.value) for e in acc.Scalars(tag))
    return found


@pytest.mark.parametrize("recorder_first", [True, False])
@pytest.mark.parametrize("options", [{}, dict(with_grad=True), dict(every=2)], ids=str)
@pytest.mark.parametrize("trace_model", [True, False])
def test_real_event_files(tmp_path, trace_model, options, recorder_first):
    "Each scalar of each record, in its order; the graph's tracing is no batch."
    from fastai.callback.tensorboard import TensorBoardCallback

    cbs = [
        rec := ActivationStatsRecorder(**options),
        TensorBoardCallback(tmp_path / "tb", trace_model=trace_model, log_preds=False),
    ]
    learn = make(*(cbs if recorder_first else cbs[::-1]), tmp_path=tmp_path)
    learn.dls.to(default_device())  # where the callback expects the batch that it traces
    learn.fit(2)
    found, frame = events(tmp_path / "tb"), rec.to_frame()
    assert len(records(rec)) == (3 if "every" in options else 6)
    names = ["mean", "std", "near_zero", "sparsity", "at_limit", "signal"]
    names += ["grad_mean", "grad_std"] if "with_grad" in options else []
    of_all = {f"activations/{layer}/{n}" for layer in rec.layer_names for n in names}
    of_weights = {f"activations/{layer}/update" for layer in ("0.0", "0.2", "1.0", "1.3")}
    of_units = {f"activations/{layer}/dead_units" for layer in ("0.1", "0.3", "1.1")}
    assert {*found} == of_all | of_weights | of_units
    for layer in rec.layer_names:
        for n in names:
            steps, values = zip(*found[f"activations/{layer}/{n}"])
            want = frame[frame.layer == layer]
            assert [*values] == pytest.approx([*want[n]], rel=1e-5, abs=1e-12)
            assert [*steps] == sorted(set(steps)), "a place of its own for each"


def test_tensorboard_of_several_fits(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback

    learn = make(
        rec := ActivationStatsRecorder(modules="1.3"),
        TensorBoardCallback(tmp_path / "tb", trace_model=False, log_preds=False),
        tmp_path=tmp_path,
    )
    for _ in range(2):
        learn.fit(1)
    learn.validate()
    steps, values = zip(*events(tmp_path / "tb")["activations/1.3/std"])
    assert [*values] == pytest.approx([*rec.to_frame()["std"]], rel=1e-5) and [*steps] == [1, 2, 3] * 2, (
        "where fastai's callback logs the loss"
    )


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def history(folder):
    "The history in a run file: LevelDB's log format behind seven bytes, a protobuf record in each."
    from wandb.proto import wandb_internal_pb2 as pb

    (raw,) = (p.read_bytes() for p in folder.rglob("*.wandb"))
    pos, part, rows = 7, b"", []
    while pos < len(raw):
        left = 32768 - pos % 32768
        if left < 7:
            pos += left
            continue
        _, n, kind = struct.unpack("<IHB", raw[pos : pos + 7])
        part, pos = part + raw[pos + 7 : pos + 7 + n], pos + 7 + n
        if kind in (1, 4):  # whole, or its last piece
            record, part = pb.Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="test", dir=tmp_path, settings=wandb.Settings(console="off", silent=True))
    yield run
    if wandb.run is not None:
        wandb.finish()


@pytest.mark.parametrize("recorder_first", [True, False])
def test_a_real_run_of_wandb(run, tmp_path, recorder_first, monkeypatch):
    "Offline, read back from the file that would have been sent: every value, none of W&B's own lost."
    import wandb
    from fastai.callback.wandb import WandbCallback

    monkeypatch.setattr(WandbCallback, "_wandb_watch_called", False)
    # fastcore 2.2's asks `vars()` of numbers and names, too, which ends every fit with fastai 2.8's `WandbCallback`
    monkeypatch.setattr("fastai.callback.wandb.init_args", lambda o: init_args(o) if hasattr(o, "__dict__") else {})
    cbs = [rec := ActivationStatsRecorder(with_grad=True), WandbCallback(log_preds=False, log=None)]
    learn = make(*(cbs if recorder_first else cbs[::-1]), tmp_path=tmp_path)
    learn.fit(2)
    run.finish()
    wandb.teardown()  # waits for the process that writes the file, which `finish` doesn't
    rows, frame = history(tmp_path), rec.to_frame()
    for layer in rec.layer_names:
        for n in ("mean", "std", "near_zero", "grad_mean", "grad_std"):
            values = [r[f"activations/{layer}/{n}"] for r in rows if f"activations/{layer}/{n}" in r]
            assert values == pytest.approx([*frame[frame.layer == layer][n]], rel=1e-5, abs=1e-12), (layer, n)
    assert len([r for r in rows if "train_loss" in r]) == 6, "W&B's own"


def test_no_run_no_word(tmp_path):
    "A Learner that does not log there does not, whatever is installed and running."
    make(ActivationStatsRecorder(), tmp_path=tmp_path).fit(1)
    assert not [*tmp_path.rglob("events.*")] and not [*tmp_path.rglob("*.wandb")]
