"""Options that several commands take, declared once; the defaults are each command's."""
from __future__ import annotations

from typing import Annotated, Optional

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str, typer.Option(help="A name that `pkvsim devices` lists, or a .json file.")]
# A layer's attention.
NumQHeads = Annotated[int, typer.Option(help="A multiple of the KV heads.")]
NumKVHeads = Annotated[int, typer.Option(help="Of one layer on one GPU.")]
HeadDim = Annotated[int, typer.Option(help="Elements of a K or V vector of one head.")]
PageSize = Annotated[int, typer.Option(help="Tokens per KV page.")]
Layers = Annotated[int, typer.Option(help="Attention layers that one plan serves.")]
Window = Annotated[
    Optional[int], typer.Option(help="Sliding window: tokens that a query token sees, itself among them.")
]
QueryTokens = Annotated[int, typer.Option(help="Query tokens per row and step (speculative decoding), 1 to 8.")]
# A server and its requests.
Model = Annotated[str, typer.Option(help="A preset, or a Hugging Face config.json.")]
RateScale = Annotated[float, typer.Option(help="Arrival rate, as a multiple of the trace's: 2 halves every gap.")]
Jitter = Annotated[float, typer.Option(help="Move every arrival by up to this many seconds, at random.")]
Limit = Annotated[Optional[int], typer.Option(help="Only the first N requests of the trace.")]
Seed = Annotated[
    int, typer.Option(help="Of jitter, of spreading timestamps that tick coarsely, and of which drafts are accepted.")
]
PrefixCache = Annotated[
    str, typer.Option(help="Reuse of prompt blocks: none, lru, or the bounds infinite and belady.")
]
MaxBatch = Annotated[int, typer.Option(help="Most requests running at once.")]
KVGib = Annotated[Optional[float], typer.Option(help="GiB of KV pages; by default what weights and workspace leave.")]
WeightBits = Annotated[
    Optional[int], typer.Option(help="16, 8 or 4 bits for layer weights; by default 16, or what fits.")
]
Order = Annotated[
    str, typer.Option(help="Who runs first of those that wait: fcfs, shortest, batchllm, kvshare or continuum.")
]
Replicas = Annotated[int, typer.Option(help="Equal servers behind a router.")]
RouterName = Annotated[
    str, typer.Option("--router", help="Who gets which request: round-robin, least-tokens or prefix (see --replicas).")
]
# Who computes the cells of a study.
WorkerCount = Annotated[int, typer.Option("--workers", help="Processes of this machine that share the cells.")]
Dask = Annotated[
    Optional[str],
    typer.Option(help="Address of a Dask scheduler whose workers compute the cells, such as tcp://10.0.0.1:8786."),
]
