"""Variants of decode attention that a model may ask for, beyond its shape."""
from __future__ import annotations

from dataclasses import dataclass, replace

from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int

MAX_QUERY_TOKENS = 8


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a step's attention does apart from softmax(scale * q k^T) v; the defaults are that.

    window: each query token sees the last `window` tokens up to itself, itself among them; None sees all.
    soft_cap: logits become soft_cap * tanh(logit / soft_cap), before the mask; None leaves them.
    sinks: a logit per query head joins the softmax without a value (its exponential is added to the sum).
    query_tokens: query tokens per row (speculative decoding). They are the row's last tokens, counted in its length;
    each sees the tokens up to itself.
    v_head_dim: head_dim of V and of the output where it is not K's.
    Raises ValueError naming the field.
    """

    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    query_tokens: int = 1
    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_int("window", self.window, 1, MAX_TOKENS)
        if self.soft_cap is not None and not 0 < self.soft_cap < float("inf"):
            raise ValueError(f"soft_cap: expected a finite number > 0 or None, got {self.soft_cap!r}")
        check_int("query_tokens", self.query_tokens, 1, MAX_QUERY_TOKENS)
        if self.v_head_dim is not None:
            check_int("v_head_dim", self.v_head_dim, 1, MAX_TOKENS)

    def query_shape(self, shape: DecodeShape) -> DecodeShape:
        """`shape` with a row's query tokens as further query heads of each KV head, which is how kernels take them."""
        return replace(shape, num_q_heads=shape.num_q_heads * self.query_tokens)

    def value_dim(self, shape: DecodeShape) -> int:
        """head_dim of V."""
        return shape.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def reach(self) -> int | None:
        """Tokens from a row's end back to where the window of its first query token begins; None without a window."""
        return None if self.window is None else self.window + self.query_tokens - 1


PLAIN = AttentionOptions()
