"""What a measurement was made on and with, and whether this machine can make one."""
from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path


def missing() -> str | None:
    """What this machine lacks for the GPU engine, in a sentence, or None."""
    for module in ("torch", "cupy"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: {install_line('gpu')}"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device answers"


def install_line(extra: str) -> str:
    """The command that installs an extra, from any folder: of this checkout where the package runs from one."""
    root = Path(__file__).resolve().parents[2]
    where = root if (root / "setup.cfg").is_file() else "PATH/TO/PersistentKV"
    return f"pip install '{where}[{extra}]'"


def lacks_gpu(program: str) -> bool:
    """Whether this machine cannot run the program, which is then said on stderr."""
    lack = missing()
    if lack is not None:
        print(f"{program} needs a CUDA GPU with CuPy and PyTorch; {lack}.", file=sys.stderr)
    return lack is not None


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """A script's options as JSON takes them: what it has no form for is text."""
    plain = (str, int, float, list, tuple, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}


def environment() -> dict[str, str]:
    """GPU, versions, date, the sources' hash and the command, as text."""
    import cupy
    import torch

    from gpu.kernels import compile as kernels
    from gpu.kernels.this_gpu import this_gpu

    found = {
        "gpu": str(this_gpu()),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cupy": cupy.__version__,
        "flashinfer": "not installed",
        "source_hash": kernels.source_hash(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        found["flashinfer"] = flashinfer.__version__
    return found


def driver_version() -> str:
    """The driver's version as nvidia-smi tells it."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known ({type(error).__name__} from nvidia-smi)"
    return told[0].strip() if told else "not known (nvidia-smi printed nothing)"


def command_line() -> str:
    """How this process was started, as one would type it."""
    from gpu.kernels.this_gpu import card_played

    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec is not None else os.path.relpath(sys.argv[0])
    card = card_played()
    return " ".join(["python", *(() if card is None else ("-m gpu.as_card", card)), program, *sys.argv[1:]])


def gpu_slug(gpu_name: str) -> str:
    """A GPU's name as the catalogue of pkvsim spells it: NVIDIA GeForce RTX 3060 is rtx3060."""
    words = [word for word in re.split(r"[^a-z0-9]+", gpu_name.lower()) if word not in ("nvidia", "geforce", "")]
    return "".join(words) or "gpu"


def write_json(path: Path, document: object) -> None:
    """Writes through a temporary file, so that a run cut short leaves the last whole version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
