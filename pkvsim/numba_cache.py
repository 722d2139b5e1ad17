"""How compiled functions that call each other across files are compiled and cached.

Numba recompiles a cached function when its own file changes, not when a file changes that it calls into; the
result would be last week's prices in today's loop.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numba

# For functions that only compiled ones call: less to compile on a first run.
inner = numba.njit(cache=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def drop_stale(dispatcher: Any, *modules: Any) -> None:
    """Removes the cache indices of `modules` that are older than the newest of their sources.

    dispatcher: any cached function of theirs, which knows where the cache lies. To be called on import, before the
    first call; an index that is gone makes Numba compile again.
    """
    sources = [Path(module.__file__) for module in modules]
    newest = max(source.stat().st_mtime for source in sources)
    for source in sources:
        for index in Path(dispatcher.stats.cache_path).glob(f"{source.stem}.*.nbi"):
            if index.stat().st_mtime < newest:
                index.unlink(missing_ok=True)
