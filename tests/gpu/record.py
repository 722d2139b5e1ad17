"""Writes tests/gpu/record.json: which sources passed the GPU tests, where, as which cards, and how fast they were.

    python -m pytest tests/gpu -n 8 --junit-xml gpu.xml
    python -m pytest tests/gpu -n 8 --card rtx3060 --junit-xml card.xml
    python examples/bench_decode.py --json bench.json
    python -m tests.gpu.record --bench bench.json --junit gpu.xml card.xml

tests/gpu/run_all.sh does all four. `python -m tests.support.proven` then adds the hashes of the code that was proven, by
which the record still stands after changes that leave it.
"""
from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection

from gpu.kernels.compile import SOURCE_DIR, source_hash

ITSELF = "itself"  # the run that plays no card
CARDS = ("rtx3060",)  # that the tests must have passed as, beside the GPU at hand
FIELDS = ("case", "batch_size", "num_q_heads", "num_kv_heads", "route", "kernel_us", "limit_us", "note")  # of a timing
COUNTS = ("tests", "failures", "errors", "skipped")


def read_run(junit: pathlib.Path) -> tuple[str, dict[str, object]]:
    """(the card, or ITSELF; the sources' hash and the totals over the suites) of a junit file of pytest tests/gpu.

    Raises ValueError naming the file where it does not say what ran.
    """
    root = ElementTree.parse(junit).getroot()
    told = {entry.get("name"): entry.get("value") for entry in root.iter("property")}
    if "source_hash" not in told or "card" not in told:
        raise ValueError(f"{junit}: expected the properties source_hash and card, which tests/gpu/conftest.py writes")
    found: dict[str, object] = {"source_hash": told["source_hash"]}
    suites = list(root.iter("testsuite"))
    found |= {name: sum(int(suite.get(name, 0)) for suite in suites) for name in COUNTS}
    found["passed"] = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
    return told["card"] or ITSELF, found


def wrong(record: dict, sources: str, kernels: Collection[str]) -> list[str]:
    """What keeps a record from standing for the sources of that hash, in sentences. kernels: the .cu files among them.

    A record of other sources stands for those whose machine code is what it was, which tests/kernels compares, and says
    of every other that it is unproven, and why.
    """
    found = []
    if record.get("source_hash") != sources:
        proven = {name.split()[0] for name in record.get("code", {}).get("kernels", ())}
        unproven = set(record.get("unproven", ()))
        if not proven:
            found.append("its runs are of other sources")
        found += [f"{name} is neither of proven code nor named as unproven" for name in
                  sorted(set(kernels) - proven - unproven)]
        found += [f"{name} is named as unproven, and is not there" for name in sorted(unproven - set(kernels))]
    elif record.get("unproven"):
        found.append("it names sources as unproven that its runs had")
    runs = record.get("runs", {})
    for name in (ITSELF, *CARDS):
        run = runs.get(name)
        if run is None:
            found.append(f"no run of tests/gpu {'as the GPU at hand' if name == ITSELF else f'--card {name}'}")
        elif run["source_hash"] != record.get("source_hash"):
            found.append(f"the run {name} is of other sources")
        elif run["failures"] or run["errors"] or not run["passed"]:
            found.append(f"the run {name} did not pass: {run}")
    if not record.get("timings"):
        found.append("no timings")
    return found


def kernel_files() -> list[str]:
    return sorted(path.name for path in SOURCE_DIR.glob("*.cu"))


def make_record(bench: dict, runs: dict[str, dict]) -> dict:
    """The record of what bench_decode wrote and of the runs by card."""
    environment = bench["environment"]
    return {
        "source_hash": environment["source_hash"],
        "gpu": environment["gpu"],
        "driver": environment["driver"],
        "versions": {"python": platform.python_version(),
                     **{name: environment[name] for name in ("torch", "cuda", "cupy", "flashinfer")}},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "runs": runs,
        "command": environment["command"],
        "summary": bench["summary"],
        "timings": [{name: result[name] for name in FIELDS} for result in bench["results"]],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=pathlib.Path, required=True, help="what bench_decode wrote with --json")
    parser.add_argument("--junit", type=pathlib.Path, required=True, nargs="+",
                        help="what pytest wrote with --junit-xml, of every run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("record.json"))
    args = parser.parse_args(argv)
    try:
        record = make_record(json.loads(args.bench.read_text()), dict(read_run(path) for path in args.junit))
    except (OSError, ValueError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    found = wrong(record, source_hash(), kernel_files())
    if found:
        print(f"record: not written: {'; '.join(found)}", file=sys.stderr)
        return 1
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    passed = ", ".join(f"{run['passed']} tests passed as {name}" for name, run in record["runs"].items())
    print(f"wrote {args.out}: {passed}, {len(record['timings'])} timings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
