"""How compiled functions that call each other across files are compiled and cached.

Numba recompiles a cached function when its own file changes, not when a file changes that it calls into; the
result would be last week's prices in today's loop.
"""
from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numba
from numba.core.dispatcher import Dispatcher

# For functions that only compiled ones call: less to compile on a first run.
inner = numba.njit(cache=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def drop_stale(package: str) -> None:
    """Removes the cache indices of the package's compiled functions that are older than the newest of their sources.

    Looks at the modules that are loaded: to be called at the end of a module that calls into others, before its
    functions are first called. Without an index Numba compiles again.
    """
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == package]
    compiled = [value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)]
    places = {(Path(one.py_func.__code__.co_filename), Path(str(one.stats.cache_path))) for one in compiled}
    newest = max((source.stat().st_mtime for source, _ in places), default=0.0)
    for source, cache in places:
        for index in cache.glob(f"{source.stem}.*.nbi"):
            with contextlib.suppress(FileNotFoundError):  # another process drops the same
                if index.stat().st_mtime < newest:
                    index.unlink()
