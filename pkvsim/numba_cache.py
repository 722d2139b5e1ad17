"""Keeps compiled caches honest across files.

Numba recompiles a cached function when its own file changes, not when a file changes that it calls into; the
result would be last week's prices in today's loop.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any


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
