"""What the outputs of the layers tell of a network's trainability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from fastai_lsuv.core.bulk import on_host
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.gradient import Gradient
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.reasons import Skip
from fastai_lsuv.core.statistics import Measured
from fastai_lsuv.core.verdict import Evidence, Trainability

DEAD = 1e-6  # std of an output beside the largest of any layer's: nothing comes through, whatever it shows
_TOLD = (None, Skip.CONSTANT, Skip.NOT_FINITE)


def trainability(dry_run: DryRun, layers: Sequence[Layer], gradients: Mapping[nn.Module, Gradient]) -> Trainability:
    """Return what is known of the layers that ran.

    A network of which no layer can be corrected (recurrent, frozen) isn't judged. Where weights are zero on purpose, as
    a head's, no signal and no gradient comes through, and neither says anything.
    """
    ran = [layer for layer in layers if layer.after]
    if not any(layer.skipped in _TOLD for layer in ran):
        return Trainability([], 0)
    zero = _zero_on_purpose(ran, gradients)
    stds = [max(layer.after.std) for layer in ran if layer.after]
    largest = max((std for std in stds if std < math.inf), default=0.0)
    evidence = []
    for layer, std in zip(ran, stds, strict=True):
        assert layer.after is not None
        is_unknown = layer in zero or layer.after.n < 2  # a single value has no std
        signal = math.nan if is_unknown else left_of(layer.after) if DEAD * largest < std < math.inf else 0.0
        growth = gradients[layer.module].growth if layer.module in gradients else math.nan
        evidence.append(Evidence(layer.shown_name, signal, math.nan if zero and not growth else growth))
    return Trainability(evidence, sum("norm" in type(module).__name__.lower() for module in dry_run.names))


def left_of(seen: Measured) -> float:
    """Return what is left of the input: the share of the std that is due to it, less what a few directions have."""
    return seen.signal if math.isnan(seen.spread) else seen.signal * seen.spread


def _zero_on_purpose(ran: Sequence[Layer], gradients: Mapping[nn.Module, Gradient]) -> set[Layer]:
    """Layers whose weights are all zero, looked for where something is exactly zero."""
    nothing = any(g.elasticity == 0 or math.isnan(g.elasticity) for g in gradients.values())
    if not nothing and all(layer.after and max(layer.after.std) > 0 for layer in ran):
        return set()
    with_weights = [layer for layer in ran if layer.affine]
    has_any = on_host([layer.affine.weight.any() for layer in with_weights if layer.affine])
    return {layer for layer, (some,) in zip(with_weights, has_any, strict=True) if not some}
