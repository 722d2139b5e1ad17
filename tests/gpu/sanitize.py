"""One small checked step of every schedule, option, layout, type of cache and kind of append, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitize
    compute-sanitizer --tool memcheck python -m tests.gpu.sanitize "csr and last pages" "append int8 half"
    compute-sanitizer --tool racecheck python -m tests.gpu.sanitize --racecheck --only decode
    python -m tests.gpu.sanitize --list

Each check is meant to end within two minutes under the sanitizer. racecheck does not see that __syncwarp orders the
lanes' writes before one lane's arrival at a barrier; with --racecheck the kernels are compiled such that every lane
arrives (PKV_RACECHECK in cuda_src/variant.cuh).
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable

from tests.gpu.sanitize_checks import checks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CHECK", help="those to run, of --list; by default all")
    parser.add_argument("--list", action="store_true", help="print the checks' names and stop")
    parser.add_argument("--only", choices=("decode", "append"), help="leave out the others")
    parser.add_argument("--racecheck", action="store_true", help="compile for the sanitizer's racecheck")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in checks()]
    if unknown:
        parser.error(f"CHECK: expected some of --list, got {', '.join(map(repr, unknown))}")
    return args


def chosen(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    every = checks()
    names = args.names or every
    return {name: every[name] for name in names
            if args.only is None or name.startswith("append") == (args.only == "append")}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print("\n".join(chosen(args)))
        return 0
    if any(importlib.util.find_spec(module) is None for module in ("torch", "cupy")):
        print("sanitize needs a CUDA GPU with CuPy and PyTorch", file=sys.stderr)
        return 1
    if args.racecheck:
        from gpu.kernels.variant import KernelConfig

        without = KernelConfig.defines
        KernelConfig.defines = lambda config: without(config) | {"PKV_RACECHECK": 1}
    for name, check in chosen(args).items():
        start = time.perf_counter()
        check()
        print(f"{name}: ok, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
