"""GPUs: a spec, and the catalogue in devices/ (one JSON file per GPU; adding one is adding a file)."""
from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pkvsim.devices.outside_constants import OutsideEntry, read_outside
from pkvsim.devices.route_model import CalibratedRoute, RouteModel, read_route
from pkvsim.devices.selection_constants import SelectionEntry, read_selection
from pkvsim.memory.tiers import Tier, read_tier
from pkvsim.schedule.costs import default_costs

CATALOGUE = Path(__file__).parent / "catalogue"
STATUSES = ("datasheet", "calibrated", "estimated")
OTHER_MODELS = ("ti", "super", "laptop")  # words that make another GPU of a name


@dataclass(frozen=True, slots=True)
class NumberSource:
    """Where a number comes from: status is "datasheet", "calibrated" (measured) or "estimated"."""

    status: str
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class DeviceSpec:
    """One GPU. GB = 1e9 bytes, GiB = 2^30, MiB = 2^20, KiB = 2^10."""

    name: str
    label: str
    compute_capability: tuple[int, int]
    num_sms: int
    memory_gib: float
    l2_mib: float
    smem_per_sm_kib: float
    fp16_tflops: float  # dense FP16 tensor-core peak, summed in FP32
    peak_gb_s: float  # memory bandwidth on paper
    beta_gb_s: float  # memory bandwidth that a streaming read reaches
    launch_us: float  # fixed cost of a launch (lambda in the paper)
    min_ctas_per_sm: float  # CTAs per SM below which bandwidth is not reached (C_min in the paper)
    cta_read_gb_s: float  # what one CTA alone can read
    sources: dict[str, NumberSource]  # by field name, one for every number
    calibration: dict[str, CalibratedRoute] = field(default_factory=dict)  # by route; empty: a datasheet device
    # None where a file does not say, which for a rate means that the GPU has none.
    fp8_tflops: float | None = None  # dense FP8 tensor-core peak
    int8_tops: float | None = None  # dense INT8 tensor-core peak
    fp4_tflops: float | None = None  # dense FP4 tensor-core peak
    link_gb_s: float | None = None  # from one GPU of a host to another, one direction: NVLink, or PCIe without it
    link_us: float | None = None  # until a store to a peer's memory is seen there, one way
    host_read_gb_s: float | None = None  # from pinned host memory to the GPU, in one piece
    host_write_gb_s: float | None = None  # from the GPU to pinned host memory
    outside: dict[str, OutsideEntry] = field(default_factory=dict)  # by engine; see pkvsim.outside
    tiers: dict[str, Tier] = field(default_factory=dict)  # measured places of KV beyond the GPU, by name
    selection: SelectionEntry | None = None  # prices of selected pages; see pkvsim.devices.derive.selection_entry

    @property
    def routes(self) -> dict[str, RouteModel]:
        """The calibrated models by route; empty for a datasheet device (pkvsim.devices.derive estimates them)."""
        return {name: entry.model for name, entry in self.calibration.items()}

    def to_json(self) -> str:
        """The catalogue's file format, which `load_device` reads back."""
        known = NUMBER_FIELDS + tuple(name for name in OPTIONAL_FIELDS if getattr(self, name) is not None)
        numbers = {name: {"value": getattr(self, name)} | asdict(self.sources[name]) for name in known}
        data: dict[str, Any] = {"name": self.name, "label": self.label, "numbers": numbers}
        if self.calibration:
            data["routes"] = {name: entry.to_dict() for name, entry in self.calibration.items()}
        if self.outside:
            data["outside"] = {name: entry.to_dict() for name, entry in self.outside.items()}
        if self.tiers:
            data["tiers"] = {name: asdict(tier) for name, tier in self.tiers.items()}
        if self.selection is not None:
            data["selection"] = self.selection.to_dict()
        return json.dumps(data, indent=2, allow_nan=False) + "\n"


OPTIONAL_FIELDS = ("fp8_tflops", "int8_tops", "fp4_tflops", "link_gb_s", "link_us", "host_read_gb_s", "host_write_gb_s")
_NO_NUMBERS = ("name", "label", "sources", "calibration", "outside", "tiers", "selection", *OPTIONAL_FIELDS)
NUMBER_FIELDS = tuple(f.name for f in fields(DeviceSpec) if f.name not in _NO_NUMBERS)


def load_device(path: str | Path) -> DeviceSpec:
    """Reads one GPU's JSON file: an object, or an array of just one. ValueError naming the file and what is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read a device: {error.strerror}") from None
    except (RecursionError, ValueError) as error:  # not UTF-8, not JSON, nested too deeply, or a number of many digits
        raise ValueError(f"{path}: cannot read a device: {error}") from None
    if isinstance(data, list) and len(data) == 1:  # `pkvsim devices NAME --json` prints an array
        data = data[0]
    if not isinstance(data, dict) or not isinstance(data.get("numbers"), dict):
        raise ValueError(f"{path}: expected an object with name, label and numbers")
    for key in ("name", "label"):
        if not isinstance(data.get(key), str):
            raise ValueError(f"{path}: {key}: expected text, got {data.get(key)!r}")
    numbers = data["numbers"]
    odd = set(numbers) - set(OPTIONAL_FIELDS) ^ set(NUMBER_FIELDS)
    if odd:
        raise ValueError(f"{path}: numbers: missing or unknown: {', '.join(sorted(odd))}")
    values = {name: _number(f"{path}: {name}", name, numbers[name]) for name in numbers}
    sources = {name: NumberSource(entry["status"], entry["source"]) for name, entry in numbers.items()}
    routes = data.get("routes", {})
    if not isinstance(routes, dict):
        raise ValueError(f"{path}: routes: expected an object by route, got {routes!r}")
    costs = default_costs(values["compute_capability"])
    calibration = {
        name: read_route(f"{path}: routes.{name}", name, entry, costs=costs) for name, entry in routes.items()
    }
    entries = data.get("outside", {})
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: outside: expected an object by engine, got {entries!r}")
    outside = {name: read_outside(f"{path}: outside.{name}", entry) for name, entry in entries.items()}
    selection = None if "selection" not in data else read_selection(f"{path}: selection", data["selection"])
    return DeviceSpec(
        name=data["name"], label=data["label"], sources=sources, calibration=calibration, outside=outside,
        tiers=_tiers(path, data.get("tiers", {})), selection=selection, **values,
    )  # fmt: skip


def _tiers(path: str | Path, entries: Any) -> dict[str, Tier]:
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: tiers: expected an object by name, got {entries!r}")
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = read_tier(name, entry)
        except ValueError as error:
            raise ValueError(f"{path}: tiers.{name}: {error}") from None
    return found


def _number(where: str, name: str, entry: Any) -> Any:
    if not isinstance(entry, dict) or set(entry) != {"value", "status", "source"}:
        raise ValueError(f"{where}: expected value, status and source, got {entry!r}")
    if entry["status"] not in STATUSES or not isinstance(entry["source"], str) or not entry["source"]:
        raise ValueError(f"{where}: expected a status of {', '.join(STATUSES)} and a source, got {entry!r}")
    value = entry["value"]
    parts = value if name == "compute_capability" and isinstance(value, list) else [value]
    kinds = (int,) if name in ("compute_capability", "num_sms") else (int, float)
    wrong = [x for x in parts if isinstance(x, bool) or not isinstance(x, kinds)]
    if wrong or (name == "compute_capability" and len(parts) != 2):
        raise ValueError(f"{where}: expected a number, got {value!r}")
    if name == "compute_capability":
        return tuple(parts)
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{where}: expected a number > 0, got {value!r}")
    return value


def catalogue() -> dict[str, DeviceSpec]:
    """Every GPU that ships with the package, by name."""
    return {path.stem: load_device(path) for path in sorted(CATALOGUE.glob("*.json"))}


DEVICES = catalogue()


def get_device(name_or_path: str) -> DeviceSpec:
    """A GPU of the catalogue, or one from a JSON file of your own (a name that ends in .json)."""
    if name_or_path in DEVICES:
        return DEVICES[name_or_path]
    if str(name_or_path).endswith(".json"):
        return load_device(name_or_path)
    raise ValueError(
        f"device: expected one of {', '.join(DEVICES)} or the path of a .json file, got {name_or_path!r}"
    )


def device_named_by(gpu_name: str) -> str | None:
    """The catalogue's name of the GPU that a driver calls `gpu_name`, as in "NVIDIA GeForce RTX 3060"; None for others.

    Each part of a catalogue name must be one or more whole words of `gpu_name`, one after the other, so that an H200 is
    no H20. Of several that fit, the longest is meant.
    """
    # The module of SXM sockets is called "NVIDIA H100 80GB HBM3".
    words = re.findall(r"[a-z0-9]+", gpu_name.lower().replace("hbm3", "sxm"))
    spans = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    fitting = [name for name in DEVICES if all(part in spans for part in name.split("_"))
               and all(word in name for word in words if word in OTHER_MODELS)]
    return max(fitting, key=len, default=None)
