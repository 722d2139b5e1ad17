"""What a run with lists of pages, or with the mass of every page as a by-product, gives its kernel beside the rest."""
from __future__ import annotations

from gpu.inputs import arrays
from gpu.inputs.checks import check_contiguous, expect
from gpu.kernels.variant import TILE_TOKENS, KernelConfig
from pkvsim import DecodeShape

FIELDS = ("pages", "counts")  # of pkvsim's PageList
NAMES = ("selected.pages", "selected.counts", "page_lse")
# The values that take() returns, by the names of gpu.kernels.fields.
VALUES = ("selected_pages", "selected_counts", "max_selected", "page_lse", "page_lse_tiles")


class ListArguments:
    """Those values of one engine's runs."""

    __slots__ = ("_shape", "_config", "_device_id", "_checked", "_sizes")

    def __init__(self, shape: DecodeShape, config: KernelConfig, device_id: int) -> None:
        self._shape, self._config, self._device_id = shape, config, device_id
        self._checked: list | None = None
        self._sizes = 0, 0

    def take(self, selected: object, page_lse: object, *, batch_size: int, grouped: bool,
             library: str | None) -> tuple[int, int, int, int, int]:
        """VALUES of a run: selected and page_lse as gpu.DecodeEngine.run has them, None where there are none.

        grouped: whether the step was planned with groups.
        library: whose arrays the run's others are. Raises ValueError naming the argument; arrays that differ from the
        last run's only in where they are pass without being looked at again.
        """
        given = (None, None) if selected is None else tuple(getattr(selected, name, None) for name in FIELDS)
        (pages_at, counts_at, lse_at), keys = arrays.fingerprints((*given, page_lse))
        keys += [batch_size, grouped, library, selected is None]
        if keys != self._checked:
            self._check(selected, page_lse, batch_size, grouped, library)
            self._checked = keys
        return pages_at, counts_at, self._sizes[0], lse_at, self._sizes[1]

    def _check(self, selected: object, page_lse: object, batch_size: int, grouped: bool,
               library: str | None) -> None:
        shape, config = self._shape, self._config
        for name, what in (("selected", selected), ("page_lse", page_lse)):
            expect(name, "None in a step planned with groups", repr(type(what).__name__), what is None or not grouped)
        listed = 0
        if selected is not None:
            expect("selected", "None with a window, which says itself what is read", type(selected).__name__,
                   not config.windowed)
            expect("selected", "a PageList of pages and counts", repr(type(selected).__name__),
                   all(hasattr(selected, name) for name in FIELDS))
            heads = batch_size, shape.num_kv_heads
            pages = self._view(NAMES[0], selected.pages, library)
            expect(NAMES[0], f"int32 {[*heads, 'max_selected']}", pages,
                   pages.dtype == "int32" and len(pages.shape) == 3 and pages.shape[:2] == heads and pages.shape[2] > 0)
            counts = self._view(NAMES[1], selected.counts, library)
            expect(NAMES[1], f"int32 {list(heads)}", counts, counts.dtype == "int32" and counts.shape == heads)
            listed = pages.shape[2]
        tiles = 0
        if page_lse is not None:
            expect("page_lse", f"None where pages are not whole tiles of {TILE_TOKENS} tokens",
                   f"pages of {shape.page_size}", shape.page_size % TILE_TOKENS == 0)
            view = self._view("page_lse", page_lse, library)
            outer = batch_size, shape.num_kv_heads
            inner = ((config.query_tokens,) if config.query_tokens > 1 else ()) + (shape.group_size,)
            tiles = view.shape[2] if len(view.shape) > 2 else 0
            expect("page_lse", f"float32 {[*outer, 'tiles', *inner]}", view,
                   view.dtype == "float32" and view.shape == (*outer, tiles, *inner))
        self._sizes = listed, tiles

    def _view(self, name: str, array: object, library: str | None) -> arrays.ArrayView:
        """A contiguous array on the engine's GPU, of the same library as the others."""
        view = arrays.view(name, array)
        check_contiguous(name, view)
        expect(name, f"an array on cuda:{self._device_id}", view, view.device == self._device_id)
        expect(name, f"an array of the same library as q ({library})", view.library, view.library == library)
        return view
