"""What the engine's checks refuse by name, and what may stand for a step that was checked before."""
from __future__ import annotations

import numpy as np
import pytest

from gpu import arrays, validate
from gpu.arrays import ArrayView
from pkvsim import DecodeShape

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)


@pytest.mark.parametrize("given", [np.zeros(4, np.int32), [1, 2], 3])
def test_what_is_not_on_a_gpu_never_passes_for_what_was_not_given(given) -> None:
    (_, found), (address, absent) = arrays.fingerprint(given), arrays.fingerprint(None)
    assert found != absent and address == 0


def test_a_combined_cache_is_split_into_views() -> None:
    both = np.arange(3 * 2 * 2 * 4 * 8).reshape(3, 2, 2, 4, 8)
    k_pages, v_pages = arrays.split_combined(both)
    assert np.shares_memory(k_pages, both) and (k_pages == both[:, 0]).all() and (v_pages == both[:, 1]).all()


@pytest.mark.parametrize("pages, name", [(np.zeros((3, 2, 4, 8)), "v_pages"), (np.zeros((3, 3, 2, 4, 8)), "v_pages"),
                                         ([1], "k_pages"), (None, "k_pages")])
def test_what_is_no_combined_cache_is_named(pages, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        arrays.split_combined(pages)


@pytest.mark.parametrize("scale", [0.5, 1, np.float32(2.0), np.int64(3), -0.25])
def test_numbers_are_scales(scale) -> None:
    assert validate.check_scale(scale) == float(scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", 1j, np.ones(1), (1,)])
def test_anything_else_is_not(scale) -> None:
    with pytest.raises(ValueError, match="^scale"):
        validate.check_scale(scale)


@pytest.mark.parametrize("name", ["scale", "sinks", "query_lens"])
def test_arguments_that_routes_need_not_serve_are_refused(name) -> None:
    given = dict.fromkeys(("scale", "sinks", "query_lens"))
    validate.check_routed(**given)
    with pytest.raises(ValueError, match=f"^{name}: .*auto"):
        validate.check_routed(**given | {name: 0.0})


def test_a_table_that_the_planner_cannot_count_is_refused() -> None:
    def table(rows: int, columns: int) -> dict[str, ArrayView]:
        return {"block_table": ArrayView(0, "cupy", 0, "int32", (rows, columns), (columns, 1))}

    fits = (2**31 - 1) // (2 * SHAPE.num_kv_heads)  # columns of two rows, a tile each
    validate.check_room(table(2, fits), SHAPE, segment_cost=0)
    with pytest.raises(ValueError, match="^block_table"):
        validate.check_room(table(2, fits + 1), SHAPE, segment_cost=0)
    with pytest.raises(ValueError, match="^block_table"):
        validate.check_room(table(2, fits), SHAPE, segment_cost=1)
