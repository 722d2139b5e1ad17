"""Proves that the GPU extras stand alone: `make check-extras`, on any machine, without a GPU or a CUDA toolkit.

For each extra a fresh environment installs it (some 3 GB are downloaded) and compiles every kernel of cuda_src for
sm_86 and sm_90 with the NVRTC and the headers that came with it, the way CuPy would: its NVRTC, its include folders.
nvcc is hidden from PATH, CUDA_PATH and CUDA_HOME are unset. Prints what was installed and compiled; --json writes it.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("gpu", "gpu-cuda13")
CAPABILITIES = (86, 90)
TOLD = ("torch", "cupy-", "cuda-toolkit", "flashinfer-python", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")


def variants(capability: int) -> Iterator[tuple[str, str, dict[str, int | str]]]:
    """(file, what, defines) of every kernel: plain attention, every option, pages of 8 bits, appends."""
    from gpu.cache import append_variant
    from gpu.inputs.block_tables import TableLayout
    from gpu.kernels.variant import DTYPES, kernel_config, read_config, shared_limit_bytes
    from gpu.measure.timing import STREAM_SHAPES
    from gpu.selection.variant import selection_defines
    from gpu.serve.model.product_variant import ADD, GATE, STORE, variant
    from gpu.several.inbox import rank_config
    from pkvsim import AttentionOptions, DecodeShape
    from pkvsim.kv_types import KV_DTYPES

    plain = AttentionOptions()
    options = (plain, AttentionOptions(window=4096, soft_cap=30.0, sinks=True), AttentionOptions(query_tokens=4))
    cases = [(dtype, head_dim, plain) for dtype in DTYPES for head_dim in (64, 128, 256)]
    cases += [("bfloat16", 128, one) for one in options[1:]]
    cases += [("bfloat16", 128, plain.with_cache(kv_dtype, "token")) for kv_dtype in KV_DTYPES]
    for dtype, head_dim, option in cases:
        config = kernel_config(DecodeShape(32, 8, head_dim, 16), dtype, capability, options=option)
        what = f"{dtype}, head_dim {head_dim}" + ("" if option == plain else f", {option}")
        for name in ("balanced.cu", "decode.cu", "merge.cu"):
            yield name, what, config.defines()
    for kv_dtype in (None, *append_variant.CACHE_TYPES):
        shape = DecodeShape(32, 8, 128, 16)
        defines = append_variant.defines(shape, "float16", kv_dtype=kv_dtype or "float16", head_dim_v=128, rope=None)
        yield "append.cu", kv_dtype or "float16", defines
    for layout in (TableLayout(), TableLayout(int64=True, csr=True, last_page=True)):
        yield "prefixes.cu", f"{layout}", layout.defines() | {"PAGE_SIZE": 16, "WARPS": 16}
    for dtype, head_dim in (("float16", 128), ("bfloat16", 128), ("float16", 64)):
        config = kernel_config(DecodeShape(32, 8, head_dim, 16), dtype, capability)
        reads = read_config(config, capability)
        yield "shared.cu", f"{dtype}, head_dim {head_dim}", reads.read_defines() | TableLayout().defines()
    for num_ranks in (2, 8):
        ranks = rank_config(DecodeShape(32, 8, 128, 16), "float16", capability, num_ranks=num_ranks, max_batch=1)
        yield "several.cu", f"{num_ranks} ranks", ranks.defines()
    for depth, normed, end in ((4096, True, STORE), (4096, True, GATE), (14336, False, ADD)):
        product = variant(rows=4096, depth=depth, columns=1, normed=normed, end=end, bfloat16=True,
                          shared_limit=shared_limit_bytes(90))
        yield "product.cu", f"{depth} deep, end {end}", product.defines()
    for bfloat16 in (0, 1):
        yield "rows.cu", f"DTYPE_BF16 {bfloat16}", {"DTYPE_BF16": bfloat16, "NORM_VECTORS": 2}
    for page_lse in (False, True):
        config = kernel_config(DecodeShape(32, 8, 128, 16), "float16", capability)
        yield "selected.cu", f"page_lse {page_lse}", config.selected_defines(selected=True, page_lse=page_lse)
    for summary, aggregation in (("mean_std", "softmax_mean"), ("min_max", "maximum")):
        defines = selection_defines(DecodeShape(32, 8, 128, 16), "float16", summary, aggregation)
        yield "select.cu", summary, defines
        yield "summaries.cu", summary, defines
    yield "gather.cu", "", {"THREADS": 512, "UNROLL": 4}
    yield "block_sums.cu", "", {"THREADS": 256, "UNROLL": 4}
    yield "plan.cu", "", {}
    yield "plan_spans.cu", "", {}
    for unroll in sorted({unroll for _, _, unroll in STREAM_SHAPES}):
        yield "stream.cu", f"unroll {unroll}", {"UNROLL": unroll}


def compile_all() -> dict[str, object]:
    """Compiles in this environment; RuntimeError with the compiler's log where a kernel does not compile."""
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    from gpu.kernels.compile import SOURCE_DIR, compile_options, needs_own_architecture

    compiled = dict.fromkeys(sorted(path.name for path in SOURCE_DIR.glob("*.cu")), 0)
    for capability in CAPABILITIES:
        for name, what, defines in variants(capability):
            program = nvrtc.createProgram((SOURCE_DIR / name).read_text(), name, (), ())
            alone = "a" if needs_own_architecture(defines) else ""
            given = (*assemble_cupy_compiler_options(compile_options(defines)), f"-arch=sm_{capability}{alone}")
            try:
                nvrtc.compileProgram(program, given)
                assert nvrtc.getCUBIN(program)
            except nvrtc.NVRTCError:
                raise RuntimeError(f"{name}, {what}, sm_{capability}:\n{nvrtc.getProgramLog(program)}") from None
            finally:
                nvrtc.destroyProgram(program)
            compiled[name] += 1
    left_out = [name for name, count in compiled.items() if not count]
    if left_out:
        raise RuntimeError(f"not compiled: {', '.join(left_out)}")
    include = [option[2:] for option in assemble_cupy_compiler_options(()) if option.startswith("-I")][-1]
    installed = {one.metadata["Name"]: one.version for one in distributions()}
    return {
        "python": sys.version.split()[0],
        "installed": {name: installed[name] for name in sorted(installed) if name.startswith(TOLD)},
        "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "headers": include.split("site-packages/")[-1],
        "capabilities": list(CAPABILITIES),
        "modules_compiled": compiled,
    }


def without_toolkit(environment: dict[str, str]) -> dict[str, str]:
    """The environment variables of a machine that has no CUDA toolkit: no nvcc on PATH, no CUDA_PATH."""
    path = [part for part in environment.get("PATH", "").split(os.pathsep) if shutil.which("nvcc", path=part) is None]
    hidden = ("CUDA_PATH", "CUDA_HOME", "CUDACXX", "LD_LIBRARY_PATH", "CPATH", "PYTHONPATH")
    return {k: v for k, v in environment.items() if k not in hidden} | {
        "PATH": os.pathsep.join(path)
    }  # fmt: skip


def check(extra: str, environment: Path | None) -> dict[str, object]:
    """Installs the extra into a fresh environment, or takes one that has it, and compiles there."""
    with tempfile.TemporaryDirectory(prefix="check-extras-") as folder:
        place = environment or Path(folder) / "venv"
        if environment is None:
            print(f"{extra}: installing into a fresh environment", flush=True)
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
        python = str(place.absolute() / "bin" / "python")
        hidden = without_toolkit(dict(os.environ))
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-cache-dir"]
        source = Path(folder) / "source"  # a copy, so that the build leaves nothing in the checkout
        for name in ("pkvsim", "gpu", "cuda_src"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, source)
        subprocess.run([*pip, f"{source}[{extra}]"], check=True, env=hidden)
        done = subprocess.run([python, __file__, "--inside"], env=hidden, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{extra}: {done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("extras", nargs="*", default=EXTRAS, help=f"of {', '.join(EXTRAS)}; both by default")
    parser.add_argument("--environment", type=Path, help="an environment to install into in place of a fresh one")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--inside", action="store_true", help="compile with what this Python has")
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(compile_all()))
        return
    found = {}
    for extra in args.extras:
        found[extra] = check(extra, args.environment)
        for name, value in found[extra].items():
            print(f"{extra}: {name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
