"""What it costs to record activations, as a ratio to the same training without: `pytest tests/benchmarks`."""

import pytest
from recording import FASTAI_HISTOGRAMS, HISTOGRAMS, MODELS, NOTHING, OURS, Turns, growth, turn


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(benchmark, name):
    turns = Turns(MODELS[name])
    for _ in range(turns.rounds_in(60)):
        turns.round()
    benchmark.pedantic(turn, args=(turns.learners[OURS],), rounds=3)
    benchmark.extra_info |= {kind: turns.ratio(kind) for kind in turns.learners}
    nothing, fastai_s_hist, ours, ours_hist = map(turns.ratio, (NOTHING, FASTAI_HISTOGRAMS, OURS, HISTOGRAMS))
    assert ours < fastai_s_hist and ours_hist < fastai_s_hist
    if name.startswith("xresnet18"):
        assert (ours - nothing <= 0.02) and (ours_hist - nothing <= 0.04)


def test_memory_is_flat_over_20_000_steps():
    grown, records = growth()
    assert records <= 2000 and grown < 2**20 * 4
