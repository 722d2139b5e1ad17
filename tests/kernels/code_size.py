"""What the compiler makes of the kernels: registers, spills, bytes of code and a hash of it, for variants of each kind.

    python -m tests.kernels.code_size --json before.json       writes what the sources give
    python -m tests.kernels.code_size --against before.json    compares the sources with that

A change of words or names must leave every hash as it was; one that moves code leaves registers (as they are given out,
eight at a time), spills and, within 1 %, bytes. Code is that of NVRTC's wheel (tests/support/nvrtc.py), so no GPU is
needed. Where nvdisasm is found (--nvdisasm, PATH, or a wheel of triton), `opcodes` hashes the instructions without their
operands: parameters that lie elsewhere change the code, but not those.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu.cache import append_variant
from gpu.inputs.block_tables import TableLayout
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import kernel_config, read_config
from gpu.several.inbox import rank_config
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.reference.rope import HALF, Rope
from tests.support import nvrtc

CAPABILITIES = (90, 86)
BALANCED, TASKS = ("balanced.cu", "pkv_decode_balanced"), ("decode.cu", "pkv_decode_tasks")
# name: (kernel, (group, head_dim, page size), dtype, options, layout of tables)
DECODE_VARIANTS = {
    "plain": (BALANCED, (4, 128, 16), "float16", AttentionOptions(), TableLayout()),
    "bfloat16 group 1": (BALANCED, (1, 128, 16), "bfloat16", AttentionOptions(), TableLayout()),
    "head_dim 64 group 8": (BALANCED, (8, 64, 16), "float16", AttentionOptions(), TableLayout()),
    "head_dim 256": (BALANCED, (4, 256, 16), "float16", AttentionOptions(), TableLayout()),
    "pages of 1": (BALANCED, (4, 128, 1), "float16", AttentionOptions(), TableLayout()),
    "fp8": (BALANCED, (4, 128, 16), "float16", AttentionOptions(kv_dtype="float8_e4m3fn"), TableLayout()),
    "int8 by token": (BALANCED, (4, 128, 16), "bfloat16", AttentionOptions(kv_dtype="int8", kv_scales="token"),
                      TableLayout()),
    "csr": (BALANCED, (4, 128, 16), "float16", AttentionOptions(), TableLayout(csr=True)),
    "csr and last pages": (BALANCED, (4, 128, 16), "float16", AttentionOptions(),
                           TableLayout(int64=True, csr=True, last_page=True)),
    "window, soft cap, sinks": (BALANCED, (4, 128, 16), "float16",
                                AttentionOptions(window=4096, soft_cap=30.0, sinks=True), TableLayout()),
    "4 query tokens": (BALANCED, (4, 128, 16), "float16", AttentionOptions(query_tokens=4), TableLayout()),
    "8 query tokens, team": (BALANCED, (4, 128, 16), "float16", AttentionOptions(query_tokens=8), TableLayout()),
    "64 columns, team of 4": (BALANCED, (8, 128, 16), "float16", AttentionOptions(query_tokens=8), TableLayout()),
    "tasks": (TASKS, (4, 128, 16), "float16", AttentionOptions(), TableLayout()),
    "tasks, team": (TASKS, (4, 128, 16), "float16", AttentionOptions(query_tokens=8), TableLayout()),
    "tasks, int8": (TASKS, (4, 128, 16), "float16", AttentionOptions(kv_dtype="int8"), TableLayout()),
}


@dataclass(frozen=True, slots=True)
class Code:
    """One kernel of one variant: registers per thread, and bytes."""

    registers: int
    spills: int
    bytes: int
    sha256: str  # of the machine code
    opcodes: str | None  # hash of its instructions without operands


def text_of(cubin: bytes, kernel: str) -> bytes:
    """The machine code of a kernel: section .text.<kernel> of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<3H", cubin, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        name, *_ = struct.unpack_from("<I", cubin, table + index * entry_bytes)
        return name, *struct.unpack_from("<2Q", cubin, table + index * entry_bytes + 0x18)

    _, names_at, _ = section(names_index)
    for name, at, size in map(section, range(count)):
        if cubin[names_at + name:].split(b"\0", 1)[0] == f".text.{kernel}".encode():
            return cubin[at:at + size]
    raise ValueError(f"cubin: expected a section .text.{kernel}, found none")


def find_nvdisasm() -> str | None:
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm" if triton and triton.origin else None
    return shutil.which("nvdisasm") or (str(beside) if beside and beside.exists() else None)


def opcodes_of(cubin: bytes, nvdisasm: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    if not found:
        raise ValueError("nvdisasm: expected instructions, found none")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def measure(file_name: str, kernel: str, defines: dict[str, int], capability: int, nvdisasm: str | None) -> Code:
    cubin, resources = nvrtc.compiled(SOURCE_DIR / file_name, capability, compile_options(defines))
    text, used = text_of(cubin, kernel), resources[kernel]
    return Code(used.registers, used.spills, len(text), hashlib.sha256(text).hexdigest()[:16],
                opcodes_of(cubin, nvdisasm) if nvdisasm else None)


def sources() -> list[tuple[str, str, str, dict[str, int], int]]:
    """(name, file, kernel, constants, compute capability) of everything that is measured."""
    import numpy as np

    found = []
    for capability in CAPABILITIES:
        for name, ((file, kernel), (group, head_dim, page_size), dtype, options, layout) in DECODE_VARIANTS.items():
            shape = DecodeShape(group, 1, head_dim, page_size)
            defines = kernel_config(shape, dtype, capability, options=options).defines() | layout.defines()
            found.append((f"sm_{capability} {name}", file, kernel, defines, capability))
        for name, group, head_dim, kv_dtype in (
            ("shared reads", 4, 128, None), ("shared reads, head_dim 64", 8, 64, None),
            ("shared reads, fp8", 4, 128, "float8_e4m3fn"),
        ):  # fmt: skip
            shape = DecodeShape(group, 1, head_dim, 16)
            config = kernel_config(shape, "float16", capability, options=AttentionOptions(kv_dtype=kv_dtype))
            found.append((f"sm_{capability} {name}", "shared.cu", "pkv_decode_shared",
                          read_config(config, capability).read_defines(), capability))
        for name, group, head_dim in (("two ranks", 4, 128), ("two ranks, head_dim 64", 8, 64)):
            config = rank_config(DecodeShape(group, 1, head_dim, 16), "float16", capability, num_ranks=2, max_batch=1)
            found.append((f"sm_{capability} {name}", "several.cu", "pkv_decode_several", config.defines(), capability))
        shape = DecodeShape(4, 1, 128, 16)
        found.append((f"sm_{capability} merge", "merge.cu", "pkv_merge",
                      kernel_config(shape, "float16", capability).defines(), capability))
        found.append((f"sm_{capability} list", "plan.cu", "pkv_list_balanced", {}, capability))
        for name, kv_dtype, rope in (("append", "float16", None),
                                     ("append, rotated", "float16", Rope(style=HALF, cos_sin=np.zeros((1, 128), "f4"))),
                                     ("append, int8", "int8", None),
                                     ("append, fp8, turns", "float8_e4m3fn", Rope(style=HALF, inv_freq=np.zeros(64)))):
            defines = append_variant.defines(shape, "float16", kv_dtype=kv_dtype, head_dim_v=128, rope=rope)
            found.append((f"sm_{capability} {name}", "append.cu", "pkv_append", defines, capability))
    return found


def compare(before: dict[str, dict], after: dict[str, Code]) -> bool:
    """Prints a line for every variant; whether none has more registers, spills or over 1 % more code."""
    good = True
    for name, code in after.items():
        if name not in before:
            print(f"{name:38s} was not measured before")
            continue
        old = Code(**before[name])
        if code.sha256 == old.sha256:
            print(f"{name:38s} the same code")
            continue
        same = "the same instructions" if code.opcodes and code.opcodes == old.opcodes else "other instructions"
        growth = code.bytes / old.bytes - 1
        more_registers = -(-code.registers // 8) > -(-old.registers // 8)
        worse = code.spills > old.spills or more_registers or growth > 0.01
        good &= not worse
        print(f"{name:38s} {same}, registers {old.registers} -> {code.registers}, spills {old.spills} -> {code.spills},"
              f" bytes {old.bytes} -> {code.bytes} ({growth:+.2%}){'  WORSE' if worse else ''}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with such a file; exit 1 if worse")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose names contain this")
    parser.add_argument("--nvdisasm", default=find_nvdisasm(), metavar="PROGRAM")
    given = parser.parse_args()
    found = {}
    for name, file, kernel, defines, capability in sources():
        if given.only in name:
            found[name] = measure(file, kernel, defines, capability, given.nvdisasm)
    if given.json:
        given.json.write_text(json.dumps({name: asdict(code) for name, code in found.items()}, indent=1) + "\n")
    if given.against:
        sys.exit(not compare(json.loads(given.against.read_text()), found))
    if not given.json:
        for name, code in found.items():
            print(f"{name:38s} {code.registers:3d} registers, {code.spills:3d} spilled, {code.bytes:6d} bytes")


if __name__ == "__main__":
    main()
