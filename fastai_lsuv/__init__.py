"""Data-driven initialisation (LSUV) for fastai and PyTorch.

The rooms, each built on those above it only:

    errors       what an error says of where it happened
    stats        moments of a tensor
    ranks        the processes that train one model together
    modules      which modules a user means
    options      what can be asked for
    init         initialisers for very deep plain networks
    probe        which parameters carry a module's scale and shift
    hooks        forward hooks that always go away; a context for one call
    rehearsal    a forward pass as training will see it, everything restored
    units        what is measured and corrected
    survey       the first pass: which units there are
    branches     which layers end a residual branch
    solver       a dial for what no single step corrects
    step         the exact step
    block        a block, run again until it is right
    correction   the correcting pass
    figure       what all figures have in common
    plots        frames in, figures out: LSUV's own
    activation_curves, activation_maps
                 frames in, figures out: activations over the steps of training
    report       rows, table, frame, figure
    lsuv         observe, correct, observe: `lsuv_`
    loop         which part of fastai's training loop is at work
    evidence     signs that a network has been trained
    loaders      a copy of a DataLoader, from which a batch can be taken
    settings     what is in force when training calls the model
    pilot        how training calls the model, found out by a fit of copies
    first_batch  one batch from a Learner, without a trace
    callback     when it runs in fastai: `LSUVCallback`, `learn.lsuv_init`
    sampling     what a sample of a tensor shows
    capture      samples of what layers put out in one pass
    history      a bounded store of records: frame, summary, verdicts
    reading      how a history is read
    logs         CSV, TensorBoard, Weights & Biases
    recorder     when activations are recorded: `ActivationStatsRecorder`
    demo         digits, with and without
"""

from fastai_lsuv.callback import LSUVCallback
from fastai_lsuv.core.lsuv import lsuv_
from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.report import LSUVReport

__version__ = "0.1.0"
__all__ = ["ActivationStatsRecorder", "LSUVCallback", "LSUVReport", "lsuv_"]
