"""Which layers of a model select pages, and what the summaries of their pages take of the memory."""
from __future__ import annotations

from collections.abc import Sequence

from pkvsim.models.decode_groups import DecodeGroup, decode_groups
from pkvsim.models.model_spec import FULL, ModelSpec, describe_attention
from pkvsim.selection.served import why_not_selected
from pkvsim.selection.setup import SelectionSetup, summary_bytes


def selecting_layers(groups: Sequence[DecodeGroup], setup: SelectionSetup) -> tuple[int, ...]:
    """Of each kind of layers, how many select: those that see all tokens and that the kernels serve, all but the first
    setup.dense_layers of them, counted over the kinds in their order."""
    dense, counts = setup.dense_layers, []
    for group in groups:
        able = group.count if why_not(group) is None else 0
        counts.append(max(0, able - dense))
        dense = max(0, dense - able)
    return tuple(counts)


def why_not(group: DecodeGroup) -> str | None:
    """Why this kind of layers selects no pages, None where it does."""
    if group.shape is None or group.options is None or group.attention.kind != FULL or group.attention.selected_entries:
        return f"expected grouped-query attention over all tokens, got {describe_attention(group.attention)}"
    return why_not_selected(group.shape, group.options)


def summary_page_bytes(model: ModelSpec, page_size: int, setup: SelectionSetup | None) -> int:
    """Bytes of a page's summaries over the layers of one GPU that select. ValueError where none of the model can."""
    if setup is None:
        return 0
    groups = decode_groups(model, page_size)
    if all(why_not(group) is not None for group in groups):
        raise ValueError(f"select: {model.name}: {why_not(groups[0])}")
    counts = selecting_layers(groups, setup)
    return sum(count * summary_bytes(group.shape, setup)
               for group, count in zip(groups, counts) if group.shape is not None)  # fmt: skip
