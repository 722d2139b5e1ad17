"""Scripts on a machine that has neither torch nor CuPy."""
from __future__ import annotations

import subprocess
import sys

from paths import ROOT


def run_main(module: str) -> subprocess.CompletedProcess[str]:
    """Imports a script, runs main([]) and then --help in a process of its own: what it printed.

    Asserts that main returns 1, that no GPU library was imported, and that both steps end well.
    """
    code = ("import sys; sys.path[:0] = ['.', 'examples']; import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name in ('torch', 'cupy') else real(name, *a)\n"
            f"import {module} as script\n"
            "print(script.main([]), {'torch', 'cupy', 'transformers'} & set(sys.modules))\nscript.main(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 set()\n") and "--json" in done.stdout
    return done
