"""Which matrix of a model is stored in how many bits: types of storage, and the modules that they are of."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

# Where checkpoints put a language model's modules; a pattern may be written for any of them.
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "language_model.", "backbone.")


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix type: bits of a weight with its share of the scales of its group, of an output row, of a column."""

    name: str
    bits: float
    row_bits: float = 0.0
    column_bits: float = 0.0

    def matrix_bytes(self, out_features: int, in_features: int) -> float:
        weights = self.bits * out_features * in_features
        return (weights + self.row_bits * out_features + self.column_bits * in_features) / 8


def fp8(block: Sequence[int] | None = None, scale_bits: int = 32) -> Stored:
    """E4M3 with a scale per block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), per tensor without one."""
    return Stored("fp8", 8 + (scale_bits / (block[0] * block[1]) if block else 0))


def fp8_rows() -> Stored:
    """E4M3 with a float32 scale per output channel (FBGEMM, llm-compressor's FP8_DYNAMIC)."""
    return Stored("fp8", 8, row_bits=32)


def nvfp4(group: int = 16) -> Stored:
    """E2M1 with an E4M3 scale per 16 weights (NVIDIA, "Introducing NVFP4", 2025)."""
    return Stored("nvfp4", 4 + 8 / group)


def mxfp(bits: int, group: int = 32) -> Stored:
    """OCP microscaling formats 1.0: an 8-bit power of two per 32 weights."""
    return Stored(f"mxfp{bits}", bits + 8 / group)


def grouped_int(bits: int, group: int, *, zero_points: bool, column_bits: float = 0) -> Stored:
    """Integers with a 16-bit scale and maybe a zero point per group of a row; group -1: one per row."""
    scale = 16 + (bits if zero_points else 0)
    if group <= 0:
        return Stored(f"int{bits}", bits, row_bits=scale, column_bits=column_bits)
    return Stored(f"int{bits}", bits + scale / group, column_bits=column_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which module is stored how. Names come without a prefix (layers.3.self_attn.q_proj, lm_head)."""

    label: str = "none"
    default: Stored | None = None  # of every linear layer that nothing else names
    expert_default: Stored | None = None  # of routed experts, where they differ
    lm_head: bool = False  # the default reaches the LM head
    named: Mapping[str, Stored] = field(default_factory=dict)  # modules, or modules that hold them, by full name
    patterns: tuple[tuple[Callable[[str], bool], Stored], ...] = ()  # the same for names with a "*"
    targets: tuple[tuple[Callable[[str], bool], Stored], ...] = ()
    excluded: Callable[[str], bool] = lambda name: False
    kv_cache: str = ""

    def stored(self, name: str, *, expert: bool, linear: bool) -> Stored | None:
        """None: as the config's dtype says."""
        if self is NOT_QUANTISED:
            return None
        names = _full_names(name)
        for end in (end for full in names for end in _ends(full)) if self.named else ():
            if end in self.named:
                return self.named[end]
        for matches, stored in self.patterns:
            if any(map(matches, names)):
                return stored
        if not linear or (name == "lm_head" and not self.lm_head) or any(map(self.excluded, names)):
            return None
        for matches, stored in self.targets:
            if any(map(matches, names)):
                return stored
        return self.expert_default if expert and self.expert_default else self.default


NOT_QUANTISED = Quantization()


@lru_cache(maxsize=4096)
def _full_names(name: str) -> tuple[str, ...]:
    names = tuple(prefix + name for prefix in PREFIXES)
    return (*names, "head") if name == "lm_head" else names


@lru_cache(maxsize=65536)
def _ends(full: str) -> tuple[str, ...]:
    """A name and all that it lies in, longest first."""
    parts = full.split(".")
    return tuple(".".join(parts[:count]) for count in range(len(parts), 0, -1))


def name_matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Matches a full module name against patterns as the formats write them: "re:..." is a regular expression, "*"
    stands for anything, and a plain name means itself, what lies in it, and any module of that name."""
    plain, expressions = set(), []
    for pattern in patterns:
        if pattern.startswith("re:"):
            expressions.append(f"(?:{pattern[3:]})")
        elif "*" in pattern:
            expressions.append(".*".join(map(re.escape, pattern.split("*"))) + r"(?:\..*)?$")
        else:
            plain.add(pattern.removesuffix(".weight"))
    compiled = re.compile("|".join(expressions)) if expressions else None
    beginnings = {name.partition(".")[0] for name in plain}

    def matches(full: str) -> bool:
        parts = full.split(".")
        starts = (at for at in range(len(parts)) if parts[at] in beginnings)
        if any(".".join(parts[at:end]) in plain for at in starts for end in range(at + 1, len(parts) + 1)):
            return True
        return compiled is not None and compiled.match(full) is not None

    return matches
