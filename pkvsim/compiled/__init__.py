"""How the compiled functions of pkvsim are compiled, cached and announced.

Read in this order: the decorators here, `parts` (why an inner function costs little to compile), `cache_place` (where
machine code is kept), `notice` (what a user is told while it is made).

Numba counts the references to every array that compiled code touches, atomically, at each step from a tuple of arrays
to one of them: in a loop over many short steps that took as long as the steps. Functions marked inner, compiled, merged
or unlocked count none, since whoever calls from Python holds what they are handed until they return. They can make no
arrays: what does is allocating or inner_allocating. An array must not cross from one sort to the other as a result, as
one would give a reference that the other never returns: a function that counts none returns numbers, or arrays to its
like alone, and one that makes arrays for those returns numbers.
"""
from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numba
from numba.core.dispatcher import Dispatcher

from pkvsim.compiled.cache_place import find_cache
from pkvsim.compiled.parts import borrowing_options, part_options

CACHED = find_cache()  # whether functions can be kept on disk at all

# For functions that Python calls.
outer = numba.njit(cache=CACHED, **borrowing_options(False))
_common: dict[str, Any] = {"cache": CACHED, "error_model": "numpy", "no_cfunc_wrapper": True}

# For functions that only compiled ones call.
inner = numba.njit(**_common, no_cpython_wrapper=True, **part_options(), **borrowing_options(True))
# As inner, and with a way in from Python.
compiled = numba.njit(**_common, **borrowing_options(True))
# As compiled, for what runs long enough that other threads should run meanwhile.
unlocked = numba.njit(**_common, nogil=True, **borrowing_options(True))
# As compiled, and part of its compiled callers: for functions that take whole tables, which a call would copy, or that
# would be optimised once more for every function between a caller and them.
merged = numba.njit(**_common, inline="always", **borrowing_options(True))
# As compiled and as inner, for functions that make arrays.
allocating = numba.njit(**_common, **borrowing_options(False))
inner_allocating = numba.njit(**_common, no_cpython_wrapper=True, **part_options(), **borrowing_options(False))


def drop_stale(package: str) -> None:
    """Removes the cache indices of the package's compiled functions that are older than the newest of their sources.

    Numba recompiles a cached function when its own file changes, not when a file changes that it calls into; the
    result would be last week's prices in today's loop. Looks at the modules that are loaded: to be called at the end
    of a module that calls into others, before its functions are first called. Without an index Numba compiles again.
    """
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == package]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)]
    # An uncached function has no path of a cache.
    places = {(Path(one.py_func.__code__.co_filename), one.stats.cache_path) for one in functions}
    newest = max((source.stat().st_mtime for source, _ in places), default=0.0)
    for source, cache in places:
        for index in Path(cache).glob(f"{source.stem}.*.nbi") if cache else ():
            with contextlib.suppress(FileNotFoundError):  # another process drops the same
                if index.stat().st_mtime < newest:
                    index.unlink()
