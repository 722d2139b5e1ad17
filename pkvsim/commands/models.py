"""pkvsim models."""
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors

if TYPE_CHECKING:
    from pkvsim.models.model_spec import ModelSpec


def models(
    names: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="NAME", help="Show every figure of these (presets, config.json files, folders)."),
    ] = None,
    tensor_parallel: Annotated[
        Optional[int], typer.Option(help="GPUs that share each layer; the figures are one GPU's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an array of figures.")] = False,
) -> None:
    """Lists the models; for those named, their layers, weights, caches, and what of their config changes nothing.

    \b
    Examples:
      pkvsim models
      pkvsim models qwen3-30b-a3b --tensor-parallel 4
      pkvsim models ./DeepSeek-V3/config.json --json
    """
    with one_line_errors():
        from pkvsim.models.presets import catalogue, get_model

        chosen = [get_model(name, tensor_parallel=tensor_parallel) for name in names or catalogue()]
    if as_json:
        from pkvsim.models.describe import model_figures

        typer.echo(json.dumps([model_figures(model) for model in chosen], indent=2))
    elif names:
        for model in chosen:
            _print_model(model)
    else:
        _print_catalogue(chosen)


def _print_catalogue(chosen: list[ModelSpec]) -> None:
    """One line a model, then which architectures are read."""
    from rich.console import Console
    from rich.table import Table

    from pkvsim.models.describe import model_figures
    from pkvsim.models.hugging_face import ARCHITECTURES

    table = Table(title="one GPU's share of each preset", title_justify="left")
    table.add_column("name", no_wrap=True)
    for name in ("GPUs", "layers", "parameters\nB", "active\nB", "weights\nGB", "KV KiB\n/ token"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in chosen:
        figures = model_figures(model)
        table.add_row(
            model.name, str(model.tensor_parallel), str(model.num_layers), f"{figures['parameters'] / 1e9:,.2f}",
            f"{figures['active_parameters'] / 1e9:,.2f}", f"{figures['weight_bytes'] / 1e9:,.1f}",
            f"{figures['kv_bytes_per_token'] / 1024:,.1f}",
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    console.print("Of a Hugging Face config.json: pkvsim models PATH. Architectures that are read:")
    console.print(", ".join(sorted(ARCHITECTURES)))


def _print_model(model: ModelSpec) -> None:
    """Every figure of one model, for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pkvsim.models.describe import describe_layers, model_figures
    from pkvsim.reports.grid import print_line

    figures, console = model_figures(model), Console(highlight=False)
    share = f", one of {model.tensor_parallel} GPUs" if model.tensor_parallel > 1 else ""
    console.print(f"[bold]{escape(model.name)}[/] ({model.architecture}){share}", soft_wrap=True)
    table = Table(show_header=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", overflow="fold")
    bits = ", ".join(f"{name} {value:.4g}" for name, value in figures["bits_per_weight"].items())
    rows = [
        ("parameters", f"{figures['parameters']:,}"),
        ("active per token", f"{figures['active_parameters']:,}"),
        ("weights", f"{figures['weight_bytes'] / 1e9:,.2f} GB ({figures['weight_bytes'] / 2**30:,.2f} GiB)"),
        ("bits per weight", bits),
        ("quantisation", escape(model.quantization)),
        ("KV cache per token", f"{figures['kv_bytes_per_token']:,.10g} B in 16 bits"),
        ("... beyond windows", f"{figures['kv_bytes_per_token_beyond_windows']:,.10g} B"),
        ("state per sequence", f"{figures['state_bytes']:,} B"),
        ("FLOPs per token", f"{figures['flops_per_token']:,}, attention left out"),
        ("longest context", f"{model.max_context:,} tokens"),
    ]
    if model.kv_cache_type:
        rows.insert(6, ("cache asked for", escape(model.kv_cache_type)))
    if model.mtp_layers:
        heads = figures["prediction_heads"]
        rows.append(("prediction heads", f"{heads['parameters']:,} parameters, {heads['weight_bytes'] / 1e9:,.2f} GB"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    layers = Table()
    layers.add_column("layers", justify="right", no_wrap=True)
    layers.add_column("attention (query/KV heads x size)", overflow="fold")
    layers.add_column("feed-forward", overflow="fold")
    for count, attention, feed_forward in describe_layers(model):
        layers.add_row(str(count), attention, feed_forward)
    console.print(layers)
    for note in model.notes:
        print_line(console, f"note: {note}")
    by_reason: dict[str, list[str]] = {}
    for name, why in model.ignored:
        by_reason.setdefault(why, []).append(name)
    if by_reason:
        console.print("Fields of no effect:")
    for why, fields in sorted(by_reason.items()):
        print_line(console, f"  {why}: {', '.join(fields)}")
