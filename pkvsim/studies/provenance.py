"""What the figures of a run stand on: for every quantity whether it was measured, fitted, read or assumed."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pkvsim.devices.derive import all_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.models.presets import ModelSpec
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.step import part_basis
from pkvsim.serving.costs import ENGINE, draft_cost, routed_groups
from pkvsim.serving.queueing.drafts import expected_tokens
from pkvsim.serving.server_config import ServingConfig

# measured: on this GPU; fitted: constants fitted to measurements of it; estimated: carried over from another GPU;
# datasheet: the maker's figure; computed: arithmetic on the model's config; assumed: nobody measured it.
BASES = ("measured", "fitted", "estimated", "datasheet", "computed", "assumed")
# The parts of pkvsim.outside.step_costs.PARTS in words.
OUTSIDE = {
    "matrices": "matrix products", "elementwise": "norms, activations and other small kernels",
    "all_reduce": "all-reduces", "head": "LM head and sampling", "prefill_attention": "prefill attention",
    "decode_attention": "decode attention", "host": "host time of a step",
}  # fmt: skip
_OF_STATUS = {"calibrated": "measured", "datasheet": "datasheet", "estimated": "estimated"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What one quantity stands on."""

    quantity: str
    basis: str  # one of BASES
    source: str
    error_percent: float | None = None  # mean, on measurements that the fit has not seen where there are any
    band_percent: float | None = None  # a step is expected to lie within this of its price, nine times of ten
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
    model: ModelSpec, device: DeviceSpec, config: ServingConfig, *, policies: Iterable[str], routes: Iterable[str],
    shares: Mapping[str, float | None],
) -> tuple[Basis, ...]:  # fmt: skip
    """Every quantity that a serving run rests on. shares: of the busy time, by pkvsim.outside.step_costs.PARTS."""
    bandwidth, peak, memory = (device.sources[name] for name in ("beta_gb_s", "fp16_tflops", "memory_gib"))
    profile = config.profile
    return (
        *_decode_basis(model, device, config, tuple(policies), tuple(routes), shares.get("decode_attention")),
        *(
            row for part, row in _outside_basis(model, device, config, shares).items()
            if part != "decode_attention" and (part != "all_reduce" or model.tensor_parallel > 1)
        ),
        Basis(quantity="memory bandwidth", basis=_OF_STATUS[bandwidth.status], source=bandwidth.source),
        Basis(quantity="FP16 peak", basis=_OF_STATUS[peak.status], source=peak.source),
        Basis(quantity="memory size", basis=_OF_STATUS[memory.status], source=memory.source),
        Basis(quantity="weights and KV bytes", basis="computed", source=model.source),
        Basis(
            quantity="memory left to KV pages",
            basis="computed" if config.kv_gib is not None else "assumed",
            source="given" if config.kv_gib is not None else
            f"{config.memory_fraction:.0%} of the memory less weights and {profile.workspace_gib:g} GiB of workspace",
        ),
        *_draft_basis(model, config, shares.get("drafts")),
        Basis(quantity=f"scheduling of the engine, {profile.name}", basis="assumed", source=profile.source),
    )  # fmt: skip


def _draft_basis(model: ModelSpec, config: ServingConfig, share: float | None) -> tuple[Basis, ...]:
    if config.query_tokens == 1:
        return ()
    cost = draft_cost(model, config)
    tokens = expected_tokens(config.query_tokens, float(config.acceptance or 0.0))
    return (
        Basis(
            quantity="accepted drafts", basis="assumed",
            source=f"{config.query_tokens - 1} drafts a row, each accepted with probability {config.acceptance:g}: "
            f"{tokens:.3g} tokens a step in the mean, (1 - p^(k + 1)) / (1 - p) of Leviathan et al. 2023 "
            "(arXiv:2211.17192)",
        ),
        Basis(
            quantity=f"drafting a token, {cost.part:.1%} of a step without drafts", basis=cost.basis,
            source=cost.source, time_share=share,
        ),
    )  # fmt: skip


def _decode_basis(
    model: ModelSpec, device: DeviceSpec, config: ServingConfig, policies: tuple[str, ...], routes: tuple[str, ...],
    share: float | None,
) -> list[Basis]:  # fmt: skip
    """Decode attention: by our routes, and of the layers that no route serves, or that the engine's own kernel does."""
    rows = list(attention_basis(device, routes))
    if ENGINE in policies or len(routed_groups(model, config.page_size)) < len(model.attention_groups):
        own = _outside_basis(model, device, config, {})["decode_attention"]
        what = f"{config.engine}'s own kernel" if ENGINE in policies else "layers that no route serves"
        rows.append(replace(own, quantity=f"decode attention, {what}"))
    return [replace(rows[0], time_share=share)] if len(rows) == 1 else rows


def _outside_basis(
    model: ModelSpec, device: DeviceSpec, config: ServingConfig, shares: Mapping[str, float | None]
) -> dict[str, Basis]:
    """What pkvsim.outside prices, by part."""
    entry = outside_entry(device, config.profile.constants)
    error = entry.held_out or entry.in_sample
    return {
        part: Basis(
            quantity=OUTSIDE[part],
            basis="estimated" if entry.status == "estimated" else basis,
            source=entry.source,
            error_percent=None if error is None else error.mean_percent,
            band_percent=entry.band_percent,
            time_share=shares.get(part),
        )
        for part, basis in part_basis(model, device, entry).items()
    }


def basis_note(rows: Iterable[Basis]) -> str:
    """What decides the run's time, in a line."""
    parts = []
    for row in rows:
        if row.time_share is None and not row.quantity.startswith("decode attention"):
            continue
        share = "" if row.time_share is None else f" ({row.time_share:.0%} of the time)"
        error = "" if row.error_percent is None else f", {row.error_percent:.1f} % from measurements"
        if row.error_percent is None and row.band_percent is not None:
            error = f" (+-{row.band_percent:.0f} %)"
        parts.append(f"{row.quantity}{share} {row.basis}{error}")
    return "figures stand on: " + "; ".join(parts)
