"""What the study found: tables with 95% confidence intervals, and tests, from `study.csv`.

    python nbs/study_results.py    # prints them

A *cell* is a network before it has weights: kind, activation, depth, width. Each way to initialise it counts at the
better of its learning rates.
"""

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score
from study import LSUV, PLAIN, read
from study_networks import NETS

CELL = ["net", "act", "depth", "width"]
N_VALID = 10_000  # images
LOST, DEAD, EXPLODES = 0.1, 1e-6, 12  # signal, std and growth at which the verdict changes
FAILS = 0.5  # share of the best of its cell
COMPARED = ["default", "LSUV", "LSUV mirrored", "LSUV auto"]

# --- accuracies -----------------------------------------------------------------------------------------------------


def at_best_rate(df: pd.DataFrame) -> pd.DataFrame:
    "The runs of each cell and initialisation at the learning rate with the best mean over the seeds."
    means = df.groupby([*CELL, "init", "lr"]).accuracy.mean().reset_index()
    best = means.loc[means.groupby([*CELL, "init"]).accuracy.idxmax()].drop(columns="accuracy")
    return df.merge(best, on=[*CELL, "init", "lr"])


def interval(accuracy: pd.Series) -> float:
    """Half of the 95% confidence interval of a mean over seeds; of one seed, that of the validation images alone.

    The variance between seeds, by Student's t, and that of what 10,000 images can tell, which all seeds share.
    """
    p, n = accuracy.mean(), len(accuracy)
    images = 1.96 * np.sqrt(p * (1 - p) / N_VALID)
    seeds = stats.t.ppf(0.975, n - 1) * accuracy.std() / np.sqrt(n) if n > 1 else 0.0
    return float(np.hypot(images, seeds))


def with_interval(accuracy: pd.Series) -> str:
    return f"{100 * accuracy.mean():.1f} ± {100 * interval(accuracy):.1f}"


def table(df: pd.DataFrame, columns: str | list[str]) -> pd.DataFrame:
    "Initialisations by something else: mean accuracy and interval, in per cent."
    found = at_best_rate(df).groupby(["init", *np.atleast_1d(columns)]).accuracy.agg(with_interval).unstack(columns)
    return found.reindex([name for name in ["default", *PLAIN, *LSUV] if name in found.index]).pipe(drop_repeated)


def drop_repeated(df: pd.DataFrame) -> pd.DataFrame:
    return df[~df.index.duplicated()]


def compared(df: pd.DataFrame, one: str, other: str) -> dict[str, float]:
    "Mean difference over cells and seeds, in points, its 99% interval, and p of a paired t-test."
    both = at_best_rate(df).pivot_table(index=[*CELL, "seed"], columns="init", values="accuracy")[[one, other]].dropna()
    difference = 100 * (both[one] - both[other])
    test = stats.ttest_rel(both[one], both[other])
    low, high = (100 * bound for bound in test.confidence_interval(0.99))
    return {"pairs": len(both), "points": difference.mean(), "low": low, "high": high, "p": test.pvalue}


def against(df: pd.DataFrame, init: str = "LSUV auto") -> pd.DataFrame:
    "For each cell: what the best hand-picked initialisation, plain LSUV and `init` reach on the seeds that all have."
    means = at_best_rate(df).pivot_table(index=[*CELL, "seed"], columns="init", values="accuracy")
    means = means[means[init].notna()].groupby(CELL).mean()
    by_hand = means.drop(columns=init).dropna(how="all")
    best = {"best": by_hand.max(axis=1), "by": by_hand.idxmax(axis=1)}
    return pd.DataFrame({**best, "LSUV": means.LSUV, init: means[init]}, index=by_hand.index)


# --- does it train? -------------------------------------------------------------------------------------------------


def networks(df: pd.DataFrame) -> pd.DataFrame:
    """One row per initialised network, at the better of its learning rates.

    `share`: its accuracy over the best of its cell. `fails`: that is under a half. Cells in which nothing trains, and so
    nothing can be told, are left out, and so is `init="auto"`, which mostly repeats one of the others.
    """
    found = df.sort_values("accuracy").groupby([*CELL, "init", "seed"]).tail(1)
    best = found.groupby(CELL).accuracy.transform("max")
    share = found.accuracy / best
    return found.assign(share=share, fails=share < FAILS)[(best > 0.3) & (found.init != "LSUV auto")]


def score(found: pd.DataFrame) -> pd.Series:
    "How far signal and gradient come through, as a logarithm: what the verdict goes by, without its thresholds."
    exploding = np.log10(found.growth.astype(float).fillna(1).clip(1e-30) / EXPLODES).clip(0)
    return np.log10(found.left.clip(1e-4, 0.35)) - exploding.where(~found.has_norms, 0)


def roc_auc(found: pd.DataFrame) -> pd.Series:
    "Area under the ROC curve for `fails`: of parts of what is measured, and among parts of the networks."
    after, without, deep = found.init.isin(LSUV), ~found.has_norms, found.depth >= 50
    scale = found["std"] > DEAD  # else nothing comes out: a network that LSUV has not seen
    scores = {
        "signal": found.signal,
        "signal and spread": found.left,
        "signal, spread and gradient": score(found),
        "the same and std: the verdict": score(found).where(scale, -9),
        "after LSUV": score(found)[after],
        "after LSUV, without norms": score(found)[after & without],
        "after LSUV, 50 layers or more": score(found)[after & deep],
    }
    return pd.Series({name: area(found.fails[x.index], -x.fillna(1)) for name, x in scores.items()})


def area(fails: pd.Series, against: pd.Series) -> float:
    return float(roc_auc_score(fails, against)) if fails.nunique() > 1 else np.nan


def verdicts(found: pd.DataFrame) -> pd.DataFrame:
    "How many networks of each verdict fail, and what they reach of the best of their cell."
    kind = found.verdict.str.extract(r"(\w+ ?\w*?)(?: from| towards|$)", expand=False)
    return found.groupby(kind).agg(networks=("fails", "size"), fail=("fails", "sum"), share=("share", "median"))


# --- the parts of docs/when_it_helps.md -----------------------------------------------------------------------------


def plain(df: pd.DataFrame, depth: int = 17) -> pd.DataFrame:
    return df[(df.net == "plain CNN") & (df.depth == depth) & (df.width == 16)]


def deep(df: pd.DataFrame) -> pd.DataFrame:
    "Plain CNNs with ReLU or tanh, of all depths."
    return df[(df.net == "plain CNN") & df.act.isin(["relu", "tanh"]) & (df.width == 16) & (df.depth <= 200)]


def others(df: pd.DataFrame) -> pd.DataFrame:
    "Networks with norms or shortcuts, three seeds each."
    return df[df.net.isin([net for net in NETS if df[df.net == net].seed.nunique() > 1 and net != "plain CNN"])]


def markdown(df: pd.DataFrame, corner: str) -> str:
    columns = [" ".join(map(str, np.atleast_1d(c))) for c in df.columns]
    rows = [[corner, *columns], ["---"] * (df.shape[1] + 1), *([i, *row] for i, row in zip(df.index, df.to_numpy()))]
    return "\n".join(f"| {' | '.join('' if x is np.nan else str(x) for x in row)} |" for row in rows)


def tables() -> list[str]:
    "As Markdown: 17 plain layers by activation, plain networks by depth, networks with norms or shortcuts."
    df = read()
    by_depth = deep(df)[lambda d: d.init.isin(COMPARED) & (d.depth <= 100)]
    return [
        markdown(table(plain(df), "act"), "17 plain layers"),
        markdown(table(by_depth, ["act", "depth"]), "layers"),
        markdown(table(others(df), ["net", "depth"]), "norms or shortcuts"),
    ]


def main() -> None:
    found, cells = networks(read()), against(read())
    print(*tables(), sep="\n\n")
    print(f"\n{len(found)} networks, of which {found.fails.sum()} fail. Area under the ROC curve:\n{roc_auc(found)}\n")
    print(verdicts(found))
    gap, loss = 100 * (cells.best - cells["LSUV auto"]), 100 * (cells.LSUV - cells["LSUV auto"])
    print(f"\ninit=auto: within a point of the best in {(gap <= 1).mean():.0%} of {len(cells)} cells (median gap {gap.median():.1f}")
    print(f"points); worse than plain LSUV by more than two points in {(loss > 2).sum()}, by {loss.max():.1f} at most")


if __name__ == "__main__":
    main()
