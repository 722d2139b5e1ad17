"""What one decode step is on every route: figures, and what bounds each."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import RouteModel
from pkvsim.devices.selection_constants import SelectionEntry
from pkvsim.options import AttentionOptions
from pkvsim.policy.selecting import LayerPrices
from pkvsim.pricing.counters import distinct_kv_bytes, useful_kv_bytes
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.selection.setup import SelectionSetup
from pkvsim.shapes import DecodeShape
from pkvsim.timeline.time_split import TimeSplit
from pkvsim.timeline.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouteStep:
    """One layer of the step on one route."""

    route: str
    status: str  # "calibrated" or "estimated"
    model: RouteModel
    timeline: Timeline
    closed_us: float  # kernel time by the closed form
    step_us: float  # of all layers by the closed form, the host's part included: what the calibrated policy compares
    timeline_step_us: float  # the same by the timeline: what the oracle compares
    host_us: float  # of step_us, what the wall clock sees beside the GPU: planning, issuing, synchronising
    launches: int
    splits: tuple[int, int]  # fewest and most of a row that has tokens
    used_slots: int
    busy_share: float  # of num_slots * makespan, in which a task runs
    longest_task: int | None  # index into timeline.schedule.tasks
    saturated_by: str  # what the most that all CTAs read is due to: "memory", "L2", "memory and L2" or "arithmetic"
    split: TimeSplit
    read_gb_s: float | None = None  # what one CTA keeps up with in a read for several rows; None: there are none

    @property
    def timeline_us(self) -> float:
        """Kernel time by the timeline."""
        return self.timeline.makespan_us

    def longest_task_us(self) -> float:
        """How long the longest task ran; 0 without tasks."""
        at = self.longest_task
        return 0.0 if at is None else float(self.timeline.end_us[at] - self.timeline.start_us[at])

    def why(self) -> str:
        """What bounds the route, in a line."""
        share = getattr(self.split, f"{self.split.bound}_us") / self.timeline_us if self.timeline_us else 0.0
        line = self.timeline
        speeds = f"{line.num_slots:,} CTA slots of {line.cta_gb_s:.3g} GB/s against {line.shared_gb_s:,.0f} GB/s"
        words = {
            "bandwidth": f"{self.saturated_by} bandwidth, {line.shared_gb_s:,.0f} GB/s",
            "compute": f"compute: the SMs' arithmetic keeps up with {line.shared_gb_s:,.0f} GB/s of KV"
            if self.read_gb_s is None
            else f"compute: in a read for several rows a CTA keeps up with {self.read_gb_s:,.0f} GB/s",
            "cta_rate": f"a single CTA's rate: {self.used_slots:,} of {speeds}",
            "tail": f"tail: slots run dry while the longest task takes {self.longest_task_us():,.1f} us",
            "task_starts": f"task starts: {len(line.schedule.tasks):,} tasks' fixed cost on {self.used_slots:,} slots",
            "launches": f"launching: the ramp-up of {self.launches} launches" if self.launches > 1 else "the launch",
            "merge": f"merging {line.schedule.num_partial_tasks:,} partial states",
            "select": "scoring and selecting pages",
        }[self.split.bound]
        return f"{words} ({share:.0%} of the time)"

    def to_dict(self) -> dict[str, Any]:
        """What `pkvsim step --json` prints of a route."""
        line, at = self.timeline, self.longest_task
        longest: dict[str, float] | None = None
        if at is not None:
            task = line.schedule.tasks[at]
            longest = {name: int(task[name]) for name in ("row", "kv_head", "split")}
            longest.update(us=self.longest_task_us(), kv_bytes=int(line.bytes[at]))
        return {
            "status": self.status,
            "closed_us": self.closed_us,
            "timeline_us": self.timeline_us,
            "step_us": self.step_us,
            "timeline_step_us": self.timeline_step_us,
            "host_us": self.host_us,
            "launches": self.launches,
            "splits": list(self.splits),
            "tasks": len(line.schedule.tasks),
            "ctas": line.schedule.num_ctas if len(line.schedule.tasks) else 0,
            "slots": line.num_slots,
            "used_slots": self.used_slots,
            "busy_share": self.busy_share,
            "longest_task": longest,
            "cta_gb_s": line.cta_gb_s,
            "shared_gb_s": line.shared_gb_s,
            "bound": self.split.bound,
            "why": self.why(),
            "shared_reads": 0 if line.schedule.shared is None else len(line.schedule.shared.reads),
            "time_us": asdict(self.split),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSelection:
    """One layer that selects beside the dense one, both by the balanced route, and what its prices stand on."""

    setup: SelectionSetup
    layer: LayerPrices
    entry: SelectionEntry
    listed_bytes: int  # of K and V that a layer reads over lists
    scored_bytes: int  # of summaries that a selecting launch reads
    summary_share: float  # of a page's K and V bytes, what its summary takes of the memory beside them
    least_tokens: int | None  # from which on as many equally long rows select; None: never

    def to_dict(self) -> dict[str, Any]:
        """`selection` of `pkvsim step --json`."""
        return self.setup.to_dict() | self.layer.to_dict() | {
            "listed_bytes": self.listed_bytes, "scored_bytes": self.scored_bytes, "summary_share": self.summary_share,
            "least_tokens": self.least_tokens, "prices": self.entry.status, "source": self.entry.source,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepReport:
    """A step on every route asked for, in the order of ROUTES."""

    shape: DecodeShape
    seq_lens: np.ndarray  # [batch_size] int32
    device: DeviceSpec
    layers: int
    options: AttentionOptions  # of every layer's attention
    taken: str  # the cheapest by the closed form, planning included: what the calibrated policy does
    reason: str
    routes: tuple[RouteStep, ...]
    groups: PrefixGroups | None = None  # rows that share leading pages
    selection: StepSelection | None = None  # of a step that may read selected pages, one of the routes

    @property
    def distinct_bytes(self) -> int:
        """K and V bytes of a layer, those that rows share counted once."""
        if self.groups is None:
            return useful_kv_bytes(self.shape, self.seq_lens, self.options)
        return distinct_kv_bytes(self.shape, self.seq_lens, self.groups, self.options)

    def to_dict(self) -> dict[str, Any]:
        """The object that `pkvsim step --json` prints."""
        return {
            "device": self.device.name,
            "shape": asdict(self.shape),
            "seq_lens": self.seq_lens.tolist(),
            "kv_bytes": useful_kv_bytes(self.shape, self.seq_lens, self.options),
            "distinct_kv_bytes": self.distinct_bytes,
            "shared": [] if self.groups is None else [
                {"rows": np.flatnonzero(self.groups.group_of_row == group).tolist(), "prefix_tokens": pages}
                for group, pages in enumerate((self.groups.prefix_pages * self.shape.page_size).tolist())
            ],
            "layers": self.layers,
            "options": asdict(self.options),
            "selection": None if self.selection is None else self.selection.to_dict(),
            "taken": self.taken,
            "reason": self.reason,
            "routes": {route.route: route.to_dict() for route in self.routes},
        }
