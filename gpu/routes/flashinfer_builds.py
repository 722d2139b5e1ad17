"""FlashInfer builds its kernels when they are first run, in ways of its own to fail: which errors are those."""
from __future__ import annotations

# What FlashInfer 0.7 raises without a compiler, without ninja, where one of them fails, and where building is switched
# off (FLASHINFER_DISABLE_JIT) and no package brought the module.
SAID = ("Could not find nvcc", "Ninja build failed", "directory: 'ninja'", "directory: 'nvcc'")
NEVER_BUILT = "MissingJITCacheError"


def build_failure(error: BaseException) -> str | None:
    """What FlashInfer could not build and why, in a line; None where the error is another one."""
    if type(error).__name__ == NEVER_BUILT:
        spec = getattr(error, "spec", None)
        return f"FlashInfer may not build here what it lacks: {getattr(spec, 'name', error)}"
    said = str(error)
    if isinstance(error, (RuntimeError, OSError)) and any(words in said for words in SAID):
        return f"FlashInfer could not build its kernels: {_short(said)[:160]}"
    return None


def why_not(error: BaseException) -> str:
    """Why one of FlashInfer's kernels does not run, in a short line, whatever it raised."""
    return build_failure(error) or f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _short(said: str) -> str:
    """The first line, and of ninja's long output what stopped it, where it tells."""
    first, *output = said.splitlines() or [""]
    stopped = next((line.strip() for line in output if "not found" in line or "error:" in line.lower()), None)
    first = first.removesuffix(" Ninja output:").rstrip(".")
    return first if stopped is None else f"{first}: {stopped}"
