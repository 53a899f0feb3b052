"Verdicts as CSV, as a Markdown table, and as the summary in `docs/layers.md`."

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from .verdict import COLUMNS, Verdict

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- architectures: written by python tests/conformance -->", "<!-- /architectures -->"


def sources(family: Path) -> str:
    "What a verdict depends on: a hash of the package, the audit, and the file that lists the family."
    judges = [
        ROOT / "tests" / name for name in ("audit.py", "checks.py", "conformance/verdict.py", "conformance/inputs.py")
    ]
    files = [*sorted(ROOT.glob("fastai_lsuv/*.py")), *judges, family]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


def append(path: Path, verdict: Verdict, sources: str):
    "One more row, at once: a run that is cut off loses nothing."
    row = asdict(verdict) | {
        "skipped": json.dumps(verdict.skipped),
        "faults": json.dumps(verdict.faults),
        "sources": sources,
    }
    pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)


def read(path: Path, sources: dict[str, str]) -> list[Verdict]:
    "The verdicts in a CSV file on architectures whose `sources`, by path, are the same as when they were found."
    if not path.exists():
        return []
    frame = pd.read_csv(path, keep_default_na=False)
    same = [sources.get(f"{row.family}/{row.name}") == row.sources for row in frame.itertuples(index=False)]
    rows = frame[same][COLUMNS].to_dict("records")
    return [Verdict(**row | {k: json.loads(row[k]) for k in ("skipped", "faults")}) for row in rows]


def markdown(verdicts) -> str:
    "All architectures, one a line."
    lines = [
        "# Every architecture",
        "",
        f"**{headline(verdicts)}**",
        "",
        "Written by `python tests/conformance`; [this page](../docs/layers.md#every-architecture) says what is tried.",
        "",
    ]
    lines += table(
        [
            "verdict",
            "architecture",
            "layers",
            "right",
            "mean kept",
            "skipped, by reason",
            "passes",
            "parameters",
            "model",
            "what is wrong",
        ],
        [
            [
                v.outcome,
                f"{v.family}: {v.name}",
                v.layers,
                v.right,
                v.mean_kept,
                reasons(v.skipped),
                v.passes,
                f"{v.parameters / 1e6:.2f} M",
                v.model,
                v.faults[0] + f" and {len(v.faults) - 1} more" * (len(v.faults) > 1) if v.faults else "",
            ]
            for v in verdicts
        ],
    )
    return "\n".join(lines) + "\n"


def summary(verdicts) -> str:
    "A line for each family, and one for all."
    groups = {
        family: [v for v in verdicts if v.family == family] for family in dict.fromkeys(v.family for v in verdicts)
    }
    rows = [[family, *_counts(group)] for family, group in groups.items()]
    header = ["family", "architectures", "right", "layers", "right", "skipped, by reason"]
    lines = [f"**{headline(verdicts)}**", "", *table(header, [*rows, ["all", *_counts(verdicts)]])]
    return "\n".join(lines)


def headline(verdicts) -> str:
    right, layers = sum(v.outcome == "right" for v in verdicts), sum(v.layers for v in verdicts)
    at_target = sum(v.right for v in verdicts)
    return (
        f"{right} of {len(verdicts)} architectures right: of {layers:,} layers {at_target:,} at their target, "
        f"{sum(sum(v.skipped.values()) for v in verdicts):,} left alone and named with a reason that is true"
    )


def _counts(verdicts):
    skipped = sum((Counter(v.skipped) for v in verdicts), Counter())
    return [
        len(verdicts),
        sum(v.outcome == "right" for v in verdicts),
        f"{sum(v.layers for v in verdicts):,}",
        f"{sum(v.right for v in verdicts):,}",
        reasons(skipped),
    ]


def reasons(skipped):
    return ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items(), key=lambda item: -item[1]))


def table(header, rows):
    "Lines of a Markdown table."
    cells = [
        [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        for row in [header, ["---"] * len(header), *rows]
    ]
    return [f"| {' | '.join(row)} |" for row in cells]


def put_into(page: Path, text: str):
    "Replace what is between the two marks."
    before, mark, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    if not mark or END not in rest:
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
