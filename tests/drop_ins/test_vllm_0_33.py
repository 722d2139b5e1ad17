"""The vLLM adapter's band 0.33 on stand-ins of that release's recorded interface, over each order of a cache's axes."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from fake_vllm import fake_vllm
from vllm_behaviours import BASE, FLASH
from vllm_steps import BLOCK, LAYOUTS, Case, attention_layer, builder_of, make_cache, one_layer_of, prepare, run

from gpu.cache import append_checks
from gpu.cache.append_variant import AppendViews
from gpu.drop_ins.vllm.engines import KV_TYPES
from gpu.inputs import arrays, checks
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

BAND = "0.33"
ASKED = dict.fromkeys(("head_size", "dtype", "block_size", "use_mla", "has_sink", "use_sparse", "use_mm_prefix",
                       "use_per_head_quant_scales", "device_capability", "attn_type"))



def test_the_layouts_are_all_that_the_release_has() -> None:
    with fake_vllm(BAND) as vllm:
        assert {*vllm.members("vllm.v1.kv_cache_layout", "KVCacheLayout")} >= {*LAYOUTS}
        named = vllm.named("vllm.v1.kv_cache_layout", "KVCacheLayout")
        assert {one.name for one in named} == {*LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_caches_are_read_where_the_release_reads_them(layout, num_kv_heads) -> None:
    case = Case((1,), (4,), num_kv_heads=num_kv_heads, layout=layout)
    with fake_vllm(BAND) as vllm:
        vllm.configure()
        impl = attention_layer(vllm, case, "a").impl
        members = vllm.members(FLASH, "FlashAttentionImpl")
        assert members["forward"]["reads"] == members["do_kv_cache_update"]["reads"]
        assert vllm.members(FLASH, "FlashAttentionBackend")["forward_includes_kv_cache_update"] == ["bool", "False"]
        cache = make_cache(vllm, case, 5)
        for ours, theirs in zip(impl._pages_of(cache), vllm.pages_of(impl, cache), strict=True):
            assert ours.shape == (5, BLOCK, num_kv_heads, case.head_size)
            assert (ours.data_ptr(), ours.shape, ours.stride()) == (theirs.data_ptr(), theirs.shape, theirs.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(1, 64), (8, 128), (2, 192)])
def test_the_engine_and_the_writer_take_such_pages(layout, num_kv_heads, head_size) -> None:
    shape = DecodeShape(4 * num_kv_heads, num_kv_heads, head_size, BLOCK)
    with fake_vllm(BAND) as vllm:
        cache = one_layer_of(vllm, layout, (5, num_kv_heads, BLOCK, 2 * head_size), torch.bfloat16)
        impl = attention_layer(vllm, Case((1,), (4,), num_kv_heads=num_kv_heads, head_size=head_size), "a").impl
    given = {name: arrays.view(name, pages) for name, pages in zip(("k_pages", "v_pages"), impl._pages_of(cache))}
    q, lse = torch.zeros(3, shape.num_q_heads, head_size, dtype=torch.bfloat16), torch.zeros(3, shape.num_q_heads)
    views = given | {"q": arrays.view("q", q), "out": arrays.view("out", q), "lse": arrays.view("lse", lse)}
    checks.check_run(shape, "bfloat16", AttentionOptions(), "NHD", 3, -1, views)
    new = arrays.view("new", torch.zeros(3, num_kv_heads, head_size, dtype=torch.bfloat16))
    lens, table = torch.ones(3, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    appended = AppendViews(new, new, given["k_pages"], given["v_pages"], arrays.view("seq_lens", lens),
                           arrays.view("block_table", table), None, None, None, None, None)
    append_checks.check_append(appended, shape=shape, dtype="bfloat16", head_dim_v=head_size, kv_dtype="bfloat16",
                               layout="NHD", rotates=False, max_positions=None, device=-1)


def test_what_vllm_is_told_when_it_asks() -> None:
    with fake_vllm(BAND) as vllm:
        backend = vllm.adapter.PersistentBackend
        for kind in (None, "auto", "float16", "bfloat16"):
            assert backend.validate_configuration(kv_cache_dtype=kind, **ASKED) == []
        for kind in {*KV_TYPES} - {"auto", "float16", "bfloat16"} | {"int4_per_token_head", "nvfp4"}:
            assert backend.validate_configuration(kv_cache_dtype=kind, **ASKED) == ["kv_cache_dtype not supported"]
        assert backend.get_name() == "CUSTOM" and backend.get_impl_cls() is vllm.adapter.FlashImpl
        assert backend.get_builder_cls() is vllm.adapter.FlashBuilder and not backend.supports_batch_invariance()


@pytest.mark.parametrize("asked", ["use_dcp", "use_pcp", "use_rswa", "use_adaptive_verification"])
def test_what_no_part_of_us_serves_is_refused_where_vllm_asks(asked) -> None:
    with fake_vllm(BAND) as vllm:
        told = vllm.members(BASE, "AttentionBackend")["validate_configuration"]
        assert asked in [name for _, name, _, _ in told["parameters"]]
        reasons = vllm.adapter.PersistentBackend.validate_configuration(kv_cache_dtype="auto", **ASKED, **{asked: True})
        assert reasons == [f"{asked} not supported"]


def test_options_that_are_unknown_are_refused_too() -> None:
    with fake_vllm(BAND) as vllm:
        vllm.configure(additional_config={"persistentkv": {"shared": True}})
        (unknown,) = vllm.adapter.PersistentBackend.validate_configuration(kv_cache_dtype="auto", **ASKED)
        assert unknown.startswith("additional_config['persistentkv']")


def test_vllm_builds_metadata_for_each_draft() -> None:
    case = Case((1, 1), (20, 3))
    with fake_vllm(BAND) as vllm:
        vllm.configure()
        layer = attention_layer(vllm, case, "a")
        builder = builder_of(vllm, ["a"])
        assert builder.supports_draft_decode_metadata_update is False
        prepared = prepare(vllm, case, layer)
        metadata = builder.build(0, prepared.common)
        drafted = builder.build_for_drafting(prepared.common, 0)
        assert drafted.decode is not metadata.decode
        torch.testing.assert_close(run(vllm, prepared, drafted), prepared.expected)


def test_models_clear_ranges_of_images_in_the_metadata_of_the_rest() -> None:
    case = Case((1, 5), (4, 0))
    with fake_vllm(BAND) as vllm:
        vllm.configure()
        prepared = prepare(vllm, case, attention_layer(vllm, case, "a"))
        builder = builder_of(vllm, ["a"])
        prepared.common.mm_req_doc_ranges = {1: [(0, 3)]}
        metadata = builder.build(0, prepared.common)
        assert metadata.mm_prefix_query_range_tensor is metadata.base.mm_prefix_query_range_tensor is not None
        metadata.mm_prefix_query_range_tensor = None
        assert metadata.base.mm_prefix_query_range_tensor is None
        decodes = builder.build(0, prepare(vllm, Case((1, 1), (4, 9)), prepared.layer).common)
        decodes.mm_prefix_query_range_tensor = None
        assert decodes.base is None and decodes.mm_prefix_query_range_tensor is None


@pytest.mark.parametrize("why", ["context", "fast prefill", "values", "not causal", "of each row"])
def test_what_is_not_served_decodes_on_vllms_own_attention(why) -> None:
    case = Case((1, 1, 5), (4, 20, 0))
    with fake_vllm(BAND) as vllm:
        vllm.configure(fast_prefill=why == "fast prefill")
        layer = attention_layer(vllm, case, "a")
        layer.head_size_v += why == "values"
        layer.impl.total_cp_world_size += why == "context"
        builder = builder_of(vllm, ["a"])
        prepared = prepare(vllm, case, layer)
        prepared.common.causal = {"not causal": False, "of each row": torch.ones(3, dtype=torch.int32)}.get(why, True)
        metadata = builder.build(0, prepared.common)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert {who for who, _, _ in vllm.writes} == {"base"} and metadata.base.common is prepared.common
        (line,) = (line for line in vllm.said if "leaves" in line)
        assert "FLASH_ATTN" in line


def test_shared_prefixes_are_planned_as_asked() -> None:
    case = Case((1, 1, 1), (40, 20, 3), layout="BLHNC")
    with fake_vllm(BAND) as vllm:
        vllm.configure(additional_config={"persistentkv": {"shared_prefixes": True}})
        layer = attention_layer(vllm, case, "a")
        builder = builder_of(vllm, ["a"])
        prepared = prepare(vllm, case, layer)
        torch.testing.assert_close(run(vllm, prepared, builder.build(0, prepared.common)), prepared.expected)
        (engine,) = vllm.engines
        assert engine.shared[-1] == 3
