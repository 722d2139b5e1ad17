"""Inner functions are compiled as parts: machine code is made once, of the function that Python calls.

Numba optimises every function and makes its machine code, then copies its optimised body into each caller and
optimises that again: a chain of eight callers pays for the same body eight times. A part stops at the unoptimised LLVM
module, which callers link; the outermost function optimises all of them together. That halves a first run.

Numba offers no option for that, so its internals are used, for the versions alone that were tried (TRIED); others
compile inner functions in Numba's own way, which gives the same results later.
"""
from __future__ import annotations

from typing import Any

import numba

TRIED = ("0.68",)  # major.minor of Numba


def part_options() -> dict[str, Any]:
    """Options of numba.njit that make a function a part; none where this Numba was not tried."""
    return {"pipeline_class": _part_compiler()} if _is_tried() else {}


def borrowing_options(borrows: bool) -> dict[str, Any]:
    """Options of numba.njit that make a function count no references to arrays, or count them whatever its callers do;
    none where this Numba was not tried."""
    return {"_nrt": not borrows} if _is_tried() else {}


def _is_tried() -> bool:
    return ".".join(numba.__version__.split(".")[:2]) in TRIED


def _part_compiler() -> type:
    from numba import _dynfunc
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import register_pass
    from numba.core.typed_passes import NativeLowering

    class PartLibrary(JITCodeLibrary):
        """A module that is only ever linked into others."""

        def _optimize_final_module(self) -> None:
            """Left to the caller, which would do it again."""

        def _finalize_final_module(self) -> None:
            """What the overridden method does, less making machine code."""
            self._finalize_dynamic_globals()
            self._verify_declare_only_symbols()
            self._finalized = True

        def serialize_using_object_code(self) -> tuple[str, str, bytes]:
            """For the cache: there is no machine code to keep, callers link the bitcode."""
            self._ensure_finalized()
            return self.name, "bitcode", self._get_module_for_linking().as_bitcode()

    @register_pass(mutates_CFG=True, analysis_only=False)
    class PartLowering(NativeLowering):
        """Lowering into a PartLibrary. Callers find the function under an entry point that nobody can call."""

        _name = "part_lowering"

        def run_pass(self, state: Any) -> bool:
            state.library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
            state.flags.no_compile = True
            super().run_pass(state)
            lowered = state["cr"]
            name = lowered.fndesc.qualname.split(".")[-1]
            entry = _dynfunc.make_function(
                lowered.fndesc.lookup_module(), name, f"part {name!r}", 0, lowered.env, (state.library,)
            )
            state.targetctx.insert_user_function(entry, lowered.fndesc, [state.library])
            state.reload_init.extend(state.library._reload_init)
            state["cr"] = lowered._replace(cfunc=entry)
            return True

    class PartCompiler(CompilerBase):
        """Numba's pipeline with PartLowering in the place of NativeLowering."""

        def define_pipelines(self) -> list[Any]:
            pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
            pipeline.passes = [
                (PartLowering if one is NativeLowering else one, what) for one, what in pipeline.passes
            ]
            pipeline.finalize()
            return [pipeline]

    return PartCompiler
