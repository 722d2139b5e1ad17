"""Which layers can read selected pages: what the selecting kernels serve, and where a list would be wrong."""
from __future__ import annotations

from pkvsim.options import AttentionOptions
from pkvsim.shapes import DecodeShape

HEAD_DIMS = (64, 128, 256)
MAX_GROUP_SIZE, MAX_QUERY_ELEMENTS = 16, 2048  # what a warp holds of a group's queries


def most_group_size(head_dim: int) -> int:
    """The largest group whose queries a warp holds."""
    return min(MAX_GROUP_SIZE, MAX_QUERY_ELEMENTS // head_dim)


def why_not_selected(shape: DecodeShape, options: AttentionOptions) -> str | None:
    """Why no page of a layer is selected, None where pages are: windows say themselves what is read, and pages are
    scored for one query token by 16-bit summaries of 16-bit keys."""
    if options.window is not None:
        return f"window: expected None with selected pages, got {options.window}"
    if options.query_tokens != 1:
        return f"query_tokens: expected 1 with selected pages, got {options.query_tokens}"
    if options.kv_dtype is not None:
        return f"kv_dtype: expected 16 bits with selected pages, got {options.kv_dtype}"
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim: expected one of {HEAD_DIMS} where pages are selected, got {shape.head_dim}"
    if options.value_dim(shape) != shape.head_dim:
        return f"v_head_dim: expected that of K, {shape.head_dim}, with selected pages, got {options.value_dim(shape)}"
    if shape.group_size > most_group_size(shape.head_dim):
        return (f"group_size: expected at most {most_group_size(shape.head_dim)} of head_dim {shape.head_dim} where "
                f"pages are selected, got {shape.group_size}")  # fmt: skip
    return None
