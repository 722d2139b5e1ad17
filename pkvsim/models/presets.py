"""Models by name: presets, or a Hugging Face config.json of your own.

Presets are the configs in configs/, one JSON per model; adding one is adding a file.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pkvsim.models.hugging_face import model_from_config
from pkvsim.models.model_costs import (
    active_weights,
    decode_weight_bytes,
    experts_touched,
    flops_per_token,
    kv_bytes_per_token,
    total_weights,
    weight_bytes,
)
from pkvsim.models.model_spec import ModelSpec, Weights

__all__ = [
    "ModelSpec", "Weights", "active_weights", "catalogue", "decode_weight_bytes", "experts_touched",
    "flops_per_token", "get_model", "kv_bytes_per_token", "total_weights", "weight_bytes",
]  # fmt: skip

CATALOGUE = Path(__file__).parent / "configs"


def catalogue() -> dict[str, Path]:
    """The presets: file by name."""
    return {path.stem: path for path in sorted(CATALOGUE.glob("*.json"))}


def get_model(name_or_path: str | Path, *, tensor_parallel: int | None = None) -> ModelSpec:
    """A preset by name, or a Hugging Face config by path (a name that ends in .json or a folder with config.json).

    tensor_parallel: GPUs that share each layer; by default the preset's own, 1 for a config.
    Raises ValueError naming the model, file or field.
    """
    presets = catalogue()
    if str(name_or_path) in presets:
        path = presets[str(name_or_path)]
        data = _read_json(path)
        parallel = data["tensor_parallel"] if tensor_parallel is None else tensor_parallel
        return model_from_config(
            data["config"], name=path.stem, source=data["source"], where=str(path), tensor_parallel=parallel
        )
    path = Path(name_or_path)
    if os.path.isdir(path):  # unlike Path.is_dir, false also where there may be no look at it
        path = path / "config.json"
    if path.suffix != ".json":
        raise ValueError(
            f"model: expected one of {', '.join(presets)} or a Hugging Face config.json, got {str(name_or_path)!r}"
        )
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    parallel = 1 if tensor_parallel is None else tensor_parallel
    beside = _quantization_file(path)
    return model_from_config(
        _read_json(path), name=name, source=str(path), where=str(path), tensor_parallel=parallel,
        quantization=None if beside is None else _read_json(beside),
    )  # fmt: skip


def _quantization_file(path: Path) -> Path | None:
    """The hf_quant_config.json that belongs to a config: in its folder, or with its name's own beginning."""
    beginning = path.name.removesuffix("config.json")
    if beginning == path.name:
        return None
    found = path.with_name(f"{beginning}hf_quant_config.json")
    return found if os.path.isfile(found) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except OSError as error:
        raise ValueError(f"{path}: cannot read a model: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot read a model: {error}") from None
