"""The entry point of vLLM's plug-in system: `vllm serve MODEL --attention-backend CUSTOM` takes our backend.

vLLM loads the entry points of the group vllm.general_plugins in each of its processes and calls them. `register` names
the backend's class and imports nothing heavy: vLLM imports the class when an attention layer asks for it.
"""
from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

BACKEND = "gpu.drop_ins.vllm.backend.PersistentBackend"
BANDS = ("0.24",)  # releases whose interface gpu.drop_ins.vllm.backend was written for, as MAJOR.MINOR
LOG = logging.getLogger("vllm.persistentkv")


def band_of(release: str) -> str:
    """MAJOR.MINOR of a release such as 0.24.0 or 0.24.1rc2+cu130."""
    return ".".join(release.split(".")[:2])


def register() -> None:
    """Registers the backend as CUSTOM, or logs in one line why this vLLM cannot take it."""
    try:
        release = version("vllm")
    except PackageNotFoundError:
        release = "of unknown version"
    if band_of(release) not in BANDS:
        LOG.warning("PersistentKV's attention backend is written for vLLM %s and is not registered with vLLM %s",
                    " and ".join(f"{band}.x" for band in BANDS), release)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
