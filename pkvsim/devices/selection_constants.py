"""The constants that price the selection of pages on one GPU, and their place in a device file."""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pkvsim.devices.outside_constants import check_head
from pkvsim.devices.route_model import FitError, read_error

STATUSES = ("fitted", "assumed")


class SelectionConstants(NamedTuple):
    """Of one layer. What is relative is so to the balanced route's model of the same GPU."""

    select_us: float  # of a selecting launch whatever its size: until the first summary, and a short list
    score_share: float  # of RouteModel.bandwidth_gb_s, at which summaries in 16 bits are scored
    coded_share: float  # and at which those in 8-bit codes are
    page_us: float  # for every page of the longest list, from which one CTA selects
    attend_us: float  # of attention over lists, above a plain step of rows of these lengths
    attend_share: float  # of the speed of such a step
    gap_us: float  # between a selecting launch and the attention that waits for its lists
    keep_us: float  # of the launch that summarises the pages of new tokens
    keep_list_us: float  # of that, for every (row, KV head)
    keep_coded_us: float  # of that, more where summaries are made into 8-bit codes
    run_us: float  # host time of issuing a selecting launch
    list_us: float = 0.0  # of every wave of lists after the first, two CTAs an SM; 0 where a file does not say it


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionEntry:
    """The constants of one GPU, and where they come from."""

    constants: SelectionConstants
    status: str  # one of STATUSES
    source: str  # the measurements, their command and date
    date: str  # of the fit, YYYY-MM-DD
    cells: tuple[str, ...]  # steps that the constants were fitted to, as rows x tokens at a budget
    in_sample: FitError | None = None  # of selecting, attending and both on those cells
    held_out: FitError | None = None  # of fits that had not seen the cell, on it

    def to_dict(self) -> dict[str, Any]:
        """The device file's format, which `read_selection` reads back."""
        data: dict[str, Any] = {"status": self.status, "source": self.source, "date": self.date}
        for name in ("in_sample", "held_out"):
            if getattr(self, name) is not None:
                data[name] = asdict(getattr(self, name))
        return data | {"cells": list(self.cells), "constants": self.constants._asdict()}


def read_selection(where: str, entry: Any) -> SelectionEntry:
    """`selection` of a device file; ValueError that starts with `where` and names the field."""
    if not isinstance(entry, dict) or not isinstance(entry.get("constants"), dict):
        raise ValueError(f"{where}: expected an object with status, source, date, cells and constants, got {entry!r}")
    check_head(where, entry, set(SelectionEntry.__dataclass_fields__), STATUSES)
    cells = entry.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, str) for cell in cells):
        raise ValueError(f"{where}.cells: expected a list of texts, got {cells!r:.80}")
    given, known = set(entry["constants"]), set(SelectionConstants._fields)
    odd = (known - set(SelectionConstants._field_defaults) - given) | (given - known)
    if odd:
        raise ValueError(f"{where}.constants: missing or unknown: {', '.join(sorted(odd))}")
    constants = {name: _number(f"{where}.constants.{name}", value) for name, value in entry["constants"].items()}
    for name in ("score_share", "coded_share", "attend_share"):
        if constants[name] == 0:
            raise ValueError(f"{where}.constants.{name}: expected a number > 0, got 0")
    errors = {name: read_error(f"{where}.{name}", entry[name]) for name in ("in_sample", "held_out") if name in entry}
    return SelectionEntry(
        constants=SelectionConstants(**constants), status=entry["status"], source=entry["source"], date=entry["date"],
        cells=tuple(cells), **errors,
    )  # fmt: skip


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{where}: expected a finite number >= 0, got {value!r}")
    return float(value)
