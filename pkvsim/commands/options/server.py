"""How the simulated server is set up: the options that whatif, sweep and capacity have in common."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pkvsim.commands.options.group import OptionGroup
from pkvsim.commands.shared_options import (
    KVGib,
    MaxBatch,
    Order,
    PageSize,
    PrefixCache,
    Replicas,
    RouterName,
    WeightBits,
)  # fmt: skip

if TYPE_CHECKING:
    from pkvsim.serving.server_config import ServingConfig

DEFAULT_STEP_TOKENS = 2048
KV_NAMES = {"auto": None, "fp8": "float8_e4m3fn"}  # short names beside those of pkvsim.kv_types


@dataclass(frozen=True, slots=True)
class ServerOptions(OptionGroup):
    """The options as they are given; None or the default where they are not."""

    engine: Annotated[
        str,
        typer.Option(help="What serves: pkv (this project's server), or vllm, sglang, trtllm with their own habits."),
    ] = "pkv"
    prefix_cache: PrefixCache = "none"
    shared_reads: Annotated[
        bool,
        typer.Option(
            "--shared-reads/--no-shared-reads",
            help="With --prefix-cache and pkv: running rows that hit the same blocks read them once where that pays.",
        ),
    ] = True
    select: Annotated[
        Optional[str],
        typer.Option(
            help="Decode steps read the pages that a method chooses where that pays: METHOD:BUDGET, such as "
            "mean_std:0.1, centroids:0.1 or quest:0.05, or mean_std:0.1:8bit by summaries in 8 bits; by default "
            "all pages."
        ),
    ] = None
    select_every: Annotated[int, typer.Option(help="Layers that read the lists which the first of them selects.")] = 1
    order: Order = "fcfs"
    kv_ttl: Annotated[
        float, typer.Option(help="With continuum: seconds that an answer's KV is kept for the next turn.")
    ] = 10.0
    replicas: Replicas = 1
    kv_parallel: Annotated[
        int, typer.Option(help="GPUs of each server that hold every row's KV together (policy balanced).")
    ] = 1
    prefill_replicas: Annotated[
        int, typer.Option(help="Servers that compute prompts, while the --replicas decode; 0: each does both.")
    ] = 0
    transfer_gb_s: Annotated[
        Optional[float], typer.Option(help="GB/s at which a prompt's KV goes over; by default the GPU's link.")
    ] = None
    router: RouterName = "round-robin"
    max_batch: MaxBatch = 256
    step_tokens: Annotated[
        Optional[int], typer.Option(help="Most tokens of a step, prefill chunks included; 2,048 by default.")
    ] = None
    page_size: PageSize = 16
    kv_gib: KVGib = None
    kv_dtype: Annotated[
        str, typer.Option(help="Of the KV cache: auto (16 bits), fp8, float8_e4m3fn, float8_e5m2 or int8.")
    ] = "auto"
    memory_fraction: Annotated[float, typer.Option(help="Part of the GPU's memory that the server uses.")] = 0.9
    workspace_gib: Annotated[
        Optional[float], typer.Option(help="Activations, context and graphs; by default the engine's.")
    ] = None
    weight_bits: WeightBits = None
    tensor_parallel: Annotated[Optional[int], typer.Option(help="GPUs that share each layer.")] = None
    graphs: Annotated[
        Optional[bool],
        typer.Option(
            "--graphs/--eager",
            help="Decode in captured graphs, or layer by layer as the host issues it; by default as the engine does.",
        ),
    ] = None
    splits: Annotated[Optional[int], typer.Option(help="Pin the splits of every row.")] = None
    query_tokens: Annotated[
        int, typer.Option(help="Speculative decoding: tokens of a row that decodes, drafts among them, 1 to 8.")
    ] = 1
    acceptance: Annotated[
        Optional[float], typer.Option(help="Probability that a draft is accepted where those before it were.")
    ] = None
    draft_cost: Annotated[
        Optional[float],
        typer.Option(
            help="Time of drafting a token, as a part of a step without drafts; by default the model's prediction "
            "heads', or 0."
        ),
    ] = None

    def config(self, seed: int) -> ServingConfig:
        """The server. seed: of which drafts are accepted. Raises ValueError naming an option."""
        from pkvsim.selection.setup import parse_selection
        from pkvsim.serving.server_config import MAX_DRAFT_SEED, ServingConfig
        from pkvsim.shapes import check_int

        check_int("seed", seed, 0, MAX_DRAFT_SEED)
        if self.select is None and self.select_every != 1:
            raise ValueError(f"select_every: expected with --select alone, got {self.select_every}")
        steps = self.step_tokens
        if steps is None:
            steps = max(DEFAULT_STEP_TOKENS, self.max_batch * max(1, self.query_tokens))
        return ServingConfig(
            engine=self.engine,
            page_size=self.page_size,
            max_batch=self.max_batch,
            step_tokens=steps,
            kv_gib=self.kv_gib,
            kv_dtype=KV_NAMES.get(self.kv_dtype, self.kv_dtype),
            memory_fraction=self.memory_fraction,
            workspace_gib=self.workspace_gib,
            graphs=self.graphs,
            prefix_cache=self.prefix_cache,
            shared_reads=self.shared_reads,
            select=None if self.select is None else parse_selection(self.select, every=self.select_every),
            order=self.order,
            kv_ttl_s=self.kv_ttl,
            replicas=self.replicas,
            kv_parallel=self.kv_parallel,
            prefill_replicas=self.prefill_replicas,
            transfer_gb_s=self.transfer_gb_s,
            router=self.router,
            splits=self.splits,
            query_tokens=self.query_tokens,
            acceptance=self.acceptance,
            draft_cost=self.draft_cost,
            draft_seed=seed,
        )
