"""Every test in this folder needs a CUDA device with CuPy and PyTorch, and is skipped without one.

--card NAME: runs them as that GPU of pkvsim's catalogue would (gpu.as_card).
PKV_TEST_GPUS=0,1: xdist's workers take these GPUs in turn, one each; tests of several GPUs are skipped then.
"""
from __future__ import annotations

import importlib.util
import os

import pytest

# Before anything asks the driver what there is.
if "PKV_TEST_GPUS" in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    gpus = os.environ["PKV_TEST_GPUS"].split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(gpus)]


def _missing() -> str | None:
    for module in ("torch", "cupy"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


MISSING = _missing()
# Modules that import torch or cupy at the top cannot even be collected without them.
collect_ignore_glob = ["*/test_*.py"] if MISSING else []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--card", metavar="NAME", help="run the GPU tests as this GPU of the catalogue (gpu.as_card)")


def pytest_configure(config: pytest.Config) -> None:
    if MISSING:
        return
    from gpu_needs import flashinfer_can_build

    if not flashinfer_can_build():
        # Every process would try anew to build every kernel that no package brought; FlashInfer then says so at once.
        os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    card = config.getoption("--card")
    if card is None:
        return
    from gpu.as_card import enter

    try:
        enter(card)
    except ValueError as error:
        raise pytest.UsageError(f"--card: {error}") from None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Puts what ran, and as which card, into the junit file that tests.gpu.record reads."""
    from _pytest.junitxml import xml_key

    from gpu.kernels.compile import source_hash

    junit = session.config.stash.get(xml_key, None)
    if junit is not None:
        junit.add_global_property("source_hash", source_hash())
        junit.add_global_property("card", session.config.getoption("--card") or "")


def pytest_report_header(config: pytest.Config) -> str | None:
    if MISSING:
        return f"no GPU test runs: {MISSING}"
    from gpu.kernels.this_gpu import this_gpu

    return f"GPU: {this_gpu()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
