"""What a family's reader hands on: the layers of a model with their modules, before quantisation is applied."""
from __future__ import annotations

from dataclasses import dataclass

from pkvsim.models.config_fields import Fields
from pkvsim.models.families.attention import Split
from pkvsim.models.model_spec import NONE, AttentionSpec, FeedForwardSpec
from pkvsim.models.modules import FIXED, MLP, Module

NO_ATTENTION = AttentionSpec(kind=NONE)
NO_FEED_FORWARD = FeedForwardSpec()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: what it does on one GPU, and its modules."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    modules: tuple[Module, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model's layers, first to last, then its multi-token prediction heads, and what stands beside both."""

    layers: tuple[LayerPlan, ...]
    mtp_layers: tuple[LayerPlan, ...] = ()
    extra: tuple[Module, ...] = ()  # beside the final norm
    tied: bool = False  # where the config does not say
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What every family's reader is given."""

    fields: Fields
    split: Split
    element_bytes: int  # of weights that are not quantised

    @property
    def hidden(self) -> int:
        return self.fields.integer("hidden_size")

    @property
    def num_layers(self) -> int:
        return self.fields.integer("num_hidden_layers")


def layer_plan(
    attention: tuple[AttentionSpec, list[Module]] | None,
    feed_forward: tuple[FeedForwardSpec, list[Module]] | None,
    name: str,
    norms: int,
) -> LayerPlan:
    """A layer of an attention and a feed-forward part, either of which may be missing, and `norms` norm weights."""
    spec, modules = attention or (NO_ATTENTION, [])
    ff_spec, ff_modules = feed_forward or (NO_FEED_FORWARD, [])
    return LayerPlan(spec, ff_spec, (*modules, *ff_modules, Module(name=f"{name}.norms", part=FIXED, vector=norms)))


def prediction_head(plan: LayerPlan, name: str, hidden: int) -> LayerPlan:
    """A layer as multi-token prediction head: beside it a projection of embedding and hidden state, and three norms
    (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    projection = Module(name=f"{name}.eh_proj", part=MLP, out_features=hidden, in_features=2 * hidden, linear=False)
    norms = Module(name=f"{name}.shared_head.norm", part=FIXED, vector=3 * hidden)
    return LayerPlan(plan.attention, plan.feed_forward, (*plan.modules, projection, norms))
