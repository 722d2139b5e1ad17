"""What FlashInfer lets its arguments be, brought to one form."""
from __future__ import annotations

import math
import numbers

import torch


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(given: str | torch.dtype | None) -> torch.dtype:
    if isinstance(given, torch.dtype):
        return given
    if isinstance(given, str):
        found = getattr(torch, given, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"q_data_type: expected the name of a torch.dtype, got {given!r}")
        return found
    raise TypeError(f"q_data_type: expected a string or torch.dtype, got {type(given).__name__}")


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError naming the argument unless it is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_number(name: str, value: object, *, whole: bool = False, or_none: bool = True) -> None:
    """Raises TypeError naming the argument unless it is a number, ValueError unless it is finite."""
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise TypeError(f"{name}: expected {'an integer' if whole else 'a number'}, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_numbers(window_left: object, logits_soft_cap: object, sm_scale: object) -> None:
    """Of plan() and forward()."""
    check_number("window_left", window_left, whole=True, or_none=False)
    check_number("logits_soft_cap", logits_soft_cap)
    check_number("sm_scale", sm_scale)


def check_tokens(q: object, out: object, lse: object, rows: tuple[int, int]) -> None:
    """That q, and out and lse where they are given, hold the tokens of (rows, tokens of each)."""
    tokens = rows[0] * rows[1]
    for name, array in (("q", q), ("out", out), ("lse", lse)):
        if array is None and name != "q":
            continue
        check_tensor(name, array)
        if array.dim() != (2 if name == "lse" else 3) or array.shape[0] != tokens:
            raise ValueError(f"{name}: expected {rows[0]} rows of {rows[1]} tokens, [{tokens}, num_qo_heads, ..], got "
                             f"{list(array.shape)}")


def pages_of(
    cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, V) as views [num_pages, num_kv_heads, page_size, head_dim]; pages of one token may leave its axis out."""
    if not isinstance(cache, (tuple, torch.Tensor)):
        raise KeyError(f"paged_kv_cache: expected a tensor or a pair of tensors, got {type(cache).__name__}")
    token_axis = -2 if kv_layout == "HND" else -3
    views = []
    halves = cache if isinstance(cache, tuple) else cache.unbind(1) if cache.dim() > 1 else ()
    if len(halves) != 2:
        found = list(cache.shape) if isinstance(cache, torch.Tensor) else f"{len(cache)} of them"
        raise ValueError(f"paged_kv_cache: expected K and V, or both in one [num_pages, 2, ..], got {found}")
    for pages in halves:
        check_tensor("paged_kv_cache", pages)
        if pages.dim() not in (3, 4):
            raise ValueError(f"paged_kv_cache: expected pages of 4 axes each of K and V, got {list(pages.shape)}")
        pages = pages if pages.dim() == 4 else pages.unsqueeze(token_axis)
        views.append(pages if kv_layout == "HND" else pages.transpose(-3, -2))
    k_pages, v_pages = views
    return k_pages, v_pages
