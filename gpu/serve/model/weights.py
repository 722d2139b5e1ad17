"""A decoder's weights, fused as it multiplies them: from safetensors, GGUF or drawn at random."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpu.serve.model.config import ModelConfig, find_config, read_config
from gpu.serve.model.gguf import GgufFile, is_gguf

RANDOM_SCALE = 1.0  # standard deviation of a random matrix times the square root of its columns


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer; Hq, Hkv heads of d, hidden h, MLP width m."""

    input_norm: torch.Tensor  # [h]
    qkv: torch.Tensor  # [(Hq + 2 Hkv) d, h]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [d]
    k_norm: torch.Tensor | None  # [d]
    out: torch.Tensor  # [h, Hq d]
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [h]
    gate_up: torch.Tensor  # [2 m, h]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [h, m]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """All of a decoder, on one device and of one dtype."""

    embedding: torch.Tensor  # [vocab_size, h]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [h]
    head: torch.Tensor  # [vocab_size, h]; the embedding itself where they are tied

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def step_bytes(self) -> int:
        """Bytes that a step reads whatever its size: all but the embedding, of which it reads a row a token."""
        embedding = 0 if self.head is self.embedding else self.embedding.numel() * self.embedding.element_size()
        return self.num_bytes - embedding

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.embedding
        yield self.norm
        if self.head is not self.embedding:
            yield self.head
        for layer in self.layers:
            for name in LayerWeights.__slots__:
                tensor = getattr(layer, name)
                if tensor is not None:
                    yield tensor


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights of that dtype, of which nothing is made."""
    return _assemble(config, lambda name, shape: torch.empty(shape, dtype=dtype, device="meta")).num_bytes


def _expect_served(config: ModelConfig, dtype: torch.dtype, room: int | None,
                   check: Callable[[ModelConfig], None] | None) -> None:
    if check is not None:
        check(config)
    needed = weights_bytes(config, dtype)
    if room is not None and needed > room:
        raise ValueError(f"model: expected at most {max(0, room) / 2**30:.2f} GiB of weights, for which memory has "
                         f"room, got {needed / 2**30:.2f} GiB of {config.name}")


Tensors = Callable[[str, tuple[int, ...]], torch.Tensor]  # (Hugging Face's name, shape) -> the tensor, where it belongs


def load(model: str | Path, *, dtype: torch.dtype, device: str, dummy: bool = False,
         seed: int = 0, room: int | None = None,
         check: Callable[[ModelConfig], None] | None = None) -> tuple[ModelConfig, Weights]:
    """The model of a preset's name (with dummy weights), a Hugging Face folder, a GGUF file or "smollm2".

    dummy: weights drawn from `seed`, whatever files there are. room: bytes that weights may take, where that is known.
    check: is shown the model before any weight is read, and may refuse it. Raises ValueError naming what is missing,
    or, before any weight is read, the model that does not fit.
    """
    if is_gguf(model):
        file = GgufFile(model)
        config = read_config(file.config(), name=file.path.stem)
        factors = file.rope_factors(config.head_dim)
        if factors is not None:
            config = replace(config, rope=replace(config.rope, inv_freq=config.rope.inv_freq / factors))
        _expect_served(config, dtype, room, check)
        found = {name: torch.from_numpy(array) for name, array in ([] if dummy else file.tensors())}
        return config, _assemble(config, _random(dtype, device, seed) if dummy else _known(found, dtype, device))
    config = find_config(model)
    _expect_served(config, dtype, room, check)
    if dummy:
        return config, _assemble(config, _random(dtype, device, seed))
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    if not files:
        raise ValueError(f"model: expected a folder with .safetensors files, or --dummy-weights, got {str(model)!r}")
    return config, _assemble(config, _from_files(Path(model), files, dtype, device))


def _assemble(config: ModelConfig, tensors: Tensors) -> Weights:
    """Asks for every tensor that the config names, in its shape."""
    c = config
    q_rows, kv_rows = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def fused(names: list[str], rows: list[int], columns: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([tensors(name, (count, *columns)) for name, count in zip(names, rows)])

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}."
        heads = [f"{at}self_attn.{part}_proj" for part in "qkv"]
        gates = [f"{at}mlp.{part}_proj" for part in ("gate", "up")]
        head_rows, widths = [q_rows, kv_rows, kv_rows], [c.mlp_width, c.mlp_width]
        return LayerWeights(
            input_norm=tensors(f"{at}input_layernorm.weight", (c.hidden_size,)),
            qkv=fused([f"{name}.weight" for name in heads], head_rows, (c.hidden_size,)),
            qkv_bias=fused([f"{name}.bias" for name in heads], head_rows, ()) if c.qkv_bias else None,
            q_norm=tensors(f"{at}self_attn.q_norm.weight", (c.head_dim,)) if c.head_norms else None,
            k_norm=tensors(f"{at}self_attn.k_norm.weight", (c.head_dim,)) if c.head_norms else None,
            out=tensors(f"{at}self_attn.o_proj.weight", (c.hidden_size, q_rows)),
            out_bias=tensors(f"{at}self_attn.o_proj.bias", (c.hidden_size,)) if c.output_bias else None,
            mlp_norm=tensors(f"{at}post_attention_layernorm.weight", (c.hidden_size,)),
            gate_up=fused([f"{name}.weight" for name in gates], widths, (c.hidden_size,)),
            gate_up_bias=fused([f"{name}.bias" for name in gates], widths, ()) if c.mlp_bias else None,
            down=tensors(f"{at}mlp.down_proj.weight", (c.hidden_size, c.mlp_width)),
            down_bias=tensors(f"{at}mlp.down_proj.bias", (c.hidden_size,)) if c.mlp_bias else None,
        )

    embedding = tensors("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
    head = embedding if c.tied else tensors("lm_head.weight", (c.vocab_size, c.hidden_size))
    return Weights(embedding, [layer(index) for index in range(c.num_layers)],
                   tensors("model.norm.weight", (c.hidden_size,)), head)


def _random(dtype: torch.dtype, device: str, seed: int) -> Tensors:
    """Norms of one, biases of zero, matrices that keep the size of what they multiply."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return (torch.zeros if name.endswith(".bias") else torch.ones)(shape, dtype=dtype, device=device)
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.normal_(0.0, RANDOM_SCALE * shape[1] ** -0.5, generator=generator)

    return tensor


def _known(found: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> Tensors:
    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in found:
            raise ValueError(f"{name}: missing from the model's file")
        return _checked(name, found[name], shape).to(device=device, dtype=dtype)

    return tensor


def _from_files(folder: Path, files: list[Path], dtype: torch.dtype, device: str) -> Tensors:
    """Reads tensors one by one, as they are asked for."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("model: reading .safetensors files needs the package safetensors: "
                         "pip install safetensors") from None
    opened, place = {}, {}
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            place = {name: folder / file for name, file in named.items()}
        else:
            for file in files:
                opened[file] = safe_open(str(file), framework="pt")
                place |= dict.fromkeys(opened[file].keys(), file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot read a model: {type(error).__name__}: {error}") from None

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in place:
            raise ValueError(f"{name}: missing from {folder}")
        try:
            if place[name] not in opened:
                opened[place[name]] = safe_open(str(place[name]), framework="pt")
            found = opened[place[name]].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{place[name]}: cannot read {name}: {error}") from None
        return _checked(name, found, shape).to(device=device, dtype=dtype)

    return tensor


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    return tensor
