"""What the engine's checks refuse by name, and what may stand for a step that was checked before."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpu.engine import cache_scales
from gpu.engine.arguments import DecodeArguments
from gpu.inputs import arrays
from gpu.inputs import checks as validate
from gpu.inputs.arrays import ArrayView
from pkvsim import AttentionOptions, DecodeShape

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


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, 10**400, "0.5", 1j, np.ones(1), (1,)])
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
    validate.check_room(table(2, fits // 3), SHAPE, segment_cost=0, tile_cost=3)
    with pytest.raises(ValueError, match="^block_table"):
        validate.check_room(table(2, fits // 3 + 1), SHAPE, segment_cost=0, tile_cost=3)


def array(*shape: int, dtype: str = "float32", strides: tuple[int, ...] | None = None) -> ArrayView:
    dense = tuple(int(np.prod(shape[axis + 1:])) for axis in range(len(shape)))
    return ArrayView(0, "cupy", 0, dtype, shape, strides or dense)


@pytest.mark.parametrize("kinds,k,v,layout,strides", [
    (("float8_e5m2", "tensor"), array(1), None, "HND", (0, 0, 0)), ((None, None), None, None, "HND", (0, 0, 0)),
    (("int8", "page"), array(9, 2), array(9, 2), "NHD", (2, 1, 0)),
    (("int8", "token"), array(9, 2, 16), array(9, 2, 16), "HND", (32, 16, 1)),
    (("int8", "token"), array(9, 16, 2), array(9, 16, 2), "NHD", (32, 1, 2))])
def test_strides_of_scales(kinds, k, v, layout, strides) -> None:
    options = AttentionOptions(kv_dtype=kinds[0], kv_scales=kinds[1])
    assert cache_scales.check(k, v, SHAPE, options, layout, 9) == strides


@pytest.mark.parametrize("kind,k,v,named", [
    ("tensor", array(2), None, "k_scale"), ("tensor", None, array(1, dtype="float64"), "v_scale"),
    ("page", array(9, 2), array(8, 2), "v_scale"), ("token", array(9, 16, 2), array(9, 2, 16), "k_scale"),
    ("token", array(9, 2, 16), array(9, 2, 16, strides=(64, 32, 2)), "v_scale"),
    ("token", *[array(9, 2, 16, strides=(32, 2**31, 1))] * 2, "k_scale")])
def test_scales_that_do_not_fit_are_named(kind, k, v, named) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        cache_scales.check(k, v, SHAPE, AttentionOptions(kv_dtype="int8", kv_scales=kind), "HND", 9)


@pytest.mark.parametrize("scale", [None, 1, 0.25, np.float32(3.0)])
def test_numbers_are_scales_of_a_tensor(scale) -> None:
    number, array = cache_scales.split("k_scale", scale, AttentionOptions(kv_dtype="float8_e4m3fn"))
    assert (number, array) == (1.0 if scale is None else float(scale), None)


@pytest.mark.parametrize("kind,given,named", [
    (None, {"k_scale": 1.0}, "k_scale"), (None, {"v_scale": np.ones(1)}, "v_scale"),
    ("tensor", {"k_scale": 0.0}, "k_scale"),
    ("tensor", {"k_scale": 1e-60}, "k_scale"), ("tensor", {"v_scale": 1e39}, "v_scale"),
    ("tensor", {"v_scale": float("inf")}, "v_scale"), ("tensor", {"v_scale": float("nan")}, "v_scale"),
    ("page", {"k_scale": 1.0}, "k_scale"), ("token", {}, "k_scale")])
def test_what_is_no_scale_is_named(kind, given, named) -> None:
    options = AttentionOptions() if kind is None else AttentionOptions(kv_dtype="int8", kv_scales=kind)
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        for name in ("k_scale", "v_scale"):
            cache_scales.split(name, given.get(name), options)


@pytest.mark.parametrize("kv_dtype,dtype,passes", [
    ("float8_e4m3fn", "float8_e4m3fn", True), ("float8_e4m3fn", "uint8", True), ("float8_e4m3fn", "float8_e5m2", False),
    ("int8", "int8", True), ("int8", "uint8", False), (None, "uint8", False), (None, "float16", True)])
def test_pages_are_of_the_options_type(kv_dtype, dtype, passes) -> None:
    options = AttentionOptions(kv_dtype=kv_dtype)
    pages = array(9, 2, 16, 64, dtype=dtype)
    given = {"q": array(1, 8, 64, dtype="float16"), "k_pages": pages, "v_pages": pages}
    if passes:
        validate.check_run(SHAPE, "float16", options, "HND", 1, 0, given)
        return
    with pytest.raises(ValueError, match="^k_pages: expected"):
        validate.check_run(SHAPE, "float16", options, "HND", 1, 0, given)


def test_queries_of_bytes_start_on_8() -> None:
    pages = array(9, 2, 16, 64, dtype="int8")
    given = {"q": replace(array(1, 8, 64, dtype="float16"), pointer=4), "k_pages": pages, "v_pages": pages}
    with pytest.raises(ValueError, match="^q: expected an address in multiples of 8 bytes"):
        validate.check_run(SHAPE, "float16", AttentionOptions(kv_dtype="int8"), "HND", 1, 0, given)


@pytest.mark.parametrize("name, pointer", [("q", 2), ("q", 6), ("out", 4), ("out", 2)])
def test_what_wide_accesses_would_miss_is_refused(name, pointer) -> None:
    """A view that begins at an odd element: the GPU would stop with a misaligned address."""
    pages = array(9, 2, 16, 64, dtype="float16")
    given = {"q": array(1, 8, 64, dtype="float16"), "out": array(1, 8, 64, dtype="float16"), "k_pages": pages,
             "v_pages": pages}
    validate.check_run(SHAPE, "float16", AttentionOptions(), "HND", 1, 0, given)
    with pytest.raises(ValueError, match=f"^{name}: expected an address"):
        validate.check_run(SHAPE, "float16", AttentionOptions(), "HND", 1, 0,
                           given | {name: replace(given[name], pointer=pointer)})


@pytest.mark.parametrize("options, scale, named", [
    (AttentionOptions(), 3e38, "scale"), (AttentionOptions(soft_cap=1e-40), None, "scale"),
    (AttentionOptions(soft_cap=3e38), None, "scale"), (AttentionOptions(soft_cap=30.0), -1e300, "scale")])
def test_numbers_that_float32_cannot_hold_are_refused(options, scale, named) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        DecodeArguments(SHAPE, "float16", options, "HND", num_kv_heads=2, scale=scale, device_id=0)


def test_rows_of_bytes_start_on_16() -> None:
    """Strides that suit 16-bit elements, multiples of 8, would break a copy of bytes."""
    pages = array(9, 2, 16, 64, dtype="int8", strides=(2 * 16 * 72, 16 * 72, 72, 1))
    given = {"q": array(1, 8, 64, dtype="float16"), "k_pages": pages, "v_pages": pages}
    with pytest.raises(ValueError, match="^k_pages: expected other strides in multiples of 16"):
        validate.check_run(SHAPE, "float16", AttentionOptions(kv_dtype="int8"), "HND", 1, 0, given)


@pytest.mark.parametrize("name", ["k_pages", "v_pages"])
@pytest.mark.parametrize("change, said", [
    ({"pointer": 8}, "16-byte boundary"), ({"strides": (2**40, 2**31, 64, 1)}, "head and token strides"),
    ({"strides": (2**40, 1024, 2**31, 1)}, "head and token strides"), ({"strides": (2048, 1024, -64, 1)}, "head and token"),
    ({"library": "torch"}, "the same library as q"), ({"device": 1}, "cuda:0")])
def test_pages_that_kernels_cannot_address_are_refused(name, change, said) -> None:
    pages = array(9, 2, 16, 64, dtype="float16")
    given = {"q": array(1, 8, 64, dtype="float16"), "k_pages": pages, "v_pages": pages}
    validate.check_run(SHAPE, "float16", AttentionOptions(), "HND", 1, 0,
                       given | {name: replace(pages, strides=(2**40, 2**31 - 8, 2**31 - 8, 1))})
    with pytest.raises(ValueError, match=f"^{name}: .*{said}"):
        validate.check_run(SHAPE, "float16", AttentionOptions(), "HND", 1, 0, given | {name: replace(pages, **change)})
