"""Two processes train one model, over gloo: one set of weights, statistics of both batches, one line, one end."""

import multiprocessing
import socket

import distributed_script as script
import pytest
import torch
from audit import audit
from torch import nn

from fastai_lsuv import lsuv_

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


def joined(a, b):
    return torch.cat([a["inputs"][0], b["inputs"][0]])


def at_once(model, weights, batch, **options):
    "One process, on the joined batch, from the weights of rank 0."
    net = script.MODELS[model]()
    net.load_state_dict(weights)
    return net, lsuv_(net, batch, **options)


def assert_close(got, net, rel=1e-5):
    for name, p in net.state_dict().items():
        assert (got[name] - p).norm() <= rel * p.norm().clamp(min=1e-3), name


def assert_rows(rows, report, rel=1e-4):
    assert [(r["name"], r["n_calls"], r["status"], r["reason"]) for r in rows] == [
        (r.name, r.n_calls, r.status, r.reason) for r in report
    ]
    for got, want in zip(rows, report):
        for key in ("mean_before", "std_before", "mean_after", "std_after"):
            assert got[key] == pytest.approx(getattr(want, key), rel=rel, abs=rel), (got, want)


# --- one set of weights, from the statistics of both ------------------------------------------------------------------

CASES = {
    "as it is": {},
    "by channel": {"per_channel": True},
    "targets": {"mean": 0.25, "std": 0.5},
    "a shared layer": {"model": "shared"},
    "blocks": {"model": "blocks", "modules": nn.Module.children},
    "some": {"exclude": "0"},
    "branches": {"model": "branches", "residual": True},
}


@pytest.mark.parametrize("given", [True, False], ids=["a batch each", "from the loaders"])
@pytest.mark.parametrize("case", CASES)
def test_as_one_process_on_the_joined_batch(both, case, given):
    "Ranks begin with other weights and data; both end where one process with rank 0's weights and all the data does."
    options = CASES[case]
    a, b = both(script.train, given=given, **options)
    assert not same(a["own"], b["own"]) and not torch.equal(a["inputs"][0].mean(), b["inputs"][0].mean())
    for r in (a, b):
        assert all(torch.equal(x, r["inputs"][0]) for x in r["inputs"] if x.shape == r["inputs"][0].shape)
    assert a["ran"] and b["ran"]
    assert same(a["after"], b["after"]), "after LSUV, before anything else could make them equal"
    assert same(a["first"], a["after"]) and same(b["first"], b["after"])
    net, report = at_once(
        options.get("model", "plain"), a["own"], joined(a, b), **{k: v for k, v in options.items() if k != "model"}
    )
    iterated = case in ("blocks", "a shared layer")
    assert_close(a["after"], net, 1e-3 if iterated else 1e-5)
    assert_rows(a["rows"], report, 1e-3 if iterated else 1e-4)
    assert a["rows"] == b["rows"]
    assert len(lines(a, b)) == 1, "one line for both"


def test_a_random_initialiser_gives_the_same_weights_on_both(both):
    a, b = both(script.train, init=nn.init.orthogonal_)
    assert same(a["after"], b["after"]) and same(a["first"], b["first"])
    assert all(row["status"] == "corrected" and abs(row["std_after"] - 1) <= 1e-3 for row in a["rows"])
    kernels = a["after"]["0.weight"].flatten(1)
    assert torch.allclose(kernels @ kernels.T, (kernels @ kernels.T).diagonal().mean() * torch.eye(8), atol=1e-4), (
        "orthogonal still"
    )
    net, _ = at_once("plain", a["after"], joined(a, b))
    assert_close(a["after"], net, 2e-3)


def test_batch_norms_normalise_each_rank_by_its_own_batch(both):
    "What is pooled is the statistics of the outputs; buffers are those of rank 0."
    a, b = both(script.train, model="norms")
    assert same(a["after"], b["after"]) and same(a["first"], b["first"])
    buffers = [n for n in a["own"] if "running" in n or "tracked" in n]
    assert len(buffers) == 6 and any(not torch.equal(a["own"][n], b["own"][n]) for n in buffers)
    for n in buffers:
        assert torch.equal(a["after"][n], a["own"][n]), n
    net = script.MODELS["norms"]()
    net.load_state_dict(a["after"])
    for one, other in zip(audit(net, a["inputs"][0]), audit(net, b["inputs"][0])):
        n, mean = one.n + other.n, (one.n * one.mean + other.n * other.mean) / (one.n + other.n)
        m2 = one.m2 + other.m2 + one.n * (one.mean - mean) ** 2 + other.n * (other.mean - mean) ** 2
        row = next(r for r in a["rows"] if r["name"] == one.name)
        assert abs(mean) <= 1e-3 and abs((m2 / (n - 1)) ** 0.5 - 1) <= 1e-3, one.name
        assert (row["mean_after"], row["std_after"]) == (
            pytest.approx(mean, abs=1e-4),
            pytest.approx((m2 / (n - 1)) ** 0.5, rel=1e-4),
        )


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
    assert same(a["after"], b["after"]) and a["rows"] == b["rows"]
    net, report = at_once("plain", a["own"], torch.cat([script.own_batch(r)[0] for r in (0, 1)]))
    assert_close(a["after"], net)
    assert_rows(a["rows"], report)
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
    assert [row["status"] for row in a["rows"]] == ["skipped", "skipped", "corrected"] and a["rows"] == b["rows"]
    assert (
        len([line for line in lines(a, b) if "right" in line])
        == len([line for line in lines(a, b) if "not corrected" in line])
        == 1
    )
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
    ("nan", "value", 1),
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


def test_ranks_that_run_different_layers_do_not_wait_for_each_other(both):
    "Either all of them end with an error, as they were, or with the same weights."
    a, b = both(script.lsuv_init, model="either")
    assert ("error" in a) == ("error" in b)
    if "error" in a:
        assert same(a["left"], a["own"]) and same(b["left"], b["own"])
    else:
        assert same(a["after"], b["after"])
