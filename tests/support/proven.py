"""The machine code that the GPU record stands for, told by hashes: a change of words, or beside a kernel, leaves it proven.

    python -m tests.support.proven              # adds to tests/gpu/record.json what tests/kernels compiles, after a run

`code.kernels` of the record has, for the variants that tests/kernels compiles for the architectures of its two runs, the
hash of each kernel's machine code by NVRTC's wheel, `code.compiler` its release. tests/kernels compares whatever it
compiles with that. `unproven` of the record names the sources that the runs did not have, and why.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path

from tests.kernels.code_size import text_of

RECORD = Path(__file__).parents[1] / "gpu" / "record.json"
CAPABILITIES = (86, 90)  # of the card and of the GPU that played it
WHEEL = "nvidia-cuda-nvrtc-cu12"


def compiler() -> str:
    return f"{WHEEL} {importlib.metadata.version(WHEEL)}"


def key(file_name: str, capability: int, options: tuple[str, ...]) -> str:
    """A variant's name: the source, the architecture and the constants that are not 0."""
    told = sorted(option[2:] for option in options if re.fullmatch(r"-D(?!PKV_SOURCE_HASH)\w+=(?!0$).*", option))
    return f"{file_name} sm_{capability} {' '.join(told)}"


def hashes(cubin: bytes, kernels: list[str]) -> str:
    """Of the machine code of all kernels of a cubin."""
    return hashlib.sha256(b"".join(text_of(cubin, name) for name in sorted(kernels))).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    import pytest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    args = parser.parse_args(argv)
    found: dict[str, str] = {}

    class Collector:
        @pytest.fixture(autouse=True)
        def collected(self, monkeypatch: pytest.MonkeyPatch) -> None:
            import nvrtc

            own = nvrtc.compiled

            def compiled(source: Path, capability: int, options: tuple[str, ...]) -> tuple[bytes, dict]:
                cubin, resources = own(source, capability, options)
                if capability in CAPABILITIES and source.suffix == ".cu" and source.parent.name == "cuda_src":
                    found[key(source.name, capability, options)] = hashes(cubin, list(resources))
                return cubin, resources

            monkeypatch.setattr(nvrtc, "compiled", compiled)

    folder = Path(__file__).parents[1] / "kernels"
    status = pytest.main(["-q", "-k", "test_kernels_compile or fit", str(folder)], plugins=[Collector()])
    if status:
        print("proven: not written: tests failed", file=sys.stderr)
        return 1
    record = json.loads(args.out.read_text())
    record["code"] = {"compiler": compiler(), "kernels": dict(sorted(found.items()))}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {len(found)} kernels' code to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
