"""What is wrong with a layer, by the numbers that were recorded of it."""

from __future__ import annotations

import pandas as pd

# Rules of the verdicts, rough on purpose: a healthy layer of any architecture is to pass, a broken one is not.
EXPLODING = 1e3  # std that no healthy layer reaches
VANISHING = 1e-3  # std that is nothing beside a bias of default size
SIGNAL = 0.01  # part of the std that the input makes: below it the outputs of all samples are the same
CHANGE = 100.0  # by how much the std may grow (from 1 at least) or fall since the first record
DYING = 0.95  # share of outputs that are nothing beside the layer's own std
SATURATED = 0.35  # share of outputs at the limit of the layer's range: of a sigmoid it could be half


def verdict(
    running: pd.Series,  # first_std, last_std of all training records
    latest: pd.Series,  # all columns of its latest record
    is_known: bool = True,  # a layer with parameters or an activation: others may hand on what they get
) -> str:
    """Return what is wrong with a layer, by the first of these rules that applies to its latest record.

    `exploding`: the std is above 1,000, or above 100 times its first value (and 100), or not finite.
    `dying`: 95 % of the outputs are nothing (within 5 % of the layer's own std), whatever its scale.
    `vanishing`: the std is below 0.001, or below 1 % of its first value, or less than 1 % of it is due to the input:
    all samples give the same. Said of layers with parameters and of PyTorch's activations.
    `saturated`: 35 % of the outputs are within 5 % of the largest size, as of a tanh or sigmoid driven too hard.
    `healthy`: none of these.
    """
    first, last = running["first_std"], running["last_std"]
    if last > min(EXPLODING, CHANGE * max(first, 1.0)):
        return "exploding"
    if latest["sparsity"] >= DYING:
        return "dying"
    if is_known and (last < max(VANISHING, first / CHANGE) or latest["signal"] < SIGNAL):
        return "vanishing"
    return "saturated" if latest["at_limit"] >= SATURATED else "healthy"
