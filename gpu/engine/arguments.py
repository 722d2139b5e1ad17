"""What a run gives its kernels: arrays, checked where they are unlike the last run's, and numbers. Needs no CuPy."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gpu.engine import cache_scales
from gpu.inputs import arrays, checks
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions
from pkvsim.shapes import MAX_TOKENS

if TYPE_CHECKING:
    from gpu.engine.plan import Plan

LOG2_E = 1.4426950408889634
NAMES = ("q", "k_pages", "v_pages", "out", "lse", "sinks", "query_lens", "k_scale", "v_scale")
OPTIONAL = NAMES[5:]
# The values of a run that its kernels may be given (gpu.kernels.fields says which of them one is), in the order of
# DecodeArguments.take. Those of variants that a run has not are 0.
VALUES = (
    "q", "k_pages", "v_pages", "out", "lse", "sinks", "query_lens", "k_scales", "v_scales",
    "page_ids", "lengths", "row_begins", "batch_size", "table_stride", "partials",
    "scale", "cap", "v_scale",
    "k_page_stride", "v_page_stride", "k_head_stride", "k_token_stride", "v_head_stride", "v_token_stride",
    "scale_page_stride", "scale_head_stride", "scale_token_stride",
    "num_kv_heads", "num_pages", "window",
)  # fmt: skip


class DecodeArguments:
    """The arguments of one engine's launches, as VALUES has them."""

    __slots__ = ("library", "_shape", "_dtype", "_options", "_layout", "_device_id", "_num_kv_heads", "_scale",
                 "_weights", "_window", "_checked", "_strides", "_scale_strides", "_num_pages")

    def __init__(self, shape: DecodeShape, dtype: str, options: AttentionOptions, layout: str, *, num_kv_heads: int,
                 scale: float | None, device_id: int) -> None:
        """num_kv_heads: as the kernels count them. Raises ValueError naming scale."""
        self.library: str | None = None  # whose arrays and streams the runs use; known from the first run on
        self._shape, self._dtype, self._options, self._layout = shape, dtype, options, layout
        self._num_kv_heads, self._device_id = num_kv_heads, device_id
        # Longer windows see as much, and what the kernels add to this stays within 31 bits.
        self._window = min(options.window or 0, MAX_TOKENS - options.query_tokens + 1)
        self._scale = shape.head_dim**-0.5 if scale is None else checks.check_scale(scale)
        self._weights = self._weigh(self._scale)
        self._checked: list | None = None
        self._strides: tuple = ()
        self._scale_strides = cache_scales.NO_STRIDES
        self._num_pages = 0

    def take(self, plan: Plan, workspace_at: int, q: object, k_pages: object, v_pages: object, out: object, lse: object,
             scale: float | None, sinks: object, query_lens: object, k_scale: object, v_scale: object) -> tuple:
        """VALUES of a run. workspace_at: where the partial states are; the others as DecodeEngine.run.

        Raises ValueError naming the argument. Arrays that differ from the last run's only in where they are pass
        without being looked at again.
        """
        options = self._options
        k_number = v_number = 1.0
        if k_scale is not None or v_scale is not None or options.kv_dtype is not None:
            k_number, k_scale = cache_scales.split("k_scale", k_scale, options)
            v_number, v_scale = cache_scales.split("v_scale", v_scale, options)
        given = q, k_pages, v_pages, out, lse, sinks, query_lens, k_scale, v_scale
        addresses, keys = arrays.fingerprints(given)
        keys.append(plan.batch_size)
        if keys != self._checked:
            self._check(plan.batch_size, given)
            self._checked = keys
        if plan.unchecked_ids is not None:
            checks.check_page_ids(*plan.unchecked_ids, self._shape.page_size, self._num_pages)
            plan.unchecked_ids = None
        if scale is None and k_number == 1.0:
            weights = self._weights
        else:
            weights = self._weigh((self._scale if scale is None else checks.check_scale(scale)) * k_number)
        return (*addresses, plan.page_ids, plan.lengths, plan.row_begins, plan.batch_size, plan.stride, workspace_at,
                *weights, v_number, *self._strides, *self._scale_strides, self._num_kv_heads, self._num_pages,
                self._window)

    def _weigh(self, scale: float) -> tuple[float, float]:
        """scale and cap of pkv::DecodeArguments. Raises ValueError naming scale where float32 cannot hold them."""
        cap = self._options.soft_cap
        weights = (scale * LOG2_E, 0.0) if cap is None else (scale / cap, cap * LOG2_E)
        if max(map(abs, weights)) > checks.MAX_FLOAT32:
            raise ValueError(f"scale: expected one that float32 can hold with soft_cap and k_scale, got {scale!r}"
                             + ("" if cap is None else f" with soft_cap {cap!r}"))
        return weights

    def _check(self, batch_size: int, given: tuple) -> None:
        views = {name: arrays.view(name, array) for name, array in zip(NAMES, given)
                 if array is not None or name not in OPTIONAL}
        checks.check_run(self._shape, self._dtype, self._options, self._layout, batch_size, self._device_id, views)
        k, v = views["k_pages"], views["v_pages"]
        self._scale_strides = cache_scales.check(views.get("k_scale"), views.get("v_scale"), self._shape, self._options,
                                                 self._layout, k.shape[0])
        self.library, self._num_pages = k.library, k.shape[0]
        head, token = (1, 2) if self._layout == "HND" else (2, 1)
        self._strides = (k.strides[0], v.strides[0], k.strides[head], k.strides[token], v.strides[head],
                         v.strides[token])
