"""What the figures of a run stand on: for every quantity whether it was measured, fitted, read or assumed."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pkvsim.devices.derive import all_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.models.presets import ModelSpec
from pkvsim.serving.server_config import ServingConfig

# measured: on this GPU; fitted: constants fitted to measurements of it; estimated: carried over from another GPU;
# datasheet: the maker's figure; computed: arithmetic on the model's config; assumed: nobody measured it.
BASES = ("measured", "fitted", "estimated", "datasheet", "computed", "assumed")
_OF_STATUS = {"calibrated": "measured", "datasheet": "datasheet", "estimated": "estimated"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What one quantity stands on."""

    quantity: str
    basis: str  # one of BASES
    source: str
    error_percent: float | None = None  # mean, on measurements that the fit has not seen where there are any
    time_share: float | None = None  # of the time that the GPU is busy, what this quantity decides

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def attention_basis(device: DeviceSpec, routes: Iterable[str]) -> tuple[Basis, ...]:
    """Decode attention on these routes of a GPU."""
    known = all_routes(device)
    rows = []
    for route in routes:
        entry = known[route]
        fitted = entry.status == "calibrated"
        error = (entry.held_out or entry.in_sample) if fitted else None
        rows.append(
            Basis(
                quantity=f"decode attention, {route}",
                basis="fitted" if fitted else "estimated",
                source=entry.source,
                error_percent=None if error is None else error.mean_percent,
            )
        )
    return tuple(rows)


def serving_basis(
    model: ModelSpec, device: DeviceSpec, config: ServingConfig, *, routes: Iterable[str],
    shares: dict[str, float | None],
) -> tuple[Basis, ...]:  # fmt: skip
    """Every quantity that a serving run rests on. shares: the summary's *_share."""
    attention = attention_basis(device, routes)
    if len(attention) == 1:
        (only,) = attention
        attention = (
            Basis(
                quantity=only.quantity, basis=only.basis, source=only.source, error_percent=only.error_percent,
                time_share=shares.get("attention_share"),
            ),
        )  # fmt: skip
    bandwidth, peak, memory = (device.sources[name] for name in ("beta_gb_s", "fp16_tflops", "memory_gib"))
    return (
        *attention,
        Basis(
            quantity="matrix products and other layers in decode",
            basis="assumed",
            source=f"roofline of {device.beta_gb_s:g} GB/s and {config.compute_efficiency:.0%} of the FP16 peak",
            time_share=shares.get("rest_share"),
        ),
        Basis(
            quantity="prefill",
            basis="assumed",
            source=f"{config.compute_efficiency:.0%} of the FP16 peak in matrix products, "
            f"{config.prefill_attention_efficiency:.0%} in attention",
            time_share=shares.get("prefill_share"),
        ),
        Basis(quantity="memory bandwidth", basis=_OF_STATUS[bandwidth.status], source=bandwidth.source),
        Basis(quantity="FP16 peak", basis=_OF_STATUS[peak.status], source=peak.source),
        Basis(quantity="memory size", basis=_OF_STATUS[memory.status], source=memory.source),
        Basis(quantity="weights and KV bytes", basis="computed", source=model.source),
        Basis(
            quantity="memory left to KV pages",
            basis="computed" if config.kv_gib is not None else "assumed",
            source="given" if config.kv_gib is not None else
            f"{config.memory_fraction:.0%} of the memory less weights and {config.workspace_gib:g} GiB of workspace",
        ),
        Basis(
            quantity="host time of a step beside attention",
            basis="assumed",
            source=f"{config.host_us:g} us",
        ),
    )  # fmt: skip


def basis_note(rows: Iterable[Basis]) -> str:
    """What decides the run's time, in a line."""
    parts = []
    for row in rows:
        if row.time_share is None and not row.quantity.startswith("decode attention"):
            continue
        share = "" if row.time_share is None else f" ({row.time_share:.0%} of the time)"
        error = "" if row.error_percent is None else f", {row.error_percent:.1f} % from measurements"
        parts.append(f"{row.quantity}{share} {row.basis}{error}")
    return "figures stand on: " + "; ".join(parts)
