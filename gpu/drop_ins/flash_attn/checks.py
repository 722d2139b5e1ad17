"""What FlashAttention's functions are given, checked before anything is written or launched."""
from __future__ import annotations

import math
from numbers import Real

import torch


def expect(name: str, expected: str, got: object, ok: bool) -> None:
    """Raises ValueError naming the argument unless ok."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def describe(array: object) -> str:
    """dtype, shape and device of a tensor, for error messages."""
    if not isinstance(array, torch.Tensor):
        return repr(array)
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)} on {array.device}"


def check_tensor(name: str, expected: str, array: object, dim: int) -> None:
    """Raises ValueError naming the argument unless it is a tensor of so many axes."""
    expect(name, expected, describe(array), isinstance(array, torch.Tensor) and array.dim() == dim)


def check_alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str] = ("k", "v")) -> None:
    """That keys and values [.., num_kv_heads, head_dim], which are called `names`, go with q [.., num_q_heads,
    head_dim] and with each other. Raises ValueError naming the argument."""
    like_q = (q.dtype, q.device, q.shape[-1])
    expect(names[0], f"q's dtype, head_dim and place: {describe(q)}", describe(k),
           (k.dtype, k.device, k.shape[-1]) == like_q)
    expect(names[1], f"{names[0]}'s dtype, place and {list(k.shape[:-1])}, and a head_dim", describe(v),
           (v.dtype, v.device, v.shape[:-1]) == (k.dtype, k.device, k.shape[:-1]))
    expect("q", f"a multiple of {names[0]}'s {k.shape[-2]} heads", describe(q),
           k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0)


def check_options(q: torch.Tensor, *, scale: float | None, softcap: float, sinks: torch.Tensor | None) -> None:
    """softmax_scale, softcap and s_aux, of queries [.., num_q_heads, head_dim]. Raises ValueError naming them."""
    expect("softmax_scale", "a finite number or None", repr(scale), scale is None or _is_finite(scale))
    expect("softcap", "a finite number, 0 for none", repr(softcap), _is_finite(softcap) and softcap >= 0)
    if sinks is not None:
        expect("s_aux", f"[{q.shape[-2]}] on {q.device}, a number for each query head", describe(sinks),
               isinstance(sinks, torch.Tensor) and (sinks.shape, sinks.device) == (q.shape[-2:-1], q.device)
               and sinks.is_floating_point())


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
