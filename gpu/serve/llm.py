"""The way in for programs: a model that generates.

    llm = LLM("smollm2")
    for done in llm.generate(["The capital of France is"], SamplingParams(max_tokens=16)):
        print(done.text)

gpu.serve.async_llm makes an asynchronous service of it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.cache.tiers.host_room import free_host_bytes
from gpu.measure import memory
from gpu.serve.attention import Attention, KVPages, TorchAttention, check_kernels, page_bytes
from gpu.serve.decoder import Decoder
from gpu.serve.model.products import StreamedProducts, TorchProducts
from gpu.serve.model.tokenizer import tokenizer_of
from gpu.serve.model.weights import load
from gpu.serve.runner import Runner, graph_rows
from gpu.serve.server import Request, Server
from gpu.serve.step import GREEDY, SamplingParams, is_number
from gpu.serve.tiers.open_tiers import check_tiers, open_tiers
from pkvsim.kv_types import KV_DTYPES
from pkvsim.memory.prefix_cache import KINDS
from pkvsim.memory.restarts import check_flush_s
from pkvsim.serving.live.live_step import check_served
from pkvsim.serving.orders import ORDERS
from pkvsim.serving.state import Limits
from pkvsim.shapes import check_int

KEEP_FREE_FRACTION = 0.01  # of the pages, that an admission leaves while other requests run, as the simulator's default
CPU_PAGES = 4096
GIB = 2**30
WORKSPACE_BYTES = GIB  # FlashInfer's and cuBLAS's workspaces, graphs, what PyTorch caches: an assumption


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a model is served. Raises ValueError naming the field."""

    dtype: str | None = None  # "float16", "bfloat16", on the CPU also "float32"; None: bfloat16, and float32 on the CPU
    kv_dtype: str | None = None  # None: dtype; or of pkvsim.kv_types.KV_DTYPES
    device: str | None = None  # "cuda" or "cpu"; None: cuda where there is one
    page_size: int = 16  # tokens
    max_batch: int = 256  # most requests running at once
    step_tokens: int = 2048  # most tokens of a step, at least max_batch
    max_context: int | None = None  # most tokens of a request; None: the model's, as far as the pages reach
    num_pages: int | None = None  # of KV; None: kv_gib, or what the model leaves of memory_fraction
    kv_gib: float | None = None
    memory_fraction: float = 0.9  # of the GPU's memory
    prefix_cache: str = "none"  # or "lru"
    tiers: tuple[str, ...] = ()  # of KV beyond the pages: "host:16GiB:50", "disk0:200GiB:5=/mnt/nvme/kv"
    tier_flush_s: float = 0.0  # most seconds of close() in which disks write what host memory holds
    order: str = "fcfs"  # of pkvsim.serving.orders: fcfs, shortest (by max_tokens) or kvshare
    graphs: bool = True  # decode steps in CUDA graphs
    # Products of few rows by our kernel, which streams weights (True), or PyTorch's; None: ours on a GPU.
    streamed_products: bool | None = None
    dummy_weights: bool = False
    seed: int = 0  # of dummy weights

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1, 1 << 16)
        check_int("max_batch", self.max_batch, 1, 1 << 12)
        check_int("step_tokens", self.step_tokens, self.max_batch, 1 << 20)
        for name in ("max_context", "num_pages"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, 2**31 - 1)
        if self.dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {self.dtype!r}")
        if self.kv_dtype not in (None, self.dtype, *KV_DTYPES):
            raise ValueError(f"kv_dtype: expected that of the model or one of {', '.join(KV_DTYPES)}, "
                             f"got {self.kv_dtype!r}")
        if self.prefix_cache not in ("none", "lru"):
            raise ValueError(f"prefix_cache: expected none or lru, got {self.prefix_cache!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.kv_gib is not None and (not is_number(self.kv_gib) or not 0 < self.kv_gib < math.inf):
            raise ValueError(f"kv_gib: expected a number above 0, got {self.kv_gib!r}")
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_flush_s(self.tier_flush_s)
        if not is_number(self.memory_fraction) or not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction: expected a number in (0, 1], got {self.memory_fraction!r}")
        if self.device not in (None, "cpu") and not str(self.device).startswith("cuda"):
            raise ValueError(f"device: expected cuda or cpu, got {self.device!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What a request gave."""

    prompt: list[int]
    tokens: list[int]
    # Without the token that ended it. None until a text, or a look at LLM.tokenizer, has loaded the tokenizer.
    text: str | None
    finish_reason: str  # "stop" or "length"; why it was refused otherwise
    status: str  # gpu.serve.server's SERVED, REFUSED or CANCELLED


class LLM:
    """A model, its pages and the server over them."""

    __slots__ = ("config", "weights", "options", "pages", "server", "runner", "prefill", "notes", "tiers", "_model",
                 "_max_context", "_tokenizer", "_pool", "_note")

    def __init__(self, model: str | Path, options: ServeOptions = ServeOptions(), *, record: bool = False,
                 say: Callable[[str], None] = lambda line: None) -> None:
        """model: a folder of Hugging Face's, a .gguf file, "smollm2", or with dummy weights also a preset of pkvsim.
        record: keeps a record of every step (server.steps). say: is told of what takes time or differs from what was
        asked for. Raises ValueError where the model cannot be read, served, or does not fit."""
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"device: expected cpu, as no CUDA device answers, got {device!r}")
        cuda = device != "cpu"
        if options.streamed_products and not cuda:
            raise ValueError("streamed_products: expected only on a GPU, got device cpu")
        dtype = options.dtype or ("bfloat16" if cuda else "float32")
        if cuda and dtype == "float32":
            raise ValueError("dtype: expected float16 or bfloat16 on the GPU, got 'float32'")
        check_served(_limits(options, num_pages=1))
        self.options, self._model, self._tokenizer = options, model, None
        self.notes: list[str] = []

        def note(line: str) -> None:
            self.notes.append(line)
            say(line)

        self._note = note
        kv_dtype = options.kv_dtype or dtype
        stores = check_tiers(options.tiers, kv_dtype, pin=cuda, flush_s=options.tier_flush_s)
        decodes = partial(check_kernels, page_size=options.page_size, kv_dtype=kv_dtype)
        self.config, self.weights = load(model, dtype=getattr(torch, dtype), device=device,
                                         check=decodes if cuda else None,
                                         dummy=options.dummy_weights, seed=options.seed,
                                         room=weights_room(options) if cuda else _host_room())
        num_pages = self._num_pages(cuda, kv_dtype)
        self._max_context = min(options.max_context or self.config.max_context, self.config.max_context,
                                num_pages * options.page_size)
        self.pages = KVPages(self.config, num_pages=num_pages, page_size=options.page_size, kv_dtype=kv_dtype,
                             device=device)
        attention: Attention
        if cuda:
            from gpu.serve.gpu_attention import GpuAttention

            attention = GpuAttention(self.config, self.pages, dtype=dtype, max_rows=options.max_batch, say=note)
            self.prefill = attention.prefill
        else:
            attention, self.prefill = TorchAttention(self.config, self.pages), "torch"
        streamed = cuda if options.streamed_products is None else options.streamed_products
        products = (StreamedProducts if streamed else TorchProducts)(self.config.norm_eps)
        self.runner = Runner(Decoder(self.config, self.weights, products), attention, max_batch=options.max_batch,
                             max_pages=-(-self._max_context // options.page_size),
                             graphs=graph_rows(options.max_batch) if options.graphs else ())
        self.runner.capture()
        self._pool, self.tiers = None, None
        if options.tiers:
            self._pool, self.tiers = open_tiers(stores, self.config, self.weights, self.pages, self.runner,
                                                flush_s=options.tier_flush_s)
        self.server = self._new_server(options, num_pages, record)

    def close(self) -> None:
        """Ends its tiers, where it has any: what disks hold stays, and what tier_flush_s has time for of host memory.
        Nothing is to be served any more."""
        if self._pool is not None and self._pool.is_open:
            self._pool.close()
            found = self._pool.flushed
            if found is not None:
                self._note(f"tiers: {found.kept:,} blocks of host memory were written to disks in "
                           f"{found.end_s - found.begin_s:.1f} s, {found.left:,} were not")

    def restart(self, *, num_pages: int | None = None, max_batch: int | None = None, step_tokens: int | None = None,
                prefix_cache: str | None = None, order: str | None = None) -> None:
        """Begins anew: an empty cache, no requests, and where they are given other options over the same weights and
        pages. ValueError where requests are under way or there are not so many pages or rows, RuntimeError where an
        AsyncLLM or generate() drives the server."""
        with self.server.driven_by("restart"):
            if self.server.has_work:
                raise ValueError(f"restart: expected no request under way, got {self.server.num_unfinished}")
            pages, rows = self.pages.num_pages, self.runner.max_batch
            if num_pages is not None and not 1 <= num_pages <= pages:
                raise ValueError(f"num_pages: expected 1 to {pages}, which there are, got {num_pages}")
            if max_batch is not None and not 1 <= max_batch <= rows:
                raise ValueError(f"max_batch: expected 1 to {rows}, which the model was loaded for, got {max_batch}")
            given = {"max_batch": max_batch, "step_tokens": step_tokens, "prefix_cache": prefix_cache, "order": order}
            options = replace(self.options, **{name: value for name, value in given.items() if value is not None})
            self.server = self._new_server(options, num_pages or self.server.scheduler.limits.num_pages,
                                           self.server.steps is not None)
            self.options = options

    def _new_server(self, options: ServeOptions, num_pages: int, record: bool) -> Server:
        return Server(
            self.runner, _limits(options, num_pages),
            max_context=min(self._max_context, num_pages * options.page_size),
            vocab_size=self.config.vocab_size, eos_token_ids=self.config.eos_token_ids, record=record,
            tiers=self.tiers,
        )  # fmt: skip

    def _num_pages(self, cuda: bool, kv_dtype: str) -> int:
        """KV pages, by what was asked for or by the memory at hand."""
        options, page = self.options, page_bytes(self.config, page_size=self.options.page_size, kv_dtype=kv_dtype)
        if options.num_pages is not None:
            return options.num_pages
        if options.kv_gib is not None:
            room = options.kv_gib * GIB
        elif not cuda:
            room = CPU_PAGES * page
        else:
            free, total = torch.cuda.mem_get_info()
            free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            room = free - (1 - options.memory_fraction) * total - WORKSPACE_BYTES - self._activation_bytes()
        pages = int(room // page)
        if pages < 1:
            raise ValueError(f"model: expected room for KV pages of {page / 2**20:.3g} MiB beside its weights of "
                             f"{self.weights.num_bytes / GIB:.2f} GiB, of which {room / GIB:.2f} GiB are left")
        context = -(-(options.max_context or self.config.max_context) // options.page_size)
        return min(pages, pages_with_reserve(context * options.max_batch))  # requests could never use more

    def _activation_bytes(self) -> int:
        """Bytes of a largest step's intermediate results, roughly: those of the MLP, and logits in 32 bits too."""
        c, o = self.config, self.options
        return 2 * o.step_tokens * (4 * c.mlp_width + 8 * c.hidden_size) + 6 * o.max_batch * c.vocab_size

    @property
    def tokenizer(self) -> Any:
        """The model's, as Transformers has it. ValueError where there is none."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._model)
        return self._tokenizer

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a text; ids are left as they are. ValueError for what is neither, and a text without a
        tokenizer."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
            raise ValueError(f"prompts: expected texts or lists of token ids, got {type(prompt).__name__}")
        return list(prompt)

    def completion(self, request: Request) -> Completion:
        """What an ended request gave."""
        tokens = list(request.tokens)
        shown = tokens[:-1] if request.reason == "stop" else tokens
        known = self._tokenizer is not None
        return Completion(request.prompt.tolist(), tokens, self._tokenizer.decode(shown) if known else None,
                          request.reason or request.status, request.status)

    def generate(self, prompts: Sequence[str | Sequence[int]],
                 params: SamplingParams | Sequence[SamplingParams] = GREEDY) -> list[Completion]:
        """Serves all prompts, texts or token ids, and returns what they gave in their order. An interrupt cancels them.

        Raises ValueError naming prompts or params before any is served, RuntimeError where another thread's generate()
        or an AsyncLLM drives the server.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise ValueError("prompts: expected a list of texts or of lists of token ids, got "
                             f"{type(prompts).__name__}")
        all_ids = [self.encode(prompt) for prompt in prompts]
        each = [params] * len(all_ids) if isinstance(params, SamplingParams) else params
        if not isinstance(each, Sequence) or not all(isinstance(one, SamplingParams) for one in each):
            raise ValueError(f"params: expected SamplingParams, or a list of them, got {params!r}")
        if len(each) != len(all_ids):
            raise ValueError(f"params: expected one, or {len(all_ids)} of them, got {len(each)}")
        with self.server.driven_by("generate"):
            requests: list[Request] = []
            try:
                requests += [self.server.add_request(ids, one) for ids, one in zip(all_ids, each)]
                while self.server.has_work:
                    self.server.step()
            except BaseException:
                for request in self.server.unfinished():
                    self.server.cancel(request)
                with suppress(Exception):
                    self.server.step()  # tells of their ends, and reads what is under way
                raise
            return [self.completion(request) for request in requests]


def weights_room(options: ServeOptions) -> int:
    """Bytes of weights that GPU memory has room for beside what the options keep for pages and all else."""
    free = memory.free_bytes()
    if options.kv_gib is not None:
        return free - int(options.kv_gib * GIB)
    if options.num_pages is not None:
        return free
    return free - int((1 - options.memory_fraction) * torch.cuda.mem_get_info()[1]) - WORKSPACE_BYTES


def _host_room() -> int | None:
    """Bytes that weights may take of this machine's memory; None where the system does not tell."""
    with suppress(OSError):
        return free_host_bytes()
    return None


def pages_with_reserve(used: int) -> int:
    """The fewest pages of which requests may use so many beside those that an admission leaves free."""
    pages = used
    while pages - reserve(pages) < used:
        pages = used + reserve(pages)
    return pages


def reserve(num_pages: int) -> int:
    """Pages that an admission leaves free while other requests run."""
    return int(num_pages * KEEP_FREE_FRACTION)


def _limits(options: ServeOptions, num_pages: int) -> Limits:
    return Limits(
        page_size=options.page_size, num_pages=num_pages, keep_free=reserve(num_pages),
        max_batch=options.max_batch, step_tokens=options.step_tokens, cache_kind=KINDS.index(options.prefix_cache),
        order=ORDERS.index(options.order),
    )  # fmt: skip
