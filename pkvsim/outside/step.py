"""The time of one step, part by part, each with what it stands on."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideEntry
from pkvsim.models.model_spec import ModelSpec
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.engine_profile import EngineProfile
from pkvsim.outside.matrices import FP4, FP8, INT8, WEIGHT_ONLY, attention_matrices, expert_matrices, mlp_matrices
from pkvsim.outside.step_costs import DRAFTS, PARTS, step_costs, step_parts
from pkvsim.shapes import MAX_TOKENS, check_int

RATES = {FP8: "fp8_share", INT8: "int8_share", FP4: "fp4_share", WEIGHT_ONLY: "weight_only_share"}
# The constants that weigh most in a part; what the part stands on is the weakest of them.
STANDS_ON = {
    "matrices": ("weight_share",), "elementwise": ("kernel_us",), "all_reduce": ("all_reduce_us", "all_reduce_share"),
    "head": ("weight_share",), "prefill_attention": ("attention_share",), "decode_attention": ("decode_share",),
    "host": ("step_us",),
}  # fmt: skip
WEAKEST_FIRST = ("assumed", "fitted", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What runs in a step. decode_lens: tokens that each decoding row attends to, the one decoded included. chunks:
    (tokens cached before, tokens computed) of each prompt. logits: tokens that need the LM head; None: one of every row
    and every chunk. Raises ValueError naming the field."""

    decode_lens: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    logits: int | None = None

    def __post_init__(self) -> None:
        for length in self.decode_lens:
            check_int("decode_lens", length, 1, MAX_TOKENS)
        for begin, tokens in self.chunks:
            check_int("chunks", begin, 0, MAX_TOKENS)
            check_int("chunks", tokens, 1, MAX_TOKENS)
        if self.logits is not None:
            check_int("logits", self.logits, 0, self.tokens)

    @property
    def tokens(self) -> int:
        return len(self.decode_lens) + sum(tokens for _, tokens in self.chunks)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Parts in us, in the order of pkvsim.outside.step_costs.PARTS without drafts, and by part "measured", "fitted" or
    "assumed"."""

    parts_us: dict[str, float]
    basis: dict[str, str]
    band_percent: float

    @property
    def us(self) -> float:
        return sum(self.parts_us.values())


def step_time(
    model: ModelSpec,
    device: DeviceSpec,
    work: StepWork,
    profile: EngineProfile,
    *,
    warm: float = 1.0,
    kv_element_bytes: float = 2,
) -> StepTime:
    """A step of an engine on one GPU. Where the profile's attention is not "flash", decode attention of grouped-query
    layers is the caller's, by our routes, and 0 here. warm: 0 for a GPU that was not busy, to 1. Raises ValueError
    where the GPU has no rate of the model's products."""
    entry = outside_entry(device, profile.constants)
    rows = len(work.decode_lens)
    most = max(int(profile.padded(work.tokens)[-1]), work.tokens)
    costs = step_costs(
        model, device, entry.constants, profile, step_tokens=most, max_batch=max(1, rows + len(work.chunks)),
        kv_element_bytes=kv_element_bytes,
    )  # fmt: skip
    parts = np.zeros(len(PARTS))
    lens = np.array(sorted(work.decode_lens, reverse=True), np.int64)
    begins, chunks = (np.array([chunk[at] for chunk in work.chunks], np.int64) for at in (0, 1))
    logits = rows + len(work.chunks) if work.logits is None else work.logits
    if work.tokens:
        step_parts(costs, lens, begins, chunks, logits, 0.0, warm, parts)
    return StepTime(
        dict(zip(PARTS[:DRAFTS], parts.tolist())), part_basis(model, device, entry), entry.band_percent
    )


def part_basis(model: ModelSpec, device: DeviceSpec, entry: OutsideEntry) -> dict[str, str]:
    """What each part of a step stands on: the weakest of the constants that weigh most in it."""
    kinds = {
        matrix.kind
        for layer, _ in model.layer_groups
        for matrix in attention_matrices(model, layer, device) + mlp_matrices(model, layer, device)
        + expert_matrices(model, layer, device)
    }  # fmt: skip
    rates = tuple(RATES.get(kind, "matrix_share") for kind in kinds)
    experts = ("expert_share",) if model.num_experts else ()
    found = {}
    for part, names in STANDS_ON.items():
        used = names + (rates + experts if part == "matrices" else ())
        found[part] = min((entry.basis.get(name, "assumed") for name in used), key=WEAKEST_FIRST.index)
    return found
