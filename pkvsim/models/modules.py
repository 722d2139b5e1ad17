"""The named modules of a layer, as checkpoints name them, and their sum into one GPU's weights."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pkvsim.models.model_spec import Weights
from pkvsim.models.quantization import Quantization

ATTENTION, FIXED, MLP, EXPERT = "attention", "norms_and_router", "mlp", "expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A linear layer, or the vectors of a norm, of the whole model. `share` of it lies on one GPU."""

    name: str  # within the model, such as layers.3.self_attn.q_proj
    part: str  # ATTENTION, FIXED, MLP or EXPERT
    out_features: int = 0
    in_features: int = 0
    vector: int = 0  # biases, norm weights and the like, which no method quantises
    share: float = 1.0
    linear: bool = True  # False: a convolution, router or embedding, which quantisation leaves alone unless it names it

    @property
    def matrix(self) -> int:
        return self.out_features * self.in_features


def sum_modules(modules: Iterable[Module], part: str, element_bytes: float, quantization: Quantization) -> Weights:
    """One GPU's share of the modules of a part; element_bytes for what is not quantised."""
    total = Weights()
    for module in modules:
        if module.part == part:
            total = total + module_weights(module, element_bytes, quantization)
    return total


def module_weights(module: Module, element_bytes: float, quantization: Quantization) -> Weights:
    stored = quantization.stored(module.name, expert=module.part == EXPERT, linear=module.linear)
    if stored is None:
        size = module.matrix * element_bytes
    else:
        size = stored.matrix_bytes(module.out_features, module.in_features)
    return Weights(
        -int(-(module.matrix * module.share) // 1) - int(-(module.vector * module.share) // 1),
        (size + module.vector * element_bytes) * module.share,
        round(2 * module.matrix * module.share),
    )
