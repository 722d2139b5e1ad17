"""The entry point of vLLM's plug-in system: `vllm serve MODEL --attention-backend CUSTOM` takes our backend.

vLLM loads the entry points of the group vllm.general_plugins in each of its processes and calls them. `register` names
the backend's class and imports nothing heavy: vLLM imports the class when an attention layer asks for it.
"""
from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

BACKEND = "gpu.drop_ins.vllm.backend.PersistentBackend"
BANDS = {  # releases, as MAJOR.MINOR, and the class that is written for their interface
    "0.24": BACKEND,
    "0.33": "gpu.drop_ins.vllm.backend_0_33.PersistentBackend",
}
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
    band = band_of(release)
    if band not in BANDS:
        LOG.warning("PersistentKV's attention backend is written for vLLM %s and is not registered with vLLM %s",
                    " and ".join(f"{one}.x" for one in BANDS), release)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BANDS[band])
