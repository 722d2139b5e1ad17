"""Writes tests/gpu/record.json: which sources passed the GPU tests, where, and how fast they were.

    python -m pytest tests/gpu -n 8 --junit-xml gpu.xml
    python examples/bench_decode.py --json bench.json
    python -m tests.gpu.record --bench bench.json --junit gpu.xml --out tests/gpu/record.json
"""
from __future__ import annotations

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from gpu.kernels import source_hash


# Files of tests around the kernels (operators, Transformers): what they find is recorded and does not decide.
AROUND = ("test_gpu_torch_op", "test_gpu_transformers")
LOST_CONTEXT = "device-side assert triggered"  # a test before it, in the same process, killed the CUDA context


def count_tests(junit: pathlib.Path) -> dict[str, dict]:
    """Totals of a junit file, {"tests": of the kernels, "around": of AROUND}, with the names of what did not pass.

    A test whose set-up found the CUDA context lost has not run: it is named, and counts neither way.
    """
    counted = {group: {"passed": 0, "failures": 0, "errors": 0, "skipped": 0, "not_passed": [], "not_run": []}
               for group in ("tests", "around")}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        totals = counted["around" if module in AROUND else "tests"]
        outcome = next((name for name in ("failure", "error", "skipped") if case.find(name) is not None), None)
        name = f"{module}::{case.get('name')}"
        if outcome is None or outcome == "skipped":
            totals["passed" if outcome is None else "skipped"] += 1
        elif outcome == "error" and LOST_CONTEXT in case.find("error").get("message", ""):
            totals["not_run"].append(name)
        else:
            totals["failures" if outcome == "failure" else "errors"] += 1
            totals["not_passed"].append(name)
    return counted


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=pathlib.Path, required=True, help="what bench_decode wrote with --json")
    parser.add_argument("--junit", type=pathlib.Path, required=True, help="what pytest wrote with --junit-xml")
    parser.add_argument("--driver", help="the GPU's driver, where this is not the machine that ran the tests")
    parser.add_argument("--python", default=platform.python_version(), help="likewise its Python")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("record.json"))
    args = parser.parse_args()
    bench = json.loads(args.bench.read_text())
    counted = count_tests(args.junit)
    tests = counted["tests"]
    if tests["failures"] or tests["errors"] or not tests["passed"]:
        print(f"record: expected every test of the kernels to pass, got {tests}", file=sys.stderr)
        return 1
    if bench["environment"]["source_hash"] != source_hash():
        print("record: the benchmark ran other sources than these", file=sys.stderr)
        return 1
    environment = bench["environment"]
    fields = ("case", "batch_size", "num_q_heads", "num_kv_heads", "route", "kernel_us", "limit_us", "note")
    record = {
        "source_hash": source_hash(),
        "gpu": environment["gpu"],
        "driver": args.driver or driver(),
        "versions": {"python": args.python,
                     **{name: environment[name] for name in ("torch", "cuda", "cupy", "flashinfer")}},
        "date": environment["date"][:10],
        **counted,
        "command": bench["command"],
        "summary": bench["summary"],
        "timings": [{name: result[name] for name in fields} for result in bench["results"]],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}: {tests['passed']} tests passed, {len(record['timings'])} timings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
