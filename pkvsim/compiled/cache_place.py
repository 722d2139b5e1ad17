"""Where Numba keeps machine code: beside the sources or in the user's cache, else in a temporary folder."""
from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import numba


def find_cache() -> bool:
    """Whether compiled functions can be cached. Where neither the install nor the user's home is writable, Numba is
    given a temporary folder, which one line on stderr names; where that fails too, the line says that
    nothing is kept."""
    if _numba_has_a_place():
        return True
    place = _temporary_folder()
    if place is not None:
        numba.config.CACHE_DIR = str(place)
        if _numba_has_a_place():
            _tell(f"compiled functions are kept in {place}, since neither the install nor a home is writable; "
                  "NUMBA_CACHE_DIR names another folder")  # fmt: skip
            return True
    _tell("no folder is writable: functions are compiled again by every run; NUMBA_CACHE_DIR names a folder")
    return False


def _numba_has_a_place() -> bool:
    """Numba looks for a folder when it decorates, and raises where none is writable."""
    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


def _nothing() -> None:
    """What _numba_has_a_place decorates: a function of this install."""


def _temporary_folder() -> Path | None:
    """The user's own folder for this and later runs, else one for this run alone; None where none can be made.

    Numba unpickles what it finds in a cache, so a folder that others could write to, or made, is not taken.
    """
    try:
        if hasattr(os, "getuid"):
            folder = Path(tempfile.gettempdir()) / f"pkvsim-numba-{os.getuid()}"
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                pass
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return folder
        folder = Path(tempfile.mkdtemp(prefix="pkvsim-numba-"))
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _tell(what: str) -> None:
    print(f"pkvsim: {what}", file=sys.stderr)
