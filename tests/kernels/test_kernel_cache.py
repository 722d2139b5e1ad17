"""A variant is compiled once in a process, whoever asks for it, and kept on disk until a source changes."""
from __future__ import annotations

import contextlib
import sys
import threading
import types

import pytest

from gpu.inputs.block_tables import TableLayout
from gpu.kernels import compile as kernels
from gpu.kernels.variant import kernel_config
from pkvsim import AttentionOptions, DecodeShape


@pytest.fixture()
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list:
    """What is handed to NVRTC, on a copy of one source."""
    seen: list = []
    (tmp_path / "balanced.cu").write_text("// kernels\n")
    monkeypatch.setattr(kernels, "SOURCE_DIR", tmp_path)
    monkeypatch.setitem(sys.modules, "cupy",
                        types.SimpleNamespace(RawModule=lambda **module: seen.append(module) or object()))
    for cached in (kernels._load, kernels.source_hash):
        cached.cache_clear()
    yield seen
    for cached in (kernels._load, kernels.source_hash):
        cached.cache_clear()


def defines(**options) -> dict[str, int]:
    config = kernel_config(DecodeShape(32, 8, 128, 16), "float16", 90, options=AttentionOptions(**options))
    return config.defines() | TableLayout().defines()


def test_a_variant_is_compiled_once(compiled) -> None:
    first = kernels.load_module("balanced.cu", defines())
    assert kernels.load_module("balanced.cu", dict(reversed(defines().items()))) is first and len(compiled) == 1
    assert kernels.load_module("balanced.cu", defines(sinks=True)) is not first and len(compiled) == 2
    assert compiled[0]["options"] != compiled[1]["options"]


def test_the_disk_cache_is_left_when_a_header_changes(compiled, tmp_path) -> None:
    """CuPy's key is the options and the .cu file, which only names its headers."""
    kernels.load_module("balanced.cu", defines())
    (tmp_path / "plan.cuh").write_text("// changed\n")
    kernels.source_hash.cache_clear(), kernels._load.cache_clear()
    kernels.load_module("balanced.cu", defines())
    before, after = compiled
    assert before["code"] == after["code"] and before["options"] != after["options"]


def test_two_threads_may_ask_for_an_architecture_alone(compiled, monkeypatch) -> None:
    """CuPy's function is everybody's: one thread must not take what the other has put there for its own."""
    asked, original = [], lambda arch=None: ("-arch=sm_90", "cubin")
    compiler = types.SimpleNamespace(_get_arch_for_options_for_nvrtc=original)
    both = threading.Barrier(2)

    class Module:
        def compile(self) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # for the other to come in, if nothing keeps it out
            asked.append(compiler._get_arch_for_options_for_nvrtc())

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(
        RawModule=lambda **module: Module(), cuda=types.SimpleNamespace(compiler=compiler)))
    threads = [threading.Thread(target=kernels.load_module, args=("balanced.cu", {"READ_TILES": 4, "STAGES": stages}))
               for stages in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [("-arch=sm_90a", "cubin")] * 2 and compiler._get_arch_for_options_for_nvrtc is original
