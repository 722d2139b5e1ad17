"""Variants of decode attention that a model may ask for, beyond its shape."""
from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from pkvsim.kv_types import KV_DTYPES, KV_SCALES, SCALE_BYTES, default_scales
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, is_number

MAX_QUERY_TOKENS = 8
KV_ELEMENT_BYTES = 2  # FP16 and BF16
MAX_FLOAT = sys.float_info.max  # an int may be larger


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a step's attention does apart from softmax(scale * q k^T) v; the defaults are that.

    window: each query token sees the last `window` tokens up to itself, itself among them; None sees all.
    soft_cap: logits become soft_cap * tanh(logit / soft_cap), before the mask; None leaves them.
    sinks: a logit per query head joins the softmax without a value (its exponential is added to the sum).
    query_tokens: query tokens per row (speculative decoding). They are the row's last tokens, counted in its length;
    each sees the tokens up to itself.
    v_head_dim: head_dim of V and of the output where it is not K's.
    kv_dtype: of the cache, one of pkvsim.kv_types.KV_DTYPES; None is the queries' own 16-bit type. kv_scales: what has
    a scale of its own, one of KV_SCALES; by default what gpu.CacheWriter gives the type, "tensor" for FP8 and "token"
    for int8.
    Raises ValueError naming the field.
    """

    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    query_tokens: int = 1
    v_head_dim: int | None = None
    kv_dtype: str | None = None
    kv_scales: str | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_int("window", self.window, 1, MAX_TOKENS)
        if self.soft_cap is not None and not (is_number(self.soft_cap) and 0 < self.soft_cap <= MAX_FLOAT):
            raise ValueError(f"soft_cap: expected a finite number > 0 or None, got {self.soft_cap!r}")
        if not isinstance(self.sinks, (bool, np.bool_)):
            raise ValueError(f"sinks: expected True or False, got {type(self.sinks).__name__}")
        check_int("query_tokens", self.query_tokens, 1, MAX_QUERY_TOKENS)
        if self.v_head_dim is not None:
            check_int("v_head_dim", self.v_head_dim, 1, MAX_TOKENS)
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: expected None or one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        kinds = (None,) if self.kv_dtype is None else (None, *KV_SCALES)
        if self.kv_scales not in kinds:
            expected = "None without kv_dtype" if self.kv_dtype is None else f"one of {', '.join(KV_SCALES)}"
            raise ValueError(f"kv_scales: expected {expected}, got {self.kv_scales!r}")
        if self.kv_dtype is not None and self.kv_scales is None:
            object.__setattr__(self, "kv_scales", default_scales(self.kv_dtype))

    def with_cache(self, kv_dtype: str | None, kv_scales: str | None = None) -> AttentionOptions:
        """The same with these where they are not None. Raises ValueError where the options say otherwise already."""
        for name, value in (("kv_dtype", kv_dtype), ("kv_scales", kv_scales)):
            own = getattr(self, name)
            if value is not None and own not in (None, value):
                raise ValueError(f"{name}: expected that of the options, {own}, or None, got {value!r}")
        if kv_dtype is None and kv_scales is None:
            return self
        return replace(self, kv_dtype=kv_dtype or self.kv_dtype, kv_scales=kv_scales or self.kv_scales)

    def query_shape(self, shape: DecodeShape) -> DecodeShape:
        """`shape` with a row's query tokens as further query heads of each KV head, which is how kernels take them."""
        return replace(shape, num_q_heads=shape.num_q_heads * self.query_tokens)

    def value_dim(self, shape: DecodeShape) -> int:
        """head_dim of V."""
        return shape.head_dim if self.v_head_dim is None else self.v_head_dim

    def kv_token_bytes(self, shape: DecodeShape) -> float:
        """Bytes of a token's K, V and scales in one KV head; of the scales of a page, its share."""
        elements = shape.head_dim + self.value_dim(shape)
        if self.kv_dtype is None:
            return elements * KV_ELEMENT_BYTES
        both = 2 * SCALE_BYTES
        scales: dict[str | None, float] = {"tensor": 0, "page": both / shape.page_size, "token": both}
        return elements + scales[self.kv_scales]

    def kv_element_bytes(self, shape: DecodeShape) -> float:
        """Bytes of an element of K or V, those of the scales shared out."""
        return self.kv_token_bytes(shape) / (shape.head_dim + self.value_dim(shape))

    @property
    def reach(self) -> int | None:
        """Tokens from a row's end back to where the window of its first query token begins, which no row has more of
        than MAX_TOKENS; None without a window."""
        return None if self.window is None else min(MAX_TOKENS, self.window + self.query_tokens - 1)


PLAIN = AttentionOptions()
