"""`LSUVCallback` and `learn.lsuv_init`: when LSUV runs in fastai."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.meta import delegates

from fastai_lsuv.core.lsuv import lsuv_, run
from fastai_lsuv.core.options import Options
from fastai_lsuv.learner.distributed import Ranks, Together
from fastai_lsuv.learner.first_batch import as_fed
from fastai_lsuv.learner.guards import LoadWatch, copied, signs_of_training
from fastai_lsuv.learner.loop import came_through_fit
from fastai_lsuv.learner.pilot import UnknownInputs
from fastai_lsuv.report import LSUVReport, few


@delegates(lsuv_)
class LSUVCallback(Callback):
    """Initialise a fresh network by LSUV before the first step of its first fit: `lsuv_` as a fastai `Callback`.

    Runs once per Learner, and never where weights are not the callback's to change: in `validate`, `get_preds` and
    the like, in later fits, on networks that have been trained or loaded. The report is then in `report` and in
    `learn.lsuv_report`.

    The method is Mishkin & Matas's (2016, arXiv:1511.06422), with the mean correction of the fast.ai course (2019).

    Raises:
        ValueError: an option out of its range. A fit raises what else `lsuv_` does, and the next one tries again.
        TypeError: an option of a wrong type, or one that `lsuv_` doesn't have.

    Example:
        >>> from fastai.basics import Learner
        >>> from fastai_lsuv import LSUVCallback
        >>> from fastai_lsuv.demo import digits_dls, plain_cnn
        >>> learn = Learner(digits_dls(), plain_cnn(), cbs=LSUVCallback())
        >>> with learn.no_bar(), learn.no_logging():
        ...     learn.fit(1)  # doctest: +ELLIPSIS
        LSUV: 17 of 17 layers right, worst mean ...
        >>> learn.lsuv_report["head"].status
        'corrected'
    """

    # after ChannelsLast and TrainEvalCallback, which bring the model into the form and onto the device on which it
    # trains; before anything from 0 up that copies, wraps or saves it (EMA, ParallelTrainer, LRFinder)
    order = ChannelsLast.order / 2
    _learn: Learner | None = None
    _watch: LoadWatch | None = None

    def __init__(
        self,
        batch: Any = None,  # a batch as the DataLoaders give it, `(xb, yb)`; `None` takes one from `learn.dls`
        verbose: bool = True,  # print one line that says what was done
        **kwargs: Any,
    ) -> None:
        Options.of("LSUVCallback", kwargs)  # a wrong one should be told now, not at the first fit
        super().__init__()
        self.batch, self.verbose, self.options = batch, verbose, kwargs
        self.report: LSUVReport | None = None
        self.declined: str | None = None
        self.told = False

    @property
    def learn(self) -> Learner | None:
        """The Learner that this callback belongs to, which is watched for loads from the moment it is known."""
        return self._learn

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        self._stop_watching()
        self.__dict__["_learn"] = learn  # past fastai's check for names that the Learner has, too
        if learn is not None and not _has_had_lsuv(learn):
            self.__dict__["_watch"] = LoadWatch(learn.model)

    def before_fit(self) -> None:
        """Run LSUV if this is the first real fit of a fresh network."""
        learn = self._learn
        assert learn is not None
        if not came_through_fit(learn):
            return
        try:
            self._run_once(learn)
        except StopIteration as error:  # fastai runs callbacks by `map`, which would take it for the end of them
            raise RuntimeError(f"LSUV stopped by StopIteration: {error}") from error
        self._stop_watching()

    def _run_once(self, learn: Learner) -> None:
        with _ranks_of(learn) as ranks:
            if (report := ranks.first("whether LSUV has run", vars(learn).get("lsuv_report"))) is not None:
                learn.lsuv_report = report
                self._tell_of_thawed_layers(learn)
            elif sign := ranks.first("whether it is fresh", self._sign(learn)):
                self._say_once(f"LSUV: not run, because {sign}; learn.lsuv_init() would do it all the same")
            else:
                try:
                    self.report = _initialise(learn, self.batch, self.options, ranks, begun=self.order)
                except UnknownInputs as error:  # whatever is wrong, training can do without LSUV
                    self._say_once(f"LSUV: not run, because {error}")
                else:
                    self._say(self.report.summary())

    def _sign(self, learn: Learner) -> str | None:
        """What says that the network isn't fresh; once said, it holds for good."""
        self.declined = self._seen_load() or self.declined or next(signs_of_training(learn), None)
        return self.declined

    def _seen_load(self) -> str | None:
        return "weights were loaded into the model" if self._watch is not None and self._watch.loaded else None

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self.declined = self._seen_load() or self.declined
            self._watch.remove()
            self.__dict__["_watch"] = None

    def _tell_of_thawed_layers(self, learn: Learner) -> None:
        """Say which layers were frozen when LSUV ran, and train from now on."""
        modules = dict(learn.model.named_modules())
        frozen = [row.name for row in learn.lsuv_report if row.reason == "frozen" and row.name in modules]
        thawed = [name for name in frozen if all(p.requires_grad for p in modules[name].parameters())]
        if thawed:
            self._say_once(f"LSUV: unfrozen since it ran, and not corrected, are {len(thawed)} layers: {few(thawed)}")

    def _say_once(self, text: str) -> None:
        if not self.told:
            self._say(text)
        self.told = True

    def _say(self, text: str) -> None:
        if self.verbose and _ranks_of(self._learn).rank == 0:
            print(text)

    def __getstate__(self) -> dict[str, Any]:
        """Without training data and without the watch, which stays behind in this process."""
        declined = self._seen_load() or self.declined
        return super().__getstate__() | {"batch": None, "declined": declined, "_watch": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> LSUVCallback:
        """With both, the watch on the copied model."""
        return copied(self, memo)


@patch
@delegates(lsuv_)
def lsuv_init(
    self: Learner,
    batch: Any = None,  # a batch as the DataLoaders give it, `(xb, yb)`; `None` takes one from `learn.dls`
    **kwargs: Any,
) -> LSUVReport:  # a row for each unit, in execution order; kept as `learn.lsuv_report`, too, unless it only measured
    """Initialise the model by LSUV (Mishkin & Matas 2016, arXiv:1511.06422) now, whatever state it is in: `lsuv_`.

    Raises:
        ValueError: an option out of its range, and whatever else `lsuv_` raises.
        TypeError: an option of a wrong type, or one that `lsuv_` doesn't have.

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
    with _ranks_of(self) as ranks:
        Options.of("lsuv_init", kwargs)
        self.model.to(getattr(self.dls, "device", None))  # as every fit and validation does
        return _initialise(self, batch, kwargs, ranks)


def _initialise(
    learn: Learner, batch: Any, options: dict[str, Any], ranks: Ranks, begun: float = -math.inf
) -> LSUVReport:
    checked = Options(**options)
    with as_fed(learn, batch, begun) as (args, kwargs):
        report = run(learn.model, kwargs or args, checked, ranks)
    if not checked.only_measures:  # a diagnosis is no initialisation
        learn.lsuv_report = report
    return report


def _ranks_of(learn: Learner) -> Ranks:
    """All processes that train this Learner's model, if fastai's `DistributedTrainer` says that there are several."""
    several = "distributed_trainer" in vars(learn) and dist.is_available() and dist.is_initialized()
    return Together(next(learn.model.parameters()).device) if several else Ranks()


def _has_had_lsuv(learn: Learner) -> bool:
    return "lsuv_report" in vars(learn)
