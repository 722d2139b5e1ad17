"""The vLLM adapter's shared_prefixes on stand-ins: the option, which steps are planned with groups, what is said."""
from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from fake_gpu import fake_gpu
from fake_vllm import FakeVllm, fake_vllm
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_plain import PlainEngine
from vllm_steps import Case, attention_layer, builder_of, prepare, run

from gpu.drop_ins.vllm.engine_slot import EngineSlot, sizes
from gpu.drop_ins.vllm.options import PluginOptions, read_options
from pkvsim import DecodeShape

SHARED = {"persistentkv": {"shared_prefixes": True}}
CASE = Case((1, 1, 1), (40, 20, 3))
LETTERS = "shared_\n\"0é"
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(LETTERS, max_size=6),
                    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(LETTERS, max_size=6), of, max_size=3))
GIVEN = st.fixed_dictionaries({}, optional={"shared_prefixes": st.booleans() | JSON}) | JSON


@given(st.fixed_dictionaries({}, optional={"persistentkv": GIVEN, "gdn_prefill_backend": JSON}))
def test_options_are_read_or_refused_by_name(config) -> None:
    config = json.loads(json.dumps(config))
    own = config.get("persistentkv", {})
    right = own in ({}, {"shared_prefixes": True}, {"shared_prefixes": False}) and isinstance(own, dict) and all(
        isinstance(value, bool) for value in own.values())
    if right:
        assert read_options(config) == PluginOptions(shared_prefixes=own.get("shared_prefixes", False))
    else:
        with pytest.raises(ValueError, match=r"^additional_config\['persistentkv'\]") as refusal:
            read_options(config)
        assert "\n" not in str(refusal.value)


def test_configs_of_others_say_nothing() -> None:
    assert read_options(object()) == read_options({}) == read_options({"other": 3}) == PluginOptions()


WRONG = ({"persistentkv": {"shared_prefix": True}}, {"persistentkv": {"shared_prefixes": "yes"}}, {"persistentkv": 1})


@pytest.mark.parametrize("config", WRONG)
def test_vllm_is_told_of_wrong_options_when_it_asks(config) -> None:
    with fake_vllm() as vllm:
        vllm.configure(additional_config=config)
        asked = dict.fromkeys(("head_size", "dtype", "block_size", "use_mla", "has_sink", "use_sparse", "use_mm_prefix",
                               "use_per_head_quant_scales", "device_capability", "attn_type"))
        (reason,) = vllm.adapter.PersistentBackend.validate_configuration(kv_cache_dtype="auto", **asked)
        assert reason.startswith("additional_config['persistentkv']")
        attention_layer(vllm, CASE, "a")
        with pytest.raises(ValueError, match=r"^additional_config\['persistentkv'\]"):
            builder_of(vllm, ["a"])


@given(st.integers(1, 5000))
def test_sizes_that_are_tried_are_the_most_and_powers_of_two(most) -> None:
    found = [*sizes(most)]
    assert found == sorted({*found}, reverse=True) and found[:1] == [most] * (most > 1)
    assert {*found[1:]} == {2**power for power in range(1, 13) if 2**power < most}


@settings(deadline=None, max_examples=12)
@given(st.integers(2, 700), st.sampled_from([(32, 8), (28, 4), (8, 8), (64, 2)]),
       st.sampled_from([86, 90]), st.data())
def test_steps_of_every_size_find_their_kernels_compiled(most, heads, capability, data) -> None:
    """On the engine's own host side: no plan after prepare_sharing() loads a kernel, whatever its rows."""
    with fake_gpu(compute_capability=capability) as gpu:
        from gpu.decode_engine import DecodeEngine

        engine, tried = DecodeEngine(DecodeShape(*heads, 64, 16), layout="NHD"), []

        def plan(num_rows: int, groups: str | None) -> None:
            lens, table = (gpu.array(np.zeros(shape, np.int32)) for shape in (num_rows, (num_rows, 9)))
            engine.plan(lens, table, groups=groups)

        slot = EngineSlot(SimpleNamespace(plan=lambda lens, table, groups=None: plan(len(lens), groups)),
                          torch.empty(0))
        plan(1, None)
        slot.prepare_sharing(most, 1, tried.append)
        assert tried == [rows for rows in sizes(most) if rows <= slot.most_sharing] and tried
        loaded = len(gpu.kernels)
        for rows in {*data.draw(st.lists(st.integers(2, slot.most_sharing), max_size=9)), 2, 3, slot.most_sharing}:
            plan(min(rows, slot.most_sharing), "auto")
        assert len(gpu.kernels) == loaded


def prepared_step(vllm: FakeVllm, case: Case = CASE, **configured: object) -> tuple[object, object, PlainEngine]:
    """(a step, its metadata, the engine of its rows with one query token)."""
    vllm.configure(**configured)
    layer = attention_layer(vllm, case, "a")
    builder = builder_of(vllm, ["a"])
    prepared = prepare(vllm, case, layer)
    (engine,) = (engine for engine in vllm.engines if engine.query_tokens == 1)
    return prepared, builder.build_for_cudagraph_capture(prepared.common), engine


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vllm.persistentkv"]


@pytest.mark.parametrize("capturing", [False, True])
def test_steps_are_planned_with_groups_once_for_all_layers(capturing, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    with fake_vllm() as vllm:
        prepared, metadata, engine = prepared_step(vllm, additional_config=SHARED)
        assert engine.shared == [16, 16, 8, 8, 4, 4, 2, 2]  # taken, and then run
        (line,) = said(caplog)
        assert "once, in steps of 2 to 16 rows" in line
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        plans, again = engine.plans, builder_of(vllm, ["a"])
        metadata = again.build_for_cudagraph_capture(prepared.common)
        for _ in range(2):  # two layers
            torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert engine.plans == plans + 1 and engine.shared[8:] == [3, 3] and len(said(caplog)) == 1
        assert {who for who, _, _ in vllm.writes} == {"ours"}


def test_without_the_option_nothing_is_planned_with_groups(caplog) -> None:
    caplog.set_level(logging.INFO)
    with fake_vllm() as vllm:
        prepared, metadata, engine = prepared_step(vllm, additional_config={"persistentkv": {"shared_prefixes": False}})
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert not engine.shared and not said(caplog)


def test_one_row_has_nothing_to_share() -> None:
    with fake_vllm() as vllm:
        prepared, metadata, engine = prepared_step(vllm, Case((1,), (40,)), additional_config=SHARED)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert 1 not in engine.shared


@pytest.mark.parametrize("case, configured, words", [
    (Case((1, 1), (40, 20), window=7), {}, "in some layers, .*: window: expected None with groups"),
    (Case((2, 2), (40, 20)), {"drafts": 1}, "for each row in steps whose rows have 2 query tokens"),
])
def test_layers_without_common_reads_decode_apart(case, configured, words, caplog) -> None:
    with fake_vllm() as vllm:
        prepared, metadata, _ = prepared_step(vllm, case, additional_config=SHARED, **configured)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert {who for who, _, _ in vllm.writes} == {"ours"}
        (line,) = said(caplog)
        assert re.search(words, line)


def test_steps_of_too_many_rows_decode_apart(caplog) -> None:
    caplog.set_level(logging.INFO)
    with fake_vllm() as vllm:
        vllm.most_grouped = 4
        prepared, metadata, engine = prepared_step(vllm, additional_config=SHARED)
        assert engine.shared == [4, 4, 2, 2]
        taken, refused = said(caplog)
        assert "2 to 4 rows" in taken and "in larger steps" in refused and "at most 4 rows, got 8" in refused
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        many = prepare(vllm, Case((1,) * 5, (9,) * 5), prepared.layer)
        torch.testing.assert_close(run(vllm, many, builder_of(vllm, ["a"]).build(0, many.common)), many.expected)
        assert engine.shared[4:] == [3] and len(said(caplog)) == 2


def test_a_step_that_is_refused_with_its_own_table_decodes_apart_from_then_on(caplog) -> None:
    with fake_vllm() as vllm:
        prepared, metadata, engine = prepared_step(vllm, additional_config=SHARED)
        vllm.most_grouped = 2
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        vllm.most_grouped = 16
        again = builder_of(vllm, ["a"]).build(0, prepared.common)
        torch.testing.assert_close(run(vllm, prepared, again), prepared.expected)
        assert 3 not in engine.shared
        (line,) = said(caplog)
        assert "steps of more than 2 rows" in line and "at most 2 rows, got 3" in line


def test_a_capture_allocates_nothing(monkeypatch, caplog) -> None:
    """Without a step of as many rows before it, the capture leaves pages apart."""
    with fake_vllm() as vllm:
        prepared, metadata, engine = prepared_step(vllm, additional_config=SHARED)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        torch.testing.assert_close(run(vllm, prepared, metadata), prepared.expected)
        assert 3 not in engine.shared
        (line,) = said(caplog)
        assert "graph of 3 rows" in line
