"""Which errors say that FlashInfer's kernels could not be built, and which are faults."""
from __future__ import annotations

import logging
import os
import types

import pytest
from gpu_needs import flashinfer_can_build, flashinfer_kernels

from gpu.routes import route_engines as routes
from gpu.routes import router as router_module
from gpu.routes.flashinfer_builds import build_failure, why_not
from gpu.routes.router import Router
from pkvsim import DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.policy.by_name import FixedPolicy

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)


class MissingJITCacheError(RuntimeError):
    """As FlashInfer's."""

    spec = types.SimpleNamespace(name="batch_decode_with_kv_cache_f16")


FAILURES = {
    "Could not find nvcc": RuntimeError("Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist"),
    "Ninja build failed": RuntimeError("Ninja build failed. Ninja output:\nFAILED: x.o"),
    "'ninja'": FileNotFoundError(2, "No such file or directory", "ninja"),
    "batch_decode_with_kv_cache_f16": MissingJITCacheError("JIT compilation is disabled"),
}
FAULTS = (ValueError("Could not find nvcc"), RuntimeError("CUDA error: an illegal memory access"), KeyError("x"),
          FileNotFoundError(2, "No such file or directory", "pages.bin"))


@pytest.mark.parametrize("said", FAILURES)
def test_a_failed_build_is_told_from_a_fault_and_skips_once(said: str) -> None:
    assert said in build_failure(FAILURES[said])
    with pytest.raises(pytest.skip.Exception, match="FlashInfer"):
        with flashinfer_kernels(said):
            raise FAILURES[said]
    with pytest.raises(pytest.skip.Exception, match="FlashInfer"):
        with flashinfer_kernels(said):
            raise AssertionError("what is missing is not tried again")


def test_what_is_told_of_a_build_is_a_line_with_its_cause() -> None:
    output = "ninja: Entering directory '/x'\n[1/4] nvcc -c a.cu\nFAILED: a.o\n/bin/sh: 1: nvcc: not found\nninja: build stopped"
    said = why_not(RuntimeError(f"Ninja build failed. Ninja output:\n{output}"))
    assert said == "FlashInfer could not build its kernels: Ninja build failed: /bin/sh: 1: nvcc: not found"
    assert build_failure(RuntimeError("Ninja build failed. Ninja output:")).endswith("Ninja build failed")
    assert why_not(KeyError("x")) == "KeyError: 'x'" and len(why_not(RuntimeError("y" * 999))) == 160


def test_nothing_is_built_without_nvcc_or_ninja(tmp_path, monkeypatch) -> None:
    tools, toolkit = tmp_path / "tools", tmp_path / "toolkit"
    for path in (tools / "ninja", toolkit / "bin/nvcc", tmp_path / "other/bin/nvcc"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tools))
    assert flashinfer_can_build(toolkit) and not flashinfer_can_build(tmp_path / "none")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert not flashinfer_can_build(toolkit)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{tmp_path / 'other/bin'}")
    assert flashinfer_can_build(tmp_path / "none")
    (tools / "ninja").unlink()
    assert not flashinfer_can_build(toolkit)


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_fault_stays_a_fault(fault: Exception) -> None:
    assert build_failure(fault) is None
    with pytest.raises(type(fault)):
        with flashinfer_kernels("faults"):
            raise fault


def test_routes_that_cannot_be_built_are_named_once_a_process(monkeypatch, caplog) -> None:
    """Two routers, each of which lacks what FlashInfer cannot build; everything else works."""
    class Unbuilt:
        def __init__(self, *args: object) -> None:
            raise FAILURES["Could not find nvcc"]

    monkeypatch.setattr(routes.fi, "installed", lambda: True)
    monkeypatch.setattr(routes, "FlashInferRoute", Unbuilt)
    router_module._warn_once.cache_clear()
    route = "flashinfer_tensor_core"
    for _ in range(2):
        router = Router(SHAPE, policy=FixedPolicy(route), device=get_device("h200"))
        with pytest.raises(ValueError, match=f"expected {route} among"):
            router.plan([5000], None)
        assert route not in router.available and "balanced" in router.available
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{route}: FlashInfer could not build its kernels: Could not find nvcc" in said
