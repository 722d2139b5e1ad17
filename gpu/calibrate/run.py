"""Measures this GPU and writes the device file that pkvsim and the engine price routes by.

    python -m gpu.calibrate                       # the GPU's name.json, and its measurements beside it
    python -m gpu.calibrate -o mygpu.json --quick
    python -m gpu.calibrate --routes split,workqueue --device-base h200 --keep-host -o h200.json
    pkvsim replay --device mygpu.json

A few minutes. With --device-base what comes out is that device's file, in which the routes that were timed are fitted
anew. The measurements are written as they come: a run cut short loses none, and
`pkvsim fit --measurements mygpu.csv --device-base mygpu.json -o mygpu.json` fits what it left.

Decode attention alone is measured so. The rest of a machine is measured by

    python -m gpu.calibrate --tiers --help        # host memory and disks that KV may lie on, and the link to them
    python -m gpu.calibrate --outside --help      # prefill, matrix products and the rest of a model's step
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpu.measure.environment import environment, gpu_slug, lacks_gpu, write_json
from gpu.measure.memory import NoRoom
from gpu.measure.progress import note, tracked
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES

if TYPE_CHECKING:
    from gpu.calibrate.cells import CalibrationCell
    from gpu.calibrate.measure import Calibrator, StepTimes, Timed
    from pkvsim.fitting.measurements import Measurement

    Steps = dict[Timed, StepTimes]

POOL_GIB = 24.0  # the largest cells want two cold copies of 4 GiB of KV in half of it


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, help="the device file, by default the GPU's name.json")
    parser.add_argument("--measurements", type=Path, help="CSV of everything timed, by default beside the device file")
    parser.add_argument("--name", help="of the device, by default the device file's without .json")
    parser.add_argument("--routes", type=route_list, default=ROUTES, help=f"time only these of {', '.join(ROUTES)}")
    parser.add_argument(
        "--device-base",
        metavar="DEVICE",
        help="keep this device's own numbers and other routes: a name of `pkvsim devices`, or a .json file",
    )
    parser.add_argument(
        "--keep-host",
        action="store_true",
        help="keep the host's times of --device-base too, where this machine's host is not the one to predict",
    )
    parser.add_argument("--quick", action="store_true", help="about a fifth of the steps")
    parser.add_argument("--repeats", type=int, default=3, help="graph replays per timing")
    parser.add_argument("--pool-gib", type=float, help=f"K and V pages together, by default {POOL_GIB:g} or what fits")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop measuring after this long, and fit what there is"
    )
    parser.add_argument("--json", type=Path, help="write the constants, errors and environment here")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {args.repeats}")
    for name in ("pool_gib", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number > 0, got {value}")
    if args.keep_host and args.device_base is None:
        parser.error("--keep-host: expected a --device-base, whose host's times to keep")
    try:
        args.base = None if args.device_base is None else get_device(args.device_base)
    except ValueError as error:
        parser.error(f"--device-base: {error}")
    for name, suffix in (("out", ".json"), ("measurements", ".csv")):
        path = getattr(args, name)
        if path is not None and path.suffix != suffix:
            parser.error(f"--{name}: expected a file name that ends in {suffix}, got {path}")
    return args


def route_list(text: str) -> tuple[str, ...]:
    """Comma-separated routes."""
    routes = tuple(part.strip() for part in text.split(","))
    for route in routes:
        if route not in ROUTES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(ROUTES)}, got {route!r}")
    return routes


def time_steps(args: argparse.Namespace, calibrator: Calibrator, started: float) -> list[Steps]:
    """Whole steps of every cell, as far as half of --time-limit goes, in the order of calibration_cells."""
    from gpu.calibrate.cells import calibration_cells

    found: list[Steps] = []
    cells = calibration_cells(quick=args.quick)
    for done, cell in enumerate(tracked(cells, "whole steps", cell_name)):
        if args.time_limit is not None and time.perf_counter() - started > args.time_limit / 2:
            note(f"--time-limit: {len(cells) - done} of {len(cells)} whole steps left out")
            break
        try:
            found.append(calibrator.steps(cell))
        except NoRoom:
            found.append({})  # measure_cells names it
    return found


def measure_cells(
    args: argparse.Namespace, calibrator: Calibrator, steps: list[Steps], csv_path: Path, started: float
) -> list[Measurement]:
    """Times every cell's kernels, rewriting the CSV after each; steps: what time_steps gave."""
    from gpu.calibrate.cells import calibration_cells
    from pkvsim.fitting.measurements import write_measurements

    measurements: list[Measurement] = []
    cells = calibration_cells(quick=args.quick)
    for done, cell in enumerate(tracked(cells, "kernels", cell_name)):
        if args.time_limit is not None and time.perf_counter() - started > args.time_limit:
            note(f"--time-limit: {len(cells) - done} of {len(cells)} steps left out")
            break
        try:
            measurements += calibrator.measure(cell, steps[done] if done < len(steps) else None)
        except NoRoom as error:
            note(f"left out {cell_name(cell)}: {error}")
            continue
        partial = csv_path.with_name(csv_path.name + ".part")
        write_measurements(partial, measurements)
        partial.replace(csv_path)
    return measurements


def cell_name(cell: CalibrationCell) -> str:
    return f"{cell.shape.num_q_heads}/{cell.shape.num_kv_heads} {cell.group} x {len(cell.seq_lens)}"


def calibrate(args: argparse.Namespace) -> None:
    """The whole run: steps, constants, kernels, fit."""
    import torch

    from gpu.calibrate.constants import calibration_source, device_spec, measure_constants
    from gpu.calibrate.measure import Calibrator
    from gpu.measure.memory import budget, peak_line
    from gpu.measure.pools import BenchPool
    from gpu.measure.timing import StreamLimit, shared_stream
    from pkvsim.fitting.fit_device import fit_device
    from pkvsim.reports.table_replay import print_fit

    started = time.perf_counter()
    about = environment()
    out = args.out or Path(f"{gpu_slug(about['gpu'])}.json")
    csv_path = args.measurements or out.with_suffix(".csv")
    for path in (out, csv_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    note(", ".join(f"{key} {value}" for key, value in about.items()))
    granted = budget(POOL_GIB, args.pool_gib)
    note(str(granted))
    pool = BenchPool(pool_gib=granted.granted_gib, dtype=torch.float16, seed=20260622)
    limit = StreamLimit(pool.flat)
    calibrator = Calibrator(pool, limit, repeats=args.repeats, say=note, routes=args.routes)
    with shared_stream():
        steps = time_steps(args, calibrator, started)
    document: dict[str, object] = {"environment": about, "device": str(out), "measurements": str(csv_path)}
    base = args.base
    if base is None:
        constants = measure_constants(pool.flat, limit, quick=args.quick, say=lambda what: note(f"constants: {what}"))
        document["constants"] = dataclasses.asdict(constants)
        base = device_spec(constants, environment=about, name=args.name or out.stem)
    if not out.exists():
        out.write_text(base.to_json(), encoding="utf-8")  # for pkvsim fit, should this run be cut short
    if args.json is not None:
        write_json(args.json, document)
    with shared_stream():
        measurements = measure_cells(args, calibrator, steps, csv_path, started)
    note(f"{len(measurements)} timings in {csv_path}, {time.perf_counter() - started:.0f} s; fitting")
    source = f"{len(measurements)} timings by {calibration_source(about)}"
    fitted, skipped = fit_device(base, measurements, source=source, date=about["date"][:10], keep_host=args.keep_host,
                                 name=args.name)
    out.write_text(fitted.to_json(), encoding="utf-8")
    routes = {m.route for m in measurements} - set(skipped)
    print_fit(fitted, routes, skipped)
    if args.json is not None:
        document["timings"] = len(measurements)
        document["routes"] = {route: fitted.calibration[route].to_dict() for route in sorted(routes)}
        document["left_out"] = {
            f"{route} {shape.num_q_heads}/{shape.num_kv_heads}": why
            for (route, shape), why in calibrator.unavailable.items()
        }
        document["seconds"] = time.perf_counter() - started
        write_json(args.json, document)
    note(f"wrote {out}, {time.perf_counter() - started:.0f} s; {peak_line()}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if lacks_gpu("calibration"):
        return 1
    try:
        calibrate(args)
    except NoRoom as error:
        print(f"gpu.calibrate: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
