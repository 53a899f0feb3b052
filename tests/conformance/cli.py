"The command line of the conformance run."

from __future__ import annotations

import argparse
import fnmatch
import os
from pathlib import Path

from fastprogress import progress_bar

from . import tables
from .runner import architectures, judge_apart, sources

OUT = tables.ROOT / "nbs" / "architectures"


def main() -> int:
    args = _arguments()
    everything = architectures()
    paths = [
        p for p in everything if not args.patterns or any(fnmatch.fnmatch(p, pattern) for pattern in args.patterns)
    ]
    if not paths:
        raise SystemExit(
            f"{' '.join(args.patterns)!r} matches none of {len(everything)} architectures; --list shows them"
        )
    if args.list:
        print("\n".join(paths))
    else:
        return _run(paths, args, whole=len(paths) == len(everything))
    return 0


def _arguments():
    parser = argparse.ArgumentParser(prog="python tests/conformance", description=__doc__)
    parser.add_argument(
        "patterns", nargs="*", help="only these, such as 'timm/*'; the tables are then printed, not written"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the CSV file that were found with the same code"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help="where to write, without .csv and .md; `docs/layers.md` only along with %(default)s",
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one architecture")
    parser.add_argument("--memory", type=float, default=8, help="GB for one architecture (on Linux)")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    return parser.parse_args()


def _run(paths, args, whole) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be downloaded
    csv, code = args.out.with_suffix(".csv"), sources()
    done = {f"{v.family}/{v.name}": v for v in (tables.read(csv, code) if args.resume else [])}
    if whole:
        _begin(csv, done.values(), code)
    bar = progress_bar([p for p in paths if p not in done])
    for path in bar:
        bar.comment = path
        verdict = done[path] = judge_apart(path, args.timeout, args.memory)
        if whole:
            tables.append(csv, verdict, code[path])
        if verdict.outcome != "right":
            print(f"\n{path}: {verdict.outcome}: {'; '.join(verdict.faults[:4])}", flush=True)
    verdicts = [done[p] for p in paths]
    if whole:
        args.out.with_suffix(".md").write_text(tables.markdown(verdicts), encoding="utf-8")
        if args.out == OUT:
            tables.put_into(tables.ROOT / "docs" / "layers.md", tables.summary(verdicts))
    print(tables.summary(verdicts) if whole else tables.markdown(verdicts))
    return int(any(v.outcome != "right" for v in verdicts))


def _begin(csv, kept, code):
    "The CSV file with the rows that are kept."
    csv.unlink(missing_ok=True)
    for v in kept:
        tables.append(csv, v, code[f"{v.family}/{v.name}"])
