"""What fastai's notebook 15_callback.hook asserts of `ActivationStats`, of our recorder in its place.

On its `synth_learner`: a line through noisy points, a model that is one layer itself.
"""

import math

import pytest
from fastai.callback.hook import ActivationStats, HookCallback
from fastai.test_utils import synth_learner
from torch import nn

from fastai_lsuv import ActivationStatsRecorder


def fitted(*cbs, **options):
    learn = synth_learner(cbs=cbs, **options)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    return learn


def test_stats_are_a_record_a_recorded_batch_and_a_dictionary_a_layer():
    learn = fitted(ActivationStatsRecorder(every=4), n_trn=5)
    stats = learn.activation_stats_recorder.stats
    assert [len(record) for record in stats] == [1, 1]
    assert all({*layer} == {"mean", "std", "near_zero"} for record in stats for layer in record)


@pytest.mark.parametrize("every", [4, 1])
@pytest.mark.parametrize("n_trn", [11, 12, 13])
def test_every(n_trn, every):
    learn = fitted(ActivationStatsRecorder(every=every), n_trn=n_trn)
    assert len(learn.activation_stats_recorder.stats) == math.ceil(n_trn / every)


class Outputs(HookCallback):
    "Mean and std of the model's output, by fastai's own hooks."

    def hook(self, m, i, o):
        return o

    def before_fit(self):
        super().before_fit()
        self.means, self.stds = [], []

    def after_batch(self):
        if self.training:
            self.means.append(self.hooks.stored[0].mean().item())
            self.stds.append(self.hooks.stored[0].std().item())


def test_mean_and_std_are_those_of_the_hooked_outputs():
    learn = fitted(Outputs(), ActivationStatsRecorder(), n_trn=5)
    stats = learn.activation_stats_recorder.stats.itemgot(0)
    assert [*stats.itemgot("mean")] == pytest.approx(learn.outputs.means, rel=1e-5)
    assert [*stats.itemgot("std")] == pytest.approx(learn.outputs.stds, rel=1e-5)


def five_layers():
    return nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.BatchNorm1d(50), nn.Linear(50, 1), nn.Flatten())


@pytest.mark.parametrize("include_paramless", [True, False])
def test_the_layers_that_either_setting_of_include_paramless_records(include_paramless):
    "Ours are chosen by `modules`, in the same order."
    learn = fitted(theirs := ActivationStats(every=4, include_paramless=include_paramless), model=five_layers())
    layers = [*learn.model] if include_paramless else [m for m in learn.model if [*m.parameters()]]
    assert theirs.modules == layers and len(layers) == (5 if include_paramless else 3)

    learn.remove_cb(theirs)
    learn.add_cb(ours := ActivationStatsRecorder(modules=layers, every=4))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert [learn.model.get_submodule(name) for name in ours.layer_names] == layers
    assert [len(record) for record in ours.stats] == [len(record) for record in theirs.stats]


def test_the_layers_by_default():
    "Activations are recorded, too; what only reshapes is not."
    learn = fitted(ActivationStatsRecorder(every=4), model=five_layers())
    types = [type(learn.model.get_submodule(name)) for name in learn.activation_stats_recorder.layer_names]
    assert types == [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear]
