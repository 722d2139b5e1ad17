"""OutsideConstants: the named constants that price everything of a step but paged decode attention, and where they come
from. pkvsim.outside adds them up."""
from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from pkvsim.devices.route_model import FitError, read_error

STATUSES = ("measured", "fitted", "estimated")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideConstants:
    """What a step costs outside paged decode attention, by one engine's kernels on one GPU.

    Shares are of the GPU's own numbers (fp16_tflops, fp8_tflops, beta_gb_s, link_gb_s and so on), which is what lets a
    GPU that nobody measured take over those of one that was; latencies are kept. Raises ValueError naming the field.
    """

    # Matrix products: pkvsim.outside.matrices.
    matrix_share: float  # of the 16-bit rate, that large products sustain
    fp8_share: float  # of the FP8 rate
    int8_share: float = 0.55  # of the INT8 rate, activations in 8 bits as well
    fp4_share: float = 0.5  # of the FP4 rate
    weight_only_share: float = 0.45  # of the 16-bit rate, where weights are widened on their way in
    expert_share: float = 0.5  # of what a dense product of the same type reaches, for products grouped by expert
    weight_share: float  # of beta_gb_s, that weights are read at
    matrix_us: float = 2.0  # of every product beside its bytes and FLOPs
    narrow_us: float = 0.0  # further, where activations are brought to 8 or 4 bits first
    expert_us: float = 20.0  # of a layer's routing: sorting tokens by expert, and putting them back
    half_rate_tokens: float = 0.0  # tokens at which a product reaches half of its rate
    tile_tokens: float = 16.0  # tokens are padded to a multiple of this
    wave_weight: float = 0.0  # how much of the last, partly filled wave of tiles is paid for: 0 none, 1 all
    roofline_power: float = 4.0  # sharpness of the corner between bytes and FLOPs; bytes + FLOPs at 1
    boost: float = 1.0  # rate of a GPU that has not been busy, over the sustained one
    boost_ms: float = 0.0  # of computing at full rate, until the sustained rate holds
    # Products of few tokens by 16-bit kernels of an engine's own, each with its norm before and its sum or gate behind.
    few_tokens: float = 0.0  # of a step, up to which a layer's products are theirs; 0: never
    few_share: float = 1.0  # of beta_gb_s, that they read weights at
    few_us: float = 0.0  # of every such product beside its bytes
    few_token_us: float = 0.0  # further for every token
    few_kernels: float = 0.0  # small kernels of a layer that are left beside them
    # Prefill attention: pkvsim.outside.prefill.
    attention_share: float = 0.45  # of the 16-bit rate
    attention_us: float = 5.0  # of a layer's launch
    attention_half_tokens: float = 0.0  # tokens of a chunk at which attention reaches half of its rate
    # Decode attention of the engine's own kernel: pkvsim.outside.flash_decode.
    decode_share: float = 0.92  # of beta_gb_s
    decode_cta_gb_s: float = 60.0  # what one CTA alone reads
    decode_us: float = 4.0  # of a layer's launch
    mixed_share: float = 0.8  # of beta_gb_s, for decode rows beside a prefill chunk
    mixed_cta_gb_s: float = 200.0  # what the longest decode row beside a prefill chunk is read at
    # What is neither.
    kernel_us: float = 1.5  # of every norm, rope, activation or other small kernel beside its bytes
    elementwise_share: float = 0.7  # of beta_gb_s
    small_kernels: float = 6.0  # of a layer: two norms, rope, cache append, activation and one more, where fused
    elementwise_passes: float = 12.0  # times that they read or write a token's hidden vector, the MLP's width included
    step_us: float = 300.0  # of a step: inputs, sampling, what of the host's work the GPU waits for
    row_us: float = 2.0  # of a step, for every row
    chunk_step_us: float = 0.0  # of a step with a prefill chunk, which no whole graph covers
    eager_layer_us: float = 450.0  # host time to issue a layer without a graph, which the GPU cannot be ahead of
    chunk_layer_us: float = 0.0  # the same of a step with a chunk, where that alone has no graph; 0: it is no limit
    wake_factor: float = 1.0  # time of the first step of a server that was idle, over that of the same step later
    # The one process that hands every token to its client, where an engine has no more than one.
    token_us: float = 0.0  # of every token
    token_place_us: float = 0.0  # further, for every token of the same answer before it, where all are handed on again
    # All-reduce: pkvsim.outside.communication.
    all_reduce_us: float = 8.0  # between two GPUs
    all_reduce_rank_us: float = 1.0  # for every further GPU
    all_reduce_share: float = 0.6  # of link_gb_s

    def __post_init__(self) -> None:
        for name in CONSTANTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
            if name in POSITIVE and value == 0:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        for name, least in (("boost", 1.0), ("roofline_power", 1.0), ("wake_factor", 1.0), ("tile_tokens", 1.0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number >= {least:g}, got {getattr(self, name)!r}")


CONSTANTS = tuple(f.name for f in fields(OutsideConstants))
REQUIRED = tuple(f.name for f in fields(OutsideConstants) if f.default is MISSING)
POSITIVE = tuple(name for name in CONSTANTS if name.endswith(("_share", "_gb_s")))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideEntry:
    """One engine's constants on one GPU, and what they stand on.

    basis: by constant, "measured" (this GPU, this kernel), "fitted" (to whole steps or served requests) or "assumed";
    a constant that it does not name is assumed. status is the best of them, "estimated" for another GPU's shares.
    """

    constants: OutsideConstants
    status: str  # one of STATUSES
    source: str  # file, command or URL
    date: str  # YYYY-MM-DD
    basis: dict[str, str]
    band_percent: float  # a step is expected to lie within this of its price, nine times of ten
    in_sample: FitError | None = None
    held_out: FitError | None = None

    def to_dict(self) -> dict[str, Any]:
        """The device file's format, which `read_outside` reads back."""
        data: dict[str, Any] = {
            "status": self.status, "source": self.source, "date": self.date, "band_percent": self.band_percent,
        }  # fmt: skip
        for name in ("in_sample", "held_out"):
            error = getattr(self, name)
            if error is not None:
                data[name] = asdict(error)
        return data | {"basis": dict(self.basis), "constants": asdict(self.constants)}


def check_head(where: str, entry: dict[str, Any], known: Collection[str], statuses: Sequence[str]) -> None:
    """What every entry of fitted constants has: known fields, a status, a source and a date. ValueError naming one."""
    if set(entry) - set(known):
        raise ValueError(f"{where}: unknown: {', '.join(sorted(set(entry) - set(known)))}")
    for key in ("status", "source", "date"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ValueError(f"{where}.{key}: expected text, got {entry.get(key)!r}")
    if entry["status"] not in statuses:
        raise ValueError(f"{where}.status: expected one of {', '.join(statuses)}, got {entry['status']!r}")


def read_outside(where: str, entry: Any) -> OutsideEntry:
    """One entry of a device file's `outside`; ValueError that starts with `where` and names the field."""
    if not isinstance(entry, dict) or not isinstance(entry.get("constants"), dict):
        raise ValueError(f"{where}: expected an object with status, source, date, band_percent, basis and constants")
    check_head(where, entry, {f.name for f in fields(OutsideEntry)}, STATUSES)
    band = entry.get("band_percent")
    if isinstance(band, bool) or not isinstance(band, (int, float)) or not 0 < band < math.inf:
        raise ValueError(f"{where}.band_percent: expected a number > 0, got {band!r}")
    basis = entry.get("basis", {})
    allowed = ("measured", "fitted", "assumed")
    if not isinstance(basis, dict) or not all(k in CONSTANTS and v in allowed for k, v in basis.items()):
        raise ValueError(f"{where}.basis: expected {', '.join(allowed)} by constant, got {basis!r:.80}")
    constants: dict[str, Any] = entry["constants"]
    odd = (set(REQUIRED) - set(constants)) | (set(constants) - set(CONSTANTS))
    if odd:
        raise ValueError(f"{where}.constants: missing or unknown: {', '.join(sorted(odd))}")
    try:
        values = OutsideConstants(**constants)
    except ValueError as error:
        raise ValueError(f"{where}.constants.{error}") from None
    errors = {name: read_error(f"{where}.{name}", entry[name]) for name in ("in_sample", "held_out") if name in entry}
    return OutsideEntry(
        constants=values, status=entry["status"], source=entry["source"], date=entry["date"], basis=dict(basis),
        band_percent=float(band), **errors,
    )  # fmt: skip
