"""Writes tests/gpu/record.json: which sources passed the GPU tests, where, and how fast they were.

    python -m pytest tests/gpu -n 8 --junit-xml gpu.xml
    python examples/bench_decode.py --json bench.json
    python -m tests.gpu.record --bench bench.json --junit gpu.xml --out tests/gpu/record.json
"""
from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import sys
import xml.etree.ElementTree as ElementTree

from gpu.kernels.compile import source_hash


def count_tests(junit: pathlib.Path) -> dict[str, int]:
    """Totals over the suites of a junit file."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    totals = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    totals["passed"] = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=pathlib.Path, required=True, help="what bench_decode wrote with --json")
    parser.add_argument("--junit", type=pathlib.Path, required=True, help="what pytest wrote with --junit-xml")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("record.json"))
    args = parser.parse_args()
    bench = json.loads(args.bench.read_text())
    tests = count_tests(args.junit)
    if tests["failures"] or tests["errors"] or not tests["passed"]:
        print(f"record: expected a run with every test passed, got {tests}", file=sys.stderr)
        return 1
    if bench["environment"]["source_hash"] != source_hash():
        print("record: the benchmark ran other sources than these", file=sys.stderr)
        return 1
    environment = bench["environment"]
    fields = ("case", "batch_size", "num_q_heads", "num_kv_heads", "route", "kernel_us", "limit_us", "note")
    record = {
        "source_hash": source_hash(),
        "gpu": environment["gpu"],
        "driver": environment["driver"],
        "versions": {"python": platform.python_version(),
                     **{name: environment[name] for name in ("torch", "cuda", "cupy", "flashinfer")}},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "tests": tests,
        "command": environment["command"],
        "summary": bench["summary"],
        "timings": [{name: result[name] for name in fields} for result in bench["results"]],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}: {tests['passed']} tests passed, {len(record['timings'])} timings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
