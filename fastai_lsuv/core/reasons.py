"""The fixed phrases of a report: why a layer is left as it is, and what else is worth saying of one."""

from __future__ import annotations

from enum import Enum


class Skip(str, Enum):
    """Why a layer is left as it is."""

    COMPLEX = "complex"
    CONSTANT = "constant output"
    FROZEN = "frozen"
    MODE = "excluded by mode"
    NEVER_CALLED = "never called"
    NO_AFFINE_LAYER = "no affine layer"
    NO_EFFECT = "weight has no effect on scale"
    NOT_AFFINE = "not affine"
    NOT_FINITE = "non-finite output"
    RECURRENT = "recurrent weights"
    SCRIPTED = "scripted"
    SEVERAL = "several weights"  # which no single scale acts on
    TIED = "tied weight"
    TOO_FEW = "too few values"
    TRANSFORMED = "inside a transform"  # `torch.vmap`, `functional_call`: it runs on other tensors than its parameters


class Note(str, Enum):
    """What is worth saying of a layer that is corrected all the same."""

    BIAS_MOVED = "constant bias moved"  # one that was set on purpose, ahead of other layers
    CONSTANT_CHANNELS = "constant output"  # in some channels
    ENDS_BRANCH = "ends a branch"  # and so gets a smaller std than other layers
    NO_BIAS = "no bias, mean kept"
    ONE_SIGN = "one sign, mean kept"
    OTHERS = "other weights kept"  # that meet the input in the same module, ahead of what is corrected
    PRIOR = "prior bias, mean kept"  # one that was set on purpose, in a head
