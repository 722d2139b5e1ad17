"""The tokenizer of a model, as Transformers has it."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu.serve.model.gguf import GgufFile, is_gguf


def tokenizer_of(model: str | Path) -> Any:
    """Of a GGUF file or a Hugging Face folder. ValueError where there is none, or it cannot be read."""
    if is_gguf(model):
        return GgufFile(model).tokenizer()
    if not Path(model).is_dir():
        raise ValueError(f"prompts: expected token ids, as {model} has no tokenizer")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("prompts: reading a tokenizer needs the package transformers: pip install transformers; "
                         "token ids need none") from None
    try:
        return AutoTokenizer.from_pretrained(str(model))
    except Exception as error:  # of many kinds, which Transformers does not name
        line = str(error).partition("\n")[0]
        raise ValueError(f"prompts: expected token ids, as the tokenizer of {model} cannot be read: {line}") from error
