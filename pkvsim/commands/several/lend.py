"""pkvsim whatif --lend."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pkvsim.devices.device import DeviceSpec
    from pkvsim.models.model_spec import ModelSpec
    from pkvsim.serving.server_config import ServingConfig
    from pkvsim.traces.requests import RequestTrace


# What the replicas go by. Their steps take prompts whole, so step_tokens only has to let max_batch be.
SERVED = ("page_size", "max_batch", "step_tokens", "kv_gib", "memory_fraction", "workspace_gib", "replicas",
          "draft_seed")


def check_served(config: ServingConfig) -> None:
    """ValueError naming the first setting of a server that replicas which lend do not have: taken for their memory
    alone it would give wrong times, and left out it would say nothing."""
    for field in fields(config):
        given = getattr(config, field.name)
        if field.name not in SERVED and given != field.default:
            told = "some" if is_dataclass(given) else given
            raise ValueError(f"{field.name}: expected {field.default} with --lend, got {told}")


def whatif_lend(
    ways: str, requests: RequestTrace, model: ModelSpec, device: DeviceSpec, config: ServingConfig, *, as_json: bool,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:  # fmt: skip
    """Serves the requests on config.replicas replicas in each of the ways, and prints a line for each. ValueError as
    check_served and serve_lending."""
    from pkvsim.pricing.kv_parallel import unserved_layers
    from pkvsim.serving.costs import page_budget, routed_groups
    from pkvsim.studies.lend.prices import LendPrices
    from pkvsim.studies.lend.run import WAYS, serve_lending

    check_served(config)
    names = list(WAYS) if ways == "all" else [name.strip() for name in ways.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"lend: expected some of {', '.join(WAYS)}, each once, or all, got {ways!r}")
    unserved = unserved_layers(routed_groups(model, config.page_size))
    if "borrow" in names and unserved is not None:
        others = ", ".join(way for way in WAYS if way != "borrow")
        raise ValueError(f"lend: expected some of {others} for {unserved}")
    pages, prices, results = page_budget(model, device, config), LendPrices(model, device), []
    for name in names:
        def advance(sent: int, name: str = name) -> None:
            if progress is not None:
                progress(name, sent, len(requests))

        results.append(serve_lending(requests, prices, way=name, replicas=config.replicas, pages=pages,
                                     page_size=config.page_size, max_batch=config.max_batch, progress=advance))
    if as_json:
        document = {"device": device.name, "model": model.name, "trace": requests.name, "replicas": config.replicas,
                    "pages": pages, "page_size": config.page_size, "ways": [result.to_dict() for result in results]}
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    from pkvsim.reports.several.table_lend import print_lend

    print_lend(results, f"{config.replicas} x {device.label}, {model.name}: {len(requests):,} requests of "
                        f"{requests.name}, {pages * config.page_size:,} tokens of KV in each replica")
