"""Data-driven initialisation (LSUV) for fastai and PyTorch.

The rooms, each built on those above it only:

    stats        moments of a tensor
    modules      which modules a user means
    options      what can be asked for
    init         initialisers for very deep plain networks
    probe        which parameters carry a module's scale and shift
    hooks        forward hooks that always go away
    rehearsal    a forward pass as training will see it, everything restored
    units        what is measured and corrected
    survey       the first pass: which units there are
    solver       a dial for what no single step corrects
    step         the exact step
    block        a block, run again until it is right
    correction   the correcting pass
    plots        frames in, figures out
    report       rows, table, frame, figure
    lsuv         observe, correct, observe: `lsuv_`
    evidence     signs that a network has been trained
    batch        one batch from a Learner, without a trace
    callback     when it runs in fastai: `LSUVCallback`, `learn.lsuv_init`
    demo         digits, with and without
"""

from fastai_lsuv.callback import LSUVCallback
from fastai_lsuv.lsuv import lsuv_
from fastai_lsuv.report import LSUVReport

__version__ = "0.1.0"
__all__ = ["LSUVCallback", "LSUVReport", "lsuv_"]
