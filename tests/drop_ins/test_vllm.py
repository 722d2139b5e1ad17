"""The vLLM adapter on stand-ins of recorded interfaces: steps of each band cut anywhere, and what 0.24's leaves to vLLM."""
from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from fake_vllm import fake_vllm
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_steps import LAYOUTS, Case, attention_layer, builder_of, cases, prepare, run

from gpu.drop_ins.vllm.engines import KV_TYPES, own_planes
from gpu.drop_ins.vllm.step import cut_step, served_query_tokens

CACHES = ("auto", "fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head")


LAYERS = st.builds(dict, kv_cache_dtype=st.sampled_from(CACHES), hnd=st.just(True)) | st.builds(
    dict, kv_cache_dtype=st.sampled_from(CACHES), spread=st.sampled_from([1, 2]))


OF_BANDS = st.tuples(st.just("0.24"), cases(LAYERS)) | st.tuples(
    st.just("0.33"), cases(st.builds(dict, layout=st.sampled_from(LAYOUTS))))


@given(OF_BANDS, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_every_token_is_attended_once_and_right(step, seed) -> None:
    band, (case, drafts) = step
    with fake_vllm(band) as vllm:
        vllm.configure(cache_dtype=case.kv_cache_dtype, drafts=drafts)
        layer = attention_layer(vllm, case, "layer")
        builder = builder_of(vllm, ["layer"])
        prepared = prepare(vllm, case, layer, seed=seed)
        metadata = builder.build(0, prepared.common)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected, atol=1e-5, rtol=1e-5)
        by = {who for who, _, _ in vllm.writes}
        assert ("ours" in by) == (case.query_lens[0] in served_query_tokens(drafts or 0))
        if len({*case.query_lens}) == 1 and "ours" in by:
            assert by == {"ours"} and metadata.base is None


@given(OF_BANDS, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=24)
def test_captured_decode_steps_store_by_our_kernel(step, seed) -> None:
    band, (case, drafts) = step
    with fake_vllm(band) as vllm, pytest.MonkeyPatch.context() as patch:
        vllm.configure(cache_dtype=case.kv_cache_dtype, drafts=drafts)
        layer = attention_layer(vllm, case, "layer")
        builder = builder_of(vllm, ["layer"])
        prepared = prepare(vllm, case, layer, seed=seed)
        metadata = builder.build_for_cudagraph_capture(prepared.common)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected, atol=1e-5, rtol=1e-5)
        whole = {*case.query_lens} == {1} and case.kv_cache_dtype != "fp8_per_token_head" and drafts is None
        assert vllm.stored == [len(case.query_lens) + case.padding] * whole


@pytest.mark.parametrize("asked, capturing, ranks, with_metadata", [
    (False, True, 1, True), (True, False, 1, True), (True, True, 2, True), (True, True, 1, False)])
def test_other_steps_store_by_vllms_slots(asked, capturing, ranks, with_metadata, monkeypatch) -> None:
    case = Case((1, 1), (20, 3))
    with fake_vllm() as vllm:
        monkeypatch.setattr(vllm.builder, "APPENDS_IN_GRAPHS", asked)
        vllm.configure(data_parallel_size=ranks)
        layer = attention_layer(vllm, case, "layer")
        builder = builder_of(vllm, ["layer"])
        prepared = prepare(vllm, case, layer)
        metadata = builder.build(0, prepared.common)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        vllm.step = {"layer": metadata} if with_metadata else None  # graphs of pieces are captured without any
        layer.impl.do_kv_cache_update(layer, prepared.key, prepared.value, prepared.cache, metadata.slot_mapping)
        assert not vllm.stored
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(0, 12), min_size=0, max_size=9), st.integers(0, 9), st.integers(1, 9), st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_cuts_leave_no_token_and_take_none_twice(lens, drafts, most_rows, more) -> None:
    served = served_query_tokens(drafts)
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    cut = cut_step(starts, sum(lens) + more, served, most_rows)
    assert 0 <= cut.rows <= min(len(lens), most_rows) and cut.query_tokens in (*served, 1)
    assert all(length in (0, cut.query_tokens) for length in lens[:cut.rows])
    assert cut.rows * cut.query_tokens <= sum(lens) + more
    assert cut.rest == any(lens[cut.rows:])
    assert not cut.rest or all(lens[:cut.rows])  # padding is last
    assert cut.rows or not lens or lens[0] not in served or lens[0] == 0


def test_query_tokens_that_decode() -> None:
    assert [served_query_tokens(drafts) for drafts in (0, 1, 7, 8)] == [(1,), (1, 2), (1, 8), (1,)]


@pytest.mark.parametrize("drafts, left", [(None, 0), (7, 0), (8, 1), (9, 1)])
def test_rows_of_more_drafts_than_are_served_are_said_to_stay_with_vllm(drafts, left) -> None:
    """The line that decode steps run here would be untrue of them: all rows verify drafts in most steps."""
    case = Case((1 + (drafts or 0),) * 2, (4, 20))
    with fake_vllm() as vllm:
        vllm.configure(drafts=drafts)
        layer = attention_layer(vllm, case, "a")
        builder = builder_of(vllm, ["a"])
        lines = [line for line in vllm.said if "leaves rows" in line]
        assert len(lines) == left
        assert all(f"verify {drafts} drafts to vLLM's FLASH_ATTN" in line and "8 query tokens" in line for line in lines)
        prepared = prepare(vllm, case, layer)
        torch.testing.assert_close(run(vllm, prepared, builder.build(0, prepared.common)), prepared.expected)
        assert {who for who, _, _ in vllm.writes} == ({"base"} if left else {"ours"})


@pytest.mark.parametrize("hnd", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_planes_of_values_and_scales_share_a_block_without_overlap(hnd, heads) -> None:
    inner = (heads, 16) if hnd else (16, heads)
    whole = torch.zeros(10, 2, *inner, 20, dtype=torch.int8)
    cache = whole[1::2].transpose(2, 3) if hnd else whole[1::2]
    values, k_scales, v_scales = own_planes(cache, 16)
    values.copy_(torch.randint(-99, 99, values.shape))
    k_scales.copy_(torch.rand(k_scales.shape)), v_scales.copy_(torch.rand(v_scales.shape))
    kept = values.clone(), k_scales.clone(), v_scales.clone()
    again = own_planes(cache, 16)
    assert all(torch.equal(a, b) for a, b in zip(kept, again)) and not whole[::2].any()
    assert values.shape == (5, 2, 16, heads, 16) and k_scales.shape == v_scales.shape == (5, 16, heads)
    for other, size in ((cache, 15), (cache.short(), 16), (cache[..., :19], 15), (torch.zeros(
            5, 2, 16, heads, 24, dtype=torch.int8)[..., :20], 16)):
        with pytest.raises(ValueError, match="^kv_cache"):
            own_planes(other, size)


def test_a_step_is_planned_once_for_all_layers_and_its_table_updated_for_other_groups() -> None:
    case = Case((1, 1, 9), (4, 20, 3))
    with fake_vllm() as vllm:
        vllm.configure()
        layers = [attention_layer(vllm, case, name) for name in "ab"]
        others = attention_layer(vllm, case, "c")
        builder, other = builder_of(vllm, ["a", "b"]), builder_of(vllm, ["c"])
        assert len(vllm.engines) == 2 and builder.supports_update_block_table
        assert len([line for line in vllm.said if "decodes on" in line]) == 3  # one text, which vLLM logs once
        prepared = prepare(vllm, case, layers[0])
        metadata = builder.build(0, prepared.common)
        plans = vllm.engines[0].plans
        for layer in layers:
            prepared.layer = layer
            torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert vllm.engines[0].plans == plans + 1
        moved = prepare(vllm, case, others, seed=1)
        updated = other.update_block_table(metadata, moved.common.block_table_tensor, moved.common.slot_mapping)
        torch.testing.assert_close(run(vllm, moved, updated), moved.expected)
        assert type(updated) is type(metadata) and vllm.engines[1].plans == 2
        again = builder_of(vllm, ["a", "b"])  # as after profiling: graphs may use the engines that there are
        assert len(vllm.engines) == 2 and again.build_for_cudagraph_capture(prepared.common).decode.num_rows == 2


def test_what_vllm_wraps_around_it() -> None:
    """Subclassed builders set attributes on metadata, or make metadata of a subclass that has its fields copied."""
    case = Case((1, 1), (4, 20))
    with fake_vllm() as vllm:
        vllm.configure()
        layer = attention_layer(vllm, case, "a")
        builder = builder_of(vllm, ["a"])
        prepared = prepare(vllm, case, layer)
        metadata = builder.build(0, prepared.common)
        metadata.make_virtual_batches_block_table = max
        updated = builder.update_block_table(metadata, prepared.common.block_table_tensor, metadata.slot_mapping)
        assert updated.make_virtual_batches_block_table is max

        class Wrapped(type(metadata)):
            def __init__(self, other: object) -> None:
                for one in dataclasses.fields(type(other)):
                    setattr(self, one.name, getattr(other, one.name))
                self.num_logits_indices = 3

        wrapped = builder.update_block_table(Wrapped(metadata), prepared.common.block_table_tensor,
                                             metadata.slot_mapping)
        assert wrapped.num_logits_indices == 3
        torch.testing.assert_close(run(vllm, prepared, wrapped), prepared.expected)
        drafted = builder.build_for_drafting(prepared.common, 0)
        torch.testing.assert_close(run(vllm, prepared, drafted), prepared.expected)


def test_layers_that_join_a_drafters_builder_decode_too() -> None:
    case = Case((1, 1), (4, 20))
    with fake_vllm() as vllm:
        vllm.configure()
        layers, names = [attention_layer(vllm, case, name) for name in "ab"], ["a"]
        builder = builder_of(vllm, names)
        names.append("b")
        prepared = prepare(vllm, case, layers[1])
        torch.testing.assert_close(run(vllm, prepared, builder.build(0, prepared.common)), prepared.expected)
        assert {who for who, _, _ in vllm.writes} == {"ours"}


UNSERVED = ("engine", "ubatching", "fast prefill", "values", "encoder", "alibi", "context", "not causal", "images")


@pytest.mark.parametrize("why", UNSERVED)
def test_what_is_not_served_decodes_on_vllms_own_attention(why) -> None:
    case = Case((1, 1, 5), (4, 20, 0))
    with fake_vllm() as vllm:
        vllm.configure(ubatching=why == "ubatching", fast_prefill=why == "fast prefill")
        layer = attention_layer(vllm, case, "a")
        vllm.refused = "head_dim: expected one of (64, 128), got 16" if why == "engine" else None
        layer.head_size_v += why == "values"
        layer.impl.attn_type = "encoder_decoder" if why == "encoder" else "decoder"
        layer.impl.alibi_slopes = [0.5] * 4 if why == "alibi" else None
        layer.impl.total_cp_world_size += why == "context"
        builder = builder_of(vllm, ["a"])
        prepared = prepare(vllm, case, layer)
        prepared.common.causal = why != "not causal"
        prepared.common.mm_req_doc_ranges = {0: [], 2: [(0, 3)]} if why == "images" else None
        metadata = builder.build(0, prepared.common)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert {who for who, _, _ in vllm.writes} == {"base"} and metadata.base.common is prepared.common
        (line,) = (line for line in vllm.said if "leaves" in line)
        assert "FLASH_ATTN" in line
        if why in ("not causal", "images"):
            assert {"not causal": "whose attention is not causal", "images": "with images"}[why] in line
            assert builder.reorder_batch_threshold == 1
        else:
            assert "leaves decode steps" in line and builder.reorder_batch_threshold is None
            assert builder.supports_update_block_table is False


def test_texts_beside_images_decode() -> None:
    case = Case((1, 1, 5), (4, 20, 0))
    with fake_vllm() as vllm:
        vllm.configure()
        layer = attention_layer(vllm, case, "a")
        prepared = prepare(vllm, case, layer)
        prepared.common.mm_req_doc_ranges = {0: [], 2: []}
        metadata = builder_of(vllm, ["a"]).build(0, prepared.common)
        assert metadata.decode.num_rows == 2 and metadata.base.common.mm_req_doc_ranges == {0: []}
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks_are_kept_with_the_weights_and_follow_reloaded_ones_in_place(dtype) -> None:
    """What a builder allocates lies with the caches, whose contents vLLM's sleep mode drops."""
    case = Case((1,), (4,), sinks=True)
    with fake_vllm() as vllm:
        vllm.configure()
        layer = attention_layer(vllm, case, "a")
        layer.impl.sinks = layer.impl.sinks.to(dtype)
        layer.impl.process_weights_after_loading(torch.bfloat16)
        with_weights = layer.impl._kept_sinks().data_ptr()
        builder_of(vllm, ["a"])
        held = layer.impl._decoder.sinks
        assert held.data_ptr() == with_weights and torch.equal(held, layer.impl.sinks.float())
        address = held.data_ptr()
        layer.impl.sinks.fill_(0.5)
        layer.impl.process_weights_after_loading(torch.bfloat16)
        assert held.dtype == torch.float32 and held.data_ptr() == address and (held == 0.5).all()


@pytest.mark.parametrize("cache", ["auto", "int8_per_token_head"])
def test_layers_that_read_what_others_stored_are_given_no_keys(cache) -> None:
    case = Case((1, 1, 5), (4, 20, 0), kv_cache_dtype=cache)
    with fake_vllm() as vllm:
        vllm.configure(cache_dtype=cache)
        layer = attention_layer(vllm, case, "a")
        prepared = prepare(vllm, case, layer)
        metadata = builder_of(vllm, ["a"]).build(0, prepared.common)
        run(vllm, prepared, metadata)
        out = torch.empty_like(prepared.query)
        layer.impl.forward(layer, prepared.query, None, None, prepared.cache, metadata, out)
        torch.testing.assert_close(out[:len(prepared.expected)], prepared.expected, atol=1e-5, rtol=1e-5)


def test_models_clear_ranges_of_images_in_the_metadata_of_the_rest() -> None:
    """Gemma 4 attends to whole images in its layers with a window alone, and sets what others' metadata says to None."""
    case = Case((1, 5), (4, 0))
    with fake_vllm() as vllm:
        vllm.configure()
        prepared = prepare(vllm, case, attention_layer(vllm, case, "a"))
        builder = builder_of(vllm, ["a"])
        prepared.common.mm_req_doc_ranges = {1: [(0, 3)]}
        metadata = builder.build(0, prepared.common)
        for name in ("mm_prefix_range", "mm_prefix_range_tensor"):
            assert getattr(metadata, name) is getattr(metadata.base, name) is not None
            setattr(metadata, name, None)
            assert getattr(metadata.base, name) is None
        prepared.common.mm_req_doc_ranges = None
        decodes = builder.build(0, prepare(vllm, Case((1, 1), (4, 9)), prepared.layer).common)
        decodes.mm_prefix_range = decodes.mm_prefix_range_tensor = None
        assert decodes.base is None and decodes.mm_prefix_range is decodes.mm_prefix_range_tensor is None


def test_profiling_outputs_and_refusals() -> None:
    case = Case((1,), (4,))
    with fake_vllm() as vllm:
        vllm.configure()
        layer = attention_layer(vllm, case, "a")
        out = torch.ones(3, 4, 16)
        assert (layer.impl.forward(layer, None, None, None, None, None, out) == 0).all()
        assert not layer.impl.fused_output_quant_supported(None)
        with pytest.raises(NotImplementedError, match="^output_scale"):
            layer.impl.forward(layer, None, None, None, None, object(), out, output_scale=out)


def test_what_vllm_is_told_when_it_asks() -> None:
    with fake_vllm() as vllm:
        backend = vllm.adapter.PersistentBackend
        asked = dict.fromkeys(("head_size", "dtype", "block_size", "use_mla", "has_sink", "use_sparse", "use_mm_prefix",
                               "use_per_head_quant_scales", "device_capability", "attn_type"))
        for kind in (None, *KV_TYPES):
            assert backend.validate_configuration(kv_cache_dtype=kind, **asked) == []
        assert backend.validate_configuration(kv_cache_dtype="nvfp4", **asked) == ["kv_cache_dtype not supported"]
        assert backend.validate_configuration(kv_cache_dtype="auto", use_kv_connector=True, **asked) == []
        for given_too in ({"use_batch_invariant": True}, {"use_kv_connector": True}):
            (reason,) = backend.validate_configuration(kv_cache_dtype="int8_per_token_head", **asked, **given_too)
            assert "not supported" in reason
        assert backend.get_name() == "CUSTOM" and backend.get_impl_cls() is vllm.adapter.FlashImpl
        vllm.configure(cache_dtype="fp8")
        assert backend.get_impl_cls() is vllm.adapter.TritonImpl
        assert backend.get_builder_cls() is vllm.adapter.TritonBuilder
        assert not attention_layer(vllm, Case((1,), (1,), kv_cache_dtype="fp8"), "a").impl.supports_quant_query_input
        mixed = Case((1,), (1,))  # a layer that stays at 16 bits
        layer = attention_layer(vllm, mixed, "b")
        builder_of(vllm, ["b"])
        assert layer.impl._decoder.kind.kv_dtype is None and layer.impl._scales(layer) == (None, None)
