"""Two processes that train one model, over gloo on the CPU: one decision, one set of weights, one line, one end."""

import multiprocessing
import socket

import distributed_script as script
import pytest
import torch
from torch import nn

from fastai_lsuv import lsuv_

pytestmark = pytest.mark.cpu
GUARD = 60  # seconds until two ranks are taken to wait for each other


@pytest.fixture(scope="module")
def processes():
    "Processes that have imported fastai already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastai.vision.all", "fastai.distributed", "accelerate"])
    return context


@pytest.fixture
def both(processes, tmp_path):
    "Run a job as two ranks; what each of them tells, and the lines that it printed."

    def run(job, **options):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        ranks = [processes.Process(target=script.main, args=(job, rank, port, tmp_path, options)) for rank in (0, 1)]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(GUARD)
        stuck = [rank for rank, p in enumerate(ranks) if p.is_alive()]
        for p in ranks:
            p.kill()
        assert not stuck, f"ranks {stuck} hang"
        results = [
            torch.load(tmp_path / f"{rank}.pt", weights_only=False) | {"out": (tmp_path / f"{rank}.txt").read_text()}
            for rank in (0, 1)
        ]
        for rank, result in enumerate(results):
            assert "died" not in result, f"rank {rank}: {result['died']}"
        return results

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def lines(*results):
    return [line for r in results for line in r["out"].splitlines() if "LSUV" in line]


def assert_as_one_process(a, model, inputs, rel=1e-5, **options):
    "Rank 0's weights and report are those that one process makes of its own weights and this batch."
    net = script.MODELS[model]()
    net.load_state_dict(a["own"])
    report = lsuv_(net, inputs, **options)
    for name, value in net.state_dict().items():
        assert torch.allclose(a["after"][name], value, rtol=rel, atol=rel), name
    assert [(r["name"], r["n_calls"], r["status"], r["reason"]) for r in a["rows"]] == [
        (r.name, r.n_calls, r.status, r.reason) for r in report
    ]
    for got, want in zip(a["rows"], report, strict=True):
        for key in ("mean_before", "std_before", "mean_after", "std_after"):
            assert got[key] == pytest.approx(getattr(want, key), rel=10 * rel, abs=10 * rel, nan_ok=True), (got, want)


# --- rank 0's weights on rank 0's batch -------------------------------------------------------------------------------

CASES = {
    "as it is": {},
    "from the loaders": {"given": False},
    "by channel, targets": {"per_channel": True, "mean": 0.25, "std": 0.5},
    "blocks": {"model": "blocks", "modules": nn.Module.children},
    "norms": {"model": "norms"},
}


@pytest.mark.parametrize("case", CASES)
def test_as_one_process_with_rank_0_s_weights_and_batch(both, case):
    "Ranks begin with other weights, buffers and data; both end where rank 0 alone would have, with one line."
    options = dict(CASES[case])
    a, b = both(script.train, **options)
    given, model = options.pop("given", True), options.pop("model", "plain")
    assert not same(a["own"], b["own"])
    inputs = script.own_batch(0)[0] if given else a["inputs"][0]
    assert all(torch.equal(x, inputs) for r in (a, b) for x in r["inputs"] if x.shape == inputs.shape)
    assert a["ran"]
    assert b["ran"]
    assert same(a["after"], b["after"]), "after LSUV, before anything else could make them equal"
    assert same(a["first"], a["after"])
    assert same(b["first"], b["after"])
    assert a["rows"] == b["rows"]
    assert_as_one_process(a, model, inputs, **options)
    assert len(lines(a, b)) == 1, "one line for both"


def test_a_random_initialiser_gives_the_same_weights_on_both(both):
    a, b = both(script.train, init=nn.init.orthogonal_)
    assert same(a["after"], b["after"])
    assert same(a["first"], b["first"])
    assert a["rows"] == b["rows"]
    assert all(row["status"] == "corrected" and abs(row["std_after"] - 1) <= 1e-3 for row in a["rows"])
    kernels = a["after"]["0.weight"].flatten(1)
    assert torch.allclose(kernels @ kernels.T, (kernels @ kernels.T).diagonal().mean() * torch.eye(8), atol=1e-4)


def test_ranks_whose_models_route_by_the_data_run_the_same_layers(both):
    a, b = both(script.lsuv_init, models=("either", "either"))
    assert same(a["after"], b["after"])
    assert [r["n_calls"] for r in a["rows"]] == [r["n_calls"] for r in b["rows"]]
    assert_as_one_process(a, "either", script.own_batch(0)[0])


def test_both_train_on_the_batches_that_they_would_have_trained_on(both):
    plainly = both(script.train, lsuv=False)
    done = both(script.train, given=False)
    for with_it, without in zip(done, plainly):
        assert len(without["seen"]) >= 3 and with_it["seen"] == without["seen"]


def test_afterwards_the_model_is_itself_and_the_next_fit_of_each_alone_does_not_run_it_again(both):
    for r in both(script.train):
        assert r["unwrapped"] and r["same report"]
        assert same(r["second"], r["end"])


def test_the_explicit_door(both):
    a, b = both(script.lsuv_init)
    assert same(a["after"], b["after"])
    assert a["rows"] == b["rows"]
    assert_as_one_process(a, "plain", script.own_batch(0)[0])
    assert not lines(a, b)


def test_one_rank_alone_waits_for_nobody(both):
    a, _ = both(script.alone)
    for rows in (a["rows"], a["again"]):
        assert [row.status for row in rows] == ["corrected"] * 3


def test_rank_0_records(both, tmp_path):
    "Its own statistics, by plain names, in one log; the other keeps none; and both train as ever."
    a, b = both(script.recorded, folder=tmp_path)
    assert a["layers"] == ["0", "3"] and not b["layers"] and not len(b["frame"]) and not a["hooks"] and not b["hooks"]
    frame = a["frame"]
    assert (
        [*frame.step.unique()] == [*range(len(frame) // 2)] and {*frame.epoch} == {0, 1} and {*frame.phase} == {"train"}
    )
    for row in frame[frame.step == 0].itertuples():
        assert (row.mean, row.std) == pytest.approx(a["outputs"][row.layer], rel=1e-4), "of rank 0 alone"
    assert a["outputs"] != b["outputs"] and frame.grad_std.notna().all()
    logged = a["log"].splitlines()
    assert len(logged) == 1 + len(frame) and len(set(logged)) == len(logged), "one header, each row once"
    assert all(torch.equal(a["end"][n], b["end"][n]) for n in a["end"] if "running" not in n and "tracked" not in n)


# --- one decision -----------------------------------------------------------------------------------------------------


def test_both_decline_where_rank_0_was_loaded(both):
    a, b = both(script.train, loaded=(0,))
    assert not a["ran"] and not b["ran"]
    assert same(a["after"], a["own"])
    assert same(a["first"], a["own"]) and same(b["first"], a["own"]), "what DistributedDataParallel does by itself"
    (line,) = lines(a, b)
    assert "loaded" in line


@pytest.mark.parametrize("loaded", [(1,), (0, 1)])
def test_they_decide_together(both, loaded):
    a, b = both(script.train, loaded=loaded)
    assert a["ran"] == b["ran"]
    assert not (len(loaded) == 2 and a["ran"])
    assert same(a["first"], b["first"]) and len(lines(a, b)) == 1


@pytest.mark.parametrize("done", [(0,), (1,), (0, 1)])
def test_they_decide_together_also_where_one_has_had_it(both, done):
    "`learn.lsuv_init()` on one rank only, say, before they begin to train together: nobody waits for the other."
    a, b = both(script.train, done=done)
    assert same(a["first"], b["first"])
    assert same(a["after"], a["own"]) == (0 in done), "rank 0 is done, and its weights are what both train from"
    assert len(lines(a, b)) == (0 not in done)
    if 0 not in done:
        assert same(a["after"], b["after"]) and a["rows"] == b["rows"]


def test_fine_tuning_says_once_what_it_says(both):
    a, b = both(script.fine_tune)
    assert [row["status"] for row in a["rows"]] == ["skipped", "skipped", "corrected"]
    assert repr(a["rows"]) == repr(b["rows"]), "NaN equals nothing"
    told = lines(a, b)
    assert len([line for line in told if "LSUV: 1 corrected, 2 skipped (frozen)" in line]) == 1, told
    assert len([line for line in told if "not corrected" in line]) == 1, told
    assert same(a["after"], b["after"])


# --- one end ----------------------------------------------------------------------------------------------------------

FAILURES = [
    ("data", "value", 1),
    ("data", "its own", 1),
    *((where, "value", 1) for where in (1, 2, 3)),
    (2, "value", 0),
    (2, "memory", 1),
    (2, "none", 1),
    (2, "its own", 1),
    (2, "interrupt", 1),
    (2, "interrupt", 0),
    ("data", "interrupt", 1),
    ("nan", "value", 0),
]


@pytest.mark.parametrize(("where", "kind", "on"), FAILURES)
def test_an_error_on_one_rank_ends_both(both, where, kind, on):
    "With that error; each has its own weights again, and the next fit of both tries again."
    results = both(script.fails, where=where, kind=kind, on=on)
    error = ValueError("NaN") if where == "nan" else script.ERRORS[kind]()
    failed, other = results[on], results[1 - on]
    assert failed["error"] == type(error).__name__
    assert all(str(error) in r["text"] for r in results), [r["text"] for r in results]
    assert other["error"] == type(error).__name__ or kind == "its own", (
        "a type that no message can make is told by its text"
    )
    for r in results:
        assert same(r["left"], r["own"]) and not r["ran"] and not r["hooks"]
        assert r["ran again"], "the next fit"
    assert same(results[0]["after"], results[1]["after"])


def test_ranks_with_different_models_end_with_an_error(both):
    results = both(script.lsuv_init, models=("plain", "norms"))
    for r in results:
        assert "differ in shape" in r["error"]
        assert same(r["after"], r["own"])
        assert not r["rows"]
