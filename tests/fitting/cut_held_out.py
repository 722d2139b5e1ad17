"""Makes held_out/HASH.csv, which test_held_out.py holds the model to, of what a serving run measured.

    python examples/serving_trace.py --exhaustive --stride 8 ... --json steps.json
    python tests/fitting/cut_held_out.py steps.json --every 3

HASH is of the kernel sources that ran. --every N keeps the N-th of each N steps, counted over the whole run.
"""
from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pkvsim.devices.route_model import ROUTES

FOLDER = Path(__file__).with_name("held_out")
STEP = ("num_kv_heads", "family", "seed", "max_active", "step")
CLOCKS = ("event_us", "wall_us")
COLUMNS = (*STEP, *(f"{route}_{clock}" for route in ROUTES for clock in CLOCKS))


def rows(document: dict, every: int) -> Iterator[dict[str, object]]:
    """The kept steps of serving_trace's --json by COLUMNS; empty where a route did not run."""
    stride, count = int(document["options"]["stride"]), 0
    for run in document["runs"]:
        about = {name: run[name] for name in STEP[1:4]} | {"num_kv_heads": run["shape"]["num_kv_heads"]}
        for index in range(len(run["active"])):
            count += 1
            if count % every:
                continue
            ran = [(route, clock) for route in ROUTES if route in run["engines"] for clock in CLOCKS]
            times = {f"{route}_{clock}": round(run["engines"][route][clock][index], 1) for route, clock in ran}
            yield dict.fromkeys(COLUMNS, "") | about | {"step": index * stride} | times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path, help="serving_trace's --json, of one layer a plan")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="keep every N-th step (1)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where HASH.csv goes")
    args = parser.parse_args(argv)
    if args.every < 1:
        parser.error(f"--every: expected at least 1, got {args.every}")
    try:
        document = json.loads(args.steps.read_text(encoding="utf-8"))
        layers = document["options"]["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"steps: expected a JSON document of serving_trace, got {args.steps} "
                     f"({type(error).__name__}: {error})")
    if layers != "1":
        parser.error(f"steps: expected one layer a plan, got {layers}")
    path = args.folder / f"{document['environment']['source_hash'][:8]}.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(document, args.every))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
