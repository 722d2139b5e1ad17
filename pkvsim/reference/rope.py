"""Rotary position embedding (RoPE): its two element orders, and its angles as a table or as frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.shapes import check_int

HALF = "half"  # element i turns with i + rotary_dim / 2: Llama in Hugging Face's order, GPT-NeoX, Qwen, Mistral
INTERLEAVED = "interleaved"  # element 2 i turns with 2 i + 1: GPT-J, Llama in Meta's own order
ROPE_STYLES = (HALF, INTERLEAVED)
ROTARY_MULTIPLE = 16  # elements: two of the GPU's 16-byte vectors, one for either half


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rope:
    """How K and Q are rotated. One of cos_sin and inv_freq is given; a model's context scaling is in either.

    style: "half" or "interleaved". Pair i of a token at position p turns by p * inv_freq[i] radians.
    cos_sin: [max_positions, rotary_dim] float32, each row rotary_dim / 2 cosines, then as many sines; for the GPU a
    CuPy or torch array there. inv_freq: [rotary_dim / 2] floats on the host or a GPU, radians per position; angles
    are then exact at every position, while a table keeps whatever rounding it was made with. factor: multiplies the
    cosines and sines that inv_freq gives (YaRN's attention factor). Elements of a head from rotary_dim on are left as
    they are.

    Raises ValueError naming the field.
    """

    style: str
    cos_sin: Any = None
    inv_freq: Any = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.style not in ROPE_STYLES:
            raise ValueError(f"style: expected one of {', '.join(ROPE_STYLES)}, got {self.style!r}")
        if (self.cos_sin is None) == (self.inv_freq is None):
            raise ValueError(
                "cos_sin, inv_freq: expected exactly one of them, got " + ("none" if self.cos_sin is None else "both")
            )
        name, rank = ("inv_freq", 1) if self.cos_sin is None else ("cos_sin", 2)
        shape = tuple(getattr(getattr(self, name), "shape", ()))
        if len(shape) != rank or shape[-1] == 0:
            raise ValueError(
                f"{name}: expected an array of {rank} dimension{'s' * (rank > 1)}, got shape {list(shape)}"
            )
        if self.rotary_dim % ROTARY_MULTIPLE:
            raise ValueError(f"{name}: expected a rotary_dim in multiples of {ROTARY_MULTIPLE}, got {self.rotary_dim}")
        if not np.isfinite(self.factor) or (self.factor != 1.0 and self.inv_freq is None):
            raise ValueError(
                f"factor: expected a finite number, and 1 with cos_sin (scale its entries), got {self.factor}"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.cos_sin.shape[1] if self.inv_freq is None else 2 * self.inv_freq.shape[0])


def make_cos_sin(inv_freq: np.ndarray, max_positions: int, *, factor: float = 1.0) -> np.ndarray:
    """The table [max_positions, 2 * len(inv_freq)] float32 of those frequencies, computed in float64."""
    check_int("max_positions", max_positions, 1)
    angles = np.outer(np.arange(max_positions), np.asarray(inv_freq, dtype=np.float64))
    return (np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * factor).astype(np.float32)


def turns_per_position(inv_freq: np.ndarray) -> np.ndarray:
    """inv_freq [n] radians per position as uint64 [n]: turns per position, times 2^64, whole turns left out.

    A position times that, modulo 2^64, is the angle, however large the position.
    """
    inv_freq = np.asarray(inv_freq, dtype=np.float64)
    if not np.isfinite(inv_freq).all():
        raise ValueError(f"inv_freq: expected finite numbers, got {inv_freq[~np.isfinite(inv_freq)][0]}")
    turns = np.mod(inv_freq / (2 * np.pi), 1.0)
    high = np.floor(turns * 2.0**32)  # The 64 bits are made in two halves, since float64 cannot hold 2^64 - 1.
    low = np.floor((turns * 2.0**32 - high) * 2.0**32)
    return (high.astype(np.uint64) << np.uint64(32)) + low.astype(np.uint64)
