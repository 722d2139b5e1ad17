"""vLLM's recorded interfaces: our overrides take what theirs do, and bands are served that are recorded."""
from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest
from paths import ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
from fake_vllm import INTERFACES, OWN_MODULES, fake_vllm
from vllm_behaviours import BASE, FLASH
from vllm_bench.cases import write_plugin

from gpu.drop_ins.vllm import plugin as vllm_plugin
from tests.drop_ins import record_vllm

RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted(INTERFACES.glob("*.json"))}
OVERRIDES = {  # what of ours stands where which of vLLM's does
    "FlashBuilder": (BASE, "AttentionMetadataBuilder"),
    "TritonBuilder": (BASE, "AttentionMetadataBuilder"),
    "FlashImpl": (FLASH, "FlashAttentionImpl"),
    "TritonImpl": ("vllm.v1.attention.backends.triton_attn", "TritonAttentionImpl"),
    "PersistentBackend": (BASE, "AttentionBackend"),
}
IN_BANDS = [("0.24", ours) for ours in OVERRIDES] + [
    ("0.33", ours) for ours in ("FlashBuilder", "FlashImpl", "PersistentBackend")]
# What of the modules written for 0.24 another band's class has no use for, since the release has no such name.
GONE = {"0.33": [
    f"{BASE}.AttentionBackend.get_kv_cache_shape", f"{BASE}.AttentionMetadataBuilder.use_cascade_attention",
    f"{FLASH}.FlashAttentionBackend.get_kv_cache_shape", f"{FLASH}.FlashAttentionBackend.get_kv_cache_stride_order",
    f"{FLASH}.FlashAttentionMetadata.mm_prefix_range_tensor",
    *(f"vllm.v1.attention.backends.triton_attn.TritonAttentionBackend.get_kv_cache_{what}"
      for what in ("shape", "stride_order"))]}


@pytest.mark.parametrize(("band", "ours"), IN_BANDS)
def test_overrides_take_what_vllm_passes(band, ours) -> None:
    module, name = OVERRIDES[ours]
    with fake_vllm(band) as vllm:
        own = getattr(vllm.adapter, ours)
        members = RECORDED[band]["modules"][module][name]["members"]
        methods = {member: what for member, what in members.items() if isinstance(what, dict)}
        mine = [one for one in own.__mro__ if one.__module__ in OWN_MODULES]
        checked = 0
        for method, recorded in methods.items():
            if not any(method in vars(one) for one in mine):
                continue
            checked += 1
            found = inspect.signature(getattr(own, method)).parameters
            if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in found.values()):
                continue
            wanted = [parameter for _, parameter, _, _ in recorded["parameters"]]
            bound = "staticmethod" not in recorded["decorators"] and "classmethod" in recorded["decorators"]
            assert [*found] == wanted[bound:], method
            for _, parameter, _, default in recorded["parameters"][bound:]:
                given = found[parameter].default
                assert (given is inspect.Parameter.empty) == (default is None), (method, parameter)
                assert default is None or repr(given) == default, (method, parameter)
        assert checked


def test_bands_are_served_that_are_recorded_and_have_what_their_class_touches() -> None:
    assert record_vllm.WRITTEN_FOR in vllm_plugin.BANDS and {*vllm_plugin.BANDS} == {*RECORDED}
    for band, interface in RECORDED.items():
        assert record_vllm.missing(interface) == GONE.get(band, []), band


def test_all_that_is_touched_is_in_the_release_that_the_adapter_was_written_for() -> None:
    """A name that is looked for and never found would stay unnoticed in all later releases."""
    written_for = RECORDED[record_vllm.WRITTEN_FOR]
    assert record_vllm.missing(written_for) == []
    written_for = json.loads(json.dumps(written_for))
    del written_for["modules"][BASE]["AttentionLayer"]["members"]["_k_scale"]
    written_for["modules"]["vllm.logger"]["init_logger"] = None
    assert record_vllm.missing(written_for) == ["vllm.logger.init_logger", f"{BASE}.AttentionLayer._k_scale"]


@pytest.mark.parametrize("base", ["flash_attn", "triton_attn"])
def test_caches_lie_as_layers_read_them(base) -> None:
    """Layers take K and V from the second axis, blocks NHD, and blocks' strides as they come; stores are our call."""
    kind = {"flash_attn": "FlashAttentionBackend", "triton_attn": "TritonAttentionBackend"}[base]
    members = RECORDED[record_vllm.WRITTEN_FOR]["modules"][f"vllm.v1.attention.backends.{base}"][kind]["members"]
    axes = [result.strip("()").split(", ") for result in members["get_kv_cache_shape"]["results"]]
    assert axes and all(one[:4] == ["num_blocks", "2", "block_size", "num_kv_heads"] and one[4].startswith("head_size")
                        for one in axes)
    orders = [eval(result) for result in members["get_kv_cache_stride_order"]["results"]]
    assert {order for order in orders if len(order) == 5} == {(0, 1, 2, 3, 4), (0, 1, 3, 2, 4)}
    assert members["forward_includes_kv_cache_update"] == ["bool", "False"]


@pytest.mark.parametrize("base", ["flash_attn.FlashAttentionImpl", "triton_attn.TritonAttentionImpl"])
@pytest.mark.parametrize("method", ["forward", "do_kv_cache_update"])
def test_layers_take_k_and_v_from_the_second_axis(base, method) -> None:
    module, _, name = base.partition(".")
    members = RECORDED[record_vllm.WRITTEN_FOR]["modules"][f"vllm.v1.attention.backends.{module}"][name]["members"]
    assert members[method]["reads"] == ["kv_cache.unbind(1)"]


def test_the_table_of_differences_is_that_of_the_records() -> None:
    assert (INTERFACES / "differences.md").read_text() == record_vllm.write_table()


def test_records_come_from_a_wheels_own_sources(tmp_path) -> None:
    wheel = tmp_path / "vllm-9.8.7-cp38-abi3-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/config/__init__.py", "from vllm.config.deep import get_current_vllm_config as "
                                                    "get_current_vllm_config\nfrom vllm.config.deep import ModelConfig")
        archive.writestr("vllm/config/deep.py", "class ModelConfig:\n    dtype: int = 3\n    other = 4\n"
                                                "def get_current_vllm_config(a, *b, c: int = 1, **d): ...\n")
        archive.writestr("vllm/v1/attention/backend.py", """
class AttentionBackend:
    def validate_configuration(cls, a):
        return cls.supports_b(cls.supports_a) or cls.is_c() or other.supports_d()
""")
        archive.writestr("vllm/v1/attention/backends/flash_attn.py", """
class FlashAttentionImpl:
    def forward(self, kv_cache):
        a, b = kv_cache.unbind(1)
        a, b = kv_cache.unbind(1)
        c, d = a, b
class FlashAttentionBackend:
    def get_kv_cache_shape(a):
        if a:
            return (a, 2)
        order = (1, 0)
        other = (3, 4)
        return order
""")
    found = record_vllm.record(wheel)
    assert found["release"] == "9.8.7" and found["modules"]["vllm.config"]["VllmConfig"] is None
    flat = record_vllm.flatten(found)
    assert flat["vllm.config.ModelConfig.dtype"] == ": int = 3" and "vllm.config.ModelConfig.other" not in flat
    assert flat["vllm.config.get_current_vllm_config"] == "(a, *b, c=1, **d)"
    backend = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    assert flat[f"{backend}.get_kv_cache_shape"] == "(a) -> (a, 2) or (1, 0)"
    assert flat[f"{BASE}.AttentionBackend.validate_configuration"] == "(cls, a) asks is_c or supports_b"
    assert flat[f"{FLASH}.FlashAttentionImpl.forward"] == "(self, kv_cache) takes kv_cache.unbind(1)"
    gone = record_vllm.missing(found)
    assert f"{backend}.get_kv_cache_stride_order" in gone and "vllm.config.CacheConfig" in gone
    assert "vllm.config.ModelConfig.dtype" not in gone
    gone = [name for name, _, new in record_vllm.differences(RECORDED["0.24"], found) if new == "-"]
    assert "vllm.logger.init_logger" in gone


RELEASES = (("0.24.0", "0.24"), ("0.24.1rc2+cu130", "0.24"), ("0.33.0", "0.33"), ("0.33.1+cu130", "0.33"),
            *((release, None) for release in ("0.25.0", "0.32.2", "0.34.0", "0.3.3", None)))


@pytest.mark.parametrize("release, band", RELEASES)
def test_the_entry_point_registers_or_says_in_one_line_why_not(release, band, monkeypatch, caplog) -> None:
    def version(name: str) -> str:
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(vllm_plugin, "version", version)
    with fake_vllm(band or "0.24") as vllm, caplog.at_level(logging.WARNING):
        vllm_plugin.register()
        lines = [record.getMessage() for record in caplog.records]
        vllm_plugin.register()  # vLLM may load plug-ins more than once
        assert vllm.registered == ({"CUSTOM": vllm_plugin.BANDS[band]} if band else {})
        module, _, name = vllm_plugin.BANDS[band or "0.24"].rpartition(".")
        assert vllm.adapter.__name__ == module and hasattr(vllm.adapter, name)
    if band:
        assert not lines
    else:
        (line,) = lines
        assert (f"vLLM {release}" in line or release is None) and "0.24.x and 0.33.x and is not" in line


def test_the_entry_point_of_the_package_and_of_a_working_tree(tmp_path) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    told = setup["options.entry_points"]["vllm.general_plugins"].strip()
    code = ("from importlib.metadata import entry_points\n"
            "(one,) = {e for e in entry_points(group='vllm.general_plugins') if e.name == 'persistentkv'}\n"
            "print(one.name, '=', one.value, one.load().__name__)")
    path = os.pathsep.join([str(write_plugin(tmp_path)), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == f"{told} register"
