"""`LSUVCallback` and `learn.lsuv_init`: when LSUV runs in fastai."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import default_device
from fastcore.basics import patch
from fastcore.meta import delegates

from fastai_lsuv.core.errors import CannotRun, shown
from fastai_lsuv.core.lsuv import lsuv_, run
from fastai_lsuv.core.modules import open_modules
from fastai_lsuv.core.options import Options, with_options
from fastai_lsuv.learner.distributed import group_of
from fastai_lsuv.learner.first_batch import as_fed, check_batch
from fastai_lsuv.learner.guards import (
    Decision,
    decision_on,
    keep,
    refusal,
    settle,
    sign_of_training,
    what_to_tell,
    what_was_overwritten,
)
from fastai_lsuv.learner.loads import LoadWatch
from fastai_lsuv.learner.loop import came_through_fit
from fastai_lsuv.learner.progress import progress_of
from fastai_lsuv.report import LSUVReport


class LSUVCallback(Callback):
    """Initialise a new network with LSUV before the first step of its first fit: `lsuv_` as a fastai `Callback`.

    It runs once per model. It never runs in `validate`, `get_preds` and the like, in later fits, or on a network that
    has been trained or loaded. Afterwards, the report is available as `report` and as `learn.lsuv_report`.

    The method is that of Mishkin & Matas (2016, arXiv:1511.06422), with the mean correction of the fast.ai course
    (2019).

    Raises:
        ValueError: an option is out of range. A fit raises whatever else `lsuv_` raises; the next fit then tries again.
        TypeError: an option has the wrong type, or `lsuv_` has no such option.

    Example:
        >>> from fastai.basics import Learner
        >>> from fastai_lsuv import LSUVCallback
        >>> from fastai_lsuv.demo import digits_dls, plain_cnn
        >>> learn = Learner(digits_dls(), plain_cnn(), cbs=LSUVCallback())
        >>> with learn.no_bar(), learn.no_logging():
        ...     learn.fit(1)  # doctest: +ELLIPSIS
        LSUV: 17 corrected; worst mean ...
        >>> learn.lsuv_report["head"].status
        'corrected'
    """

    # After ChannelsLast and TrainEvalCallback, which give the model the memory format and the device that it trains
    # with; before the callbacks of order 0 and above that copy, wrap or save it (EMA, ParallelTrainer, LRFinder).
    order = ChannelsLast.order / 2
    _learn: Learner | None = None
    _watch: LoadWatch | None = None
    _decision: Decision | None = None  # the decision not to run
    _declined = ""  # why the last fit trained without LSUV

    @delegates(lsuv_)
    @with_options
    def __init__(
        self,
        *,
        batch: Any = None,  # one batch as the DataLoaders give it, `(xb, yb)`; `None`: the first of `learn.dls`
        verbose: bool = True,  # print one line that says what was done
        **kwargs: Any,
    ) -> None:
        check_batch(batch)
        Options(**kwargs)  # raises now for a wrong option, not in the first fit
        super().__init__()
        self.batch, self.verbose, self.options = batch, verbose, kwargs
        self.report: LSUVReport | None = None

    @property
    def learn(self) -> Learner | None:
        """The Learner that this callback belongs to; loads into its model are watched for from its assignment on."""
        return self._learn

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        if self._watch is not None:
            self._watch.abandon()
        kept, watch = self._decision, None
        if learn is not None and (kept is None or not kept.is_about(learn.model)):
            kept, watch = None, None if decision_on(learn) else LoadWatch(open_modules(learn.model))
        # bypasses fastai's check for names that the Learner also has
        self.__dict__.update(_learn=learn, _decision=kept, _watch=watch)

    def before_fit(self) -> None:
        """Run LSUV if this is the first real fit of a fresh model."""
        learn = self._learn
        assert learn is not None
        if not came_through_fit(learn):
            return
        try:
            line = self._run_once(learn)
        except StopIteration as error:  # fastai runs callbacks with `map`, which would take it as the end
            raise RuntimeError(f"LSUV stopped by StopIteration: {error}") from error
        if self._watch is not None:
            self._watch.end()
            self.__dict__["_watch"] = None
        if line and self.verbose and group_of(learn).rank == 0:
            print(line)

    def _run_once(self, learn: Learner) -> str:
        sign = group_of(learn).first(lambda: refusal(learn))
        if sign is not None:
            return what_to_tell(learn, settle(learn, self, sign))
        try:
            self.report = _initialise(learn, self.batch, self.options, begun=self.order, with_bar=self.verbose)
        except CannotRun as error:  # training can go on without LSUV
            self._declined = str(error).partition("\n")[0]
            return f"LSUV: not run, because {self._declined}"
        others = [repr(cb) for cb in learn._grab_cbs(LSUVCallback) if cb.options != self.options]
        unused = f"; not used, as LSUV runs once per model: {', '.join(others)}" if others else ""
        return self.report.summary() + unused

    def __repr__(self) -> str:
        """Show the options that were given."""
        given = {"batch": self.batch} if self.batch is not None else {}
        given |= ({} if self.verbose else {"verbose": False}) | self.options
        options = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
        return f"{type(self).__name__}({options})" if options else type(self).__name__

    def __getstate__(self) -> dict[str, Any]:
        """Everything except training data."""
        return super().__getstate__() | {"batch": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> LSUVCallback:
        """Also copy the batch."""
        new = memo[id(self)] = copy.copy(self)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


@patch
@delegates(lsuv_)
@with_options
def lsuv_init(
    self: Learner,
    batch: Any = None,  # one batch as the DataLoaders give it; `None`: the callback's, or the first of `learn.dls`
    **kwargs: Any,
) -> LSUVReport:  # one row per layer, in execution order; also `learn.lsuv_report`, unless it only measured
    """Initialise the model with LSUV (Mishkin & Matas 2016, arXiv:1511.06422) now, whatever state it is in.

    It takes the options of `lsuv_`. If the Learner has an `LSUVCallback`, its options and its batch are the defaults.
    If the network looks trained and no layer is frozen, a warning says that its weights were overwritten.

    Raises:
        ValueError: an option is out of range, or `lsuv_` raises it for another reason.
        TypeError: an option has the wrong type, or `lsuv_` has no such option.

    Example:
        >>> from fastai.basics import Learner
        >>> import fastai_lsuv
        >>> from fastai_lsuv.demo import digits_dls, plain_cnn
        >>> learn = Learner(digits_dls(), plain_cnn())
        >>> report = learn.lsuv_init(mean=None, std=None)  # only measures
        >>> bool(report["conv16"].std_before < 0.1)
        True
        >>> learn.lsuv_init(exclude="head").converged
        True
    """
    for cb in self._grab_cbs(LSUVCallback):
        batch, kwargs = cb.batch if batch is None else batch, cb.options | kwargs
    self.model.to(getattr(self.dls, "device", default_device()))  # as every fit does
    sign = sign_of_training(self)
    report = _initialise(self, batch, kwargs)
    if (line := what_was_overwritten(report, sign)) and group_of(self).rank == 0:
        warnings.warn(line, stacklevel=3)
    return report


def _initialise(
    learn: Learner, batch: Any, options: dict[str, Any], begun: float = -math.inf, with_bar: bool = True
) -> LSUVReport:
    checked, group = Options(**options), group_of(learn)
    with progress_of(learn, with_bar and group.rank == 0) as on_layer:
        report = group.initialise(
            learn.model,
            as_fed(learn, batch, begun),
            lambda call: run(learn.model, call, checked, as_it_stands=True, on_layer=on_layer),
        )
    if not checked.only_measures:  # measuring alone is not an initialisation
        keep(learn, report)
    return report


_ask_the_model = Learner.__getattr__


def _getattr(self: Learner, name: str) -> Any:
    """Delegate to the model as usual, but say why if there is no report: the model's own error would not help."""
    if name != "lsuv_report":
        return _ask_the_model(self, name)
    callbacks = self._grab_cbs(LSUVCallback)
    if declined := next((cb._declined for cb in callbacks if cb._declined), ""):
        why = f"a fit went on without it, because {declined}; once that is fixed, call learn.lsuv_init()"
    elif sign := refusal(self):
        why = f"this network looks trained ({sign}); to overwrite its weights anyway, call learn.lsuv_init()"
    elif callbacks:
        why = "it will when the first fit begins; to run it now, call learn.lsuv_init()"
    else:
        why = "fit with LSUVCallback(), or call learn.lsuv_init()"
    raise AttributeError(f"there is no lsuv_report because LSUV has not run on this model: {why}")


Learner.__getattr__ = _getattr
