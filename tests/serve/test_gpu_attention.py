"""What GpuAttention asks of the writer and the engine, which are stood in for by PyTorch: as TorchAttention computes."""
from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from fake_gpu import fake_gpu  # noqa: E402

from gpu.serve.attention import KVPages, StepRows, TorchAttention, attend_to  # noqa: E402
from gpu.serve.model.config import read_config  # noqa: E402
from gpu.serve.step import Chunk  # noqa: E402

PAGE, PAGES = 4, 60
CONFIG = {"architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2, "vocab_size": 50,
          "max_position_embeddings": 256}


class Writer:
    """CacheWriter, over the pages of `pool` by TorchAttention's own writes."""

    pool: KVPages

    def __init__(self, shape, dtype, *, kv_dtype, rope):
        self.kv_dtype, self.rope = kv_dtype, rope

    def append(self, k, v, k_pages, v_pages, *, seq_lens, block_table, token_offsets, q, q_out, k_token_scales=None,
               v_token_scales=None):
        pool = self.pool
        layer = next(at for at, pages in enumerate(pool.k) if pages.data_ptr() == k_pages.data_ptr())
        assert v_pages.data_ptr() == pool.v[layer].data_ptr()
        assert (k_token_scales is not None) == (self.kv_dtype == "int8")
        if k_token_scales is not None:
            assert k_token_scales is pool.k_scales[layer] and v_token_scales is pool.v_scales[layer]
        if token_offsets is None:
            token_offsets = torch.arange(len(seq_lens) + 1)
        q_out.zero_()
        inv_freq = torch.from_numpy(np.asarray(self.rope.inv_freq)).float()
        for row, length in enumerate(seq_lens.tolist()):
            begin, end = token_offsets[row : row + 2].tolist()
            if not length:
                continue
            position = torch.arange(length - (end - begin), length)
            angles = (position[:, None] * inv_freq)[:, None]
            half = q.shape[2] // 2

            def turned(x, angles=angles, half=half):
                low, high = x[..., :half], x[..., half:]
                return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), -1)

            page = block_table[row, position // PAGE].long()
            pool.write(layer, page, position % PAGE, turned(k[begin:end]), v[begin:end])
            q_out[begin:end] = turned(q[begin:end])


class Engine:
    """DecodeEngine on the balanced schedule."""

    pool: KVPages

    def __init__(self, shape, dtype, schedule, *, options):
        assert schedule == "balanced"
        self.window = options.window

    def plan(self, seq_lens, block_table):
        self.lens, self.table = seq_lens, block_table

    def run(self, q, k_pages, v_pages, *, out, lse, k_scale=None, v_scale=None):
        assert q.is_contiguous() and len(q) == len(self.lens) == len(lse)
        layer = next(at for at, pages in enumerate(self.pool.k) if pages.data_ptr() == k_pages.data_ptr())
        if self.pool.dtype == "int8":
            assert k_scale is self.pool.k_scales[layer] and v_scale is self.pool.v_scales[layer]
        for row, length in enumerate(self.lens.tolist()):
            ids = self.table[row, : -(-length // PAGE)].long()
            out[row] = attend_to(q[row : row + 1], *self.pool.read(layer, ids, length), window=self.window)[0] if length else 0


@pytest.fixture
def module(monkeypatch):
    with fake_gpu():
        found = importlib.import_module("gpu.serve.gpu_attention")
        monkeypatch.setattr(found, "CacheWriter", Writer)
        monkeypatch.setattr(found, "DecodeEngine", Engine)
        yield found
    sys.modules.pop("gpu.serve.gpu_attention", None)


def test_pages_of_chunks_are_gathered_together_and_no_graph_is_built_for_each_length(module, monkeypatch):
    config = read_config(CONFIG, name="small")
    pool = KVPages(config, num_pages=PAGES, page_size=PAGE, kv_dtype="float32", device="cpu")
    monkeypatch.setattr(module, "GATHERED_TOKENS", 24)
    chunks = module._TorchChunks(config, pool)
    lens = (9, 12, 30, 2, 1)  # with pages of 4: 12 + 12 tokens, 32, 4 + 4
    begins = (0, 5, 7, 0, 0)
    at, made = 0, []
    for begin, length in zip(begins, lens):
        count = -(-length // PAGE)
        made.append(Chunk(0, begin, np.zeros(length - begin, np.int32), True, list(range(at, at + count))))
        at += count
    chunks.begin(made)
    assert [gathering.tokens for gathering in chunks._gatherings] == [24, 32, 8]
    kernel, cudnn = module.scaled_dot_product_attention, []

    def attention(*args, **options):
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return kernel(*args, **options)

    monkeypatch.setattr(module, "scaled_dot_product_attention", attention)
    for pages in (*pool.k, *pool.v):
        pages.copy_(torch.randn_like(pages))
    q = torch.randn(sum(lens) - sum(begins), 4, 16)
    out = torch.empty_like(q)
    chunks.attend(1, q, out)
    assert cudnn == [False] * len(lens)
    at = 0
    for chunk, length in zip(made, lens):
        end = at + len(chunk.tokens)
        wanted = attend_to(q[at:end], *pool.read(1, torch.tensor(chunk.page_ids), length), window=None)
        torch.testing.assert_close(out[at:end], wanted, rtol=1e-4, atol=1e-5)
        at = end


@pytest.mark.parametrize("gathered", [1 << 15, 16])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("decode", "chunks"), [([5, 30, 17, 0, 1], []), ([], [(0, 33)]), ([40, 1], [(0, 3), (8, 21)])])
def test_as_pytorch_computes(module, monkeypatch, gathered, kv_dtype, window, decode, chunks):
    monkeypatch.setattr(module, "GATHERED_TOKENS", gathered)
    config = read_config({**CONFIG, "sliding_window": window}, name="small")
    pools = [KVPages(config, num_pages=PAGES, page_size=PAGE, kv_dtype=kv_dtype, device="cpu") for _ in range(2)]
    Writer.pool = Engine.pool = pools[0]
    said: list[str] = []
    ours = module.GpuAttention(config, pools[0], dtype="float32", max_rows=8, say=said.append)
    theirs = TorchAttention(config, pools[1])
    assert ours.prefill == "torch" and len(said) == 1
    lens = [*decode, *(begin + count for begin, count in chunks)]
    ids = np.random.default_rng(0).permutation(PAGES)
    table, at = np.zeros((len(lens), 12), np.int32), 0
    for row, length in enumerate(lens):
        count = -(-length // PAGE)
        table[row, :count] = ids[at : at + count]
        at += count
    made = [Chunk(row, begin, np.zeros(count, np.int32), True, table[row, : -(-(begin + count) // PAGE)].tolist())
            for row, (begin, count) in enumerate(chunks, len(decode))]
    offsets = np.concatenate([np.arange(len(decode) + 1), len(decode) + np.cumsum([count for _, count in chunks])])
    torch.manual_seed(0)
    for page in range(PAGES):  # what earlier steps left, the same in both
        k, v = torch.randn(2, PAGE, 2, 16)
        for pool in pools:
            pool.write(1, torch.full((PAGE,), page), torch.arange(PAGE), k, v)
    rows = StepRows(torch.tensor(lens, dtype=torch.int32), torch.from_numpy(table),
                    torch.from_numpy(offsets.astype(np.int32)) if chunks else None, len(decode), made)
    mixed = torch.randn(int(offsets[-1]), 8, 16)
    outs = []
    for executor in (ours, theirs):
        executor.begin(rows)
        q, k, v = mixed.clone().split((4, 2, 2), dim=1)
        outs.append(executor.attend(1, q, k, v))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    for one, other in zip((*pools[0].k, *pools[0].v), (*pools[1].k, *pools[1].v)):
        assert (one == other).float().mean() > 0.999  # but where a rounding falls the other way
