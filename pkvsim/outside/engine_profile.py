"""What a serving engine does around the GPU's work: graphs, steps in flight, queues."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int

WHOLE_PROMPT, CHUNK = "prompt", "chunk"  # pages that an admission asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One engine's habits. Raises ValueError naming the field."""

    name: str
    constants: str  # the entry of a device's `outside` that prices its kernels
    graph_sizes: tuple[int, ...] = ()  # decode batches are padded up to the next of these; beyond, and empty: none
    chunk_graph_tokens: int = 0  # steps with a chunk of at most this many tokens are padded to graph_sizes as well
    steps_in_flight: int = 1  # 2: step k + 1 is planned when step k starts, so that what comes then waits for k + 2
    mixes: bool = True  # False: rows do not decode in a step that computes prompts
    queue_ms: float = 0.0  # between a request's submission and the scheduler's queue
    one_streamer: bool = False  # every token goes through one process, whose time for each is a fitted constant
    output_ms: float = 0.0  # between a step's end and its tokens at the client
    attention: str = "policy"  # decode attention: "policy" by our routes, "flash" by the engine's own kernel
    admission: str = WHOLE_PROMPT  # pages free for the whole prompt, or for the chunk that is about to run
    workspace_gib: float = 1.0  # beside weights and KV pages: activations, CUDA context, graphs
    reserve_output: float = 0.0  # of the tokens still to come, for which an admission keeps room; 1: nobody gives way
    keep_free_fraction: float = 0.0  # of the pages, that an admission leaves while other requests run
    source: str = ""

    def __post_init__(self) -> None:
        check_int("steps_in_flight", self.steps_in_flight, 1, 2)
        check_int("chunk_graph_tokens", self.chunk_graph_tokens, 0, MAX_TOKENS)
        sizes = self.graph_sizes
        if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
            raise ValueError(f"graph_sizes: expected ascending sizes >= 1, got {sizes!r:.80}")
        if self.attention not in ("policy", "flash"):
            raise ValueError(f"attention: expected policy or flash, got {self.attention!r}")
        if self.admission not in (WHOLE_PROMPT, CHUNK):
            raise ValueError(f"admission: expected {WHOLE_PROMPT} or {CHUNK}, got {self.admission!r}")
        if not 0 <= self.reserve_output <= 1:
            raise ValueError(f"reserve_output: expected a number in [0, 1], got {self.reserve_output!r}")
        if not 0 <= self.keep_free_fraction < 1:
            raise ValueError(f"keep_free_fraction: expected a number in [0, 1), got {self.keep_free_fraction!r}")
        for name in ("queue_ms", "output_ms", "workspace_gib"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")

    def with_graphs(self, graphs: bool) -> EngineProfile:
        """The engine with steps in CUDA graphs, of its own sizes or vLLM's, or issued layer by layer."""
        if graphs:
            return self if self.graph_sizes else replace(self, graph_sizes=VLLM_GRAPHS)
        return replace(self, graph_sizes=(), chunk_graph_tokens=0)

    def padded(self, most_tokens: int) -> np.ndarray:
        """Tokens that the GPU computes for a batch of 0 .. most_tokens tokens in a graph: int64 [most_tokens + 1]."""
        tokens = np.arange(most_tokens + 1)
        if not self.graph_sizes:
            return tokens
        sizes = np.asarray(self.graph_sizes)
        at = np.searchsorted(sizes, tokens)
        return np.where((at < len(sizes)) & (tokens > 0), sizes[np.minimum(at, len(sizes) - 1)], tokens)


# vLLM 0.24's capture sizes, as its log names them: 51 of them.
VLLM_GRAPHS = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
PROFILES = {
    "pkv": EngineProfile(
        name="pkv", constants="pkv", graph_sizes=VLLM_GRAPHS, keep_free_fraction=0.01,
        source="this project's server: decode in CUDA graphs, attention by its own routes, the rest by constants "
        "fitted to its steps on an H200; on other GPUs at the prices of PyTorch's kernels, an assumption",
    ),
    "vllm": EngineProfile(
        name="vllm", constants="vllm", graph_sizes=VLLM_GRAPHS, chunk_graph_tokens=512, steps_in_flight=2,
        queue_ms=1.1, attention="flash", admission=CHUNK, workspace_gib=1.17,
        source="vLLM 0.24 (asynchronous scheduling, CUDA graphs), watched on an H200, 2026-11-29",
    ),
    "sglang": EngineProfile(
        name="sglang", constants="sglang", graph_sizes=VLLM_GRAPHS, steps_in_flight=2, attention="flash",
        reserve_output=0.5, one_streamer=True,
        source="graphs assumed to be as vLLM's; its overlap scheduler plans a step ahead as well; one TokenizerManager "
        "hands on all tokens (github.com/sgl-project/sglang/issues/6553, 2025-05-23)",
    ),
    "trtllm": EngineProfile(
        name="trtllm", constants="trtllm", graph_sizes=VLLM_GRAPHS, attention="flash", reserve_output=1.0,
        source="graphs assumed to be as vLLM's; its default GUARANTEED_NO_EVICT keeps room for every token to come",
    ),
}  # fmt: skip


def get_profile(name: str) -> EngineProfile:
    """A profile by name; ValueError naming those there are."""
    if name not in PROFILES:
        raise ValueError(f"engine: expected one of {', '.join(PROFILES)}, got {name!r}")
    return PROFILES[name]
