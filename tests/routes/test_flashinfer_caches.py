"""gpu.routes.flashinfer_decode over FP8 pages, with a FlashInfer of this file that does what its documentation says."""
from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from gpu.routes import flashinfer_decode as fi
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.kv_types import KV_DTYPES

torch = pytest.importorskip("torch", reason="torch is not installed")


from bench.variant_reference import attention_of_row  # noqa: E402

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
LENGTHS, TABLE = np.array([70, 5], np.int32), np.array([[6, 0, 3, 5, 1], [2, 4, 4, 4, 4]], np.int32)
SCALES = {"k_scale": 0.125, "v_scale": 0.375}
SERVED = [(backend, kv_dtype) for backend, known in fi.FP8_CACHES.items() for kv_dtype in known]


def attend(q: torch.Tensor, pages: tuple, rows: list, out: torch.Tensor, *, k_scale: float, v_scale: float) -> None:
    """rows: (page ids, length) of each."""
    k, v = (pool.double() * scale for pool, scale in zip(pages, (k_scale, v_scale), strict=True))
    for row, (ids, length) in enumerate(rows):
        out[row] = attention_of_row(q[row], k, v, "HND", ids, length, AttentionOptions(), None)


class Wrapper:
    """BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self, workspace: torch.Tensor, layout: str, *, use_tensor_cores: bool) -> None:
        assert layout == "HND"

    def plan(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, *sizes: int,
             q_data_type: torch.dtype, kv_data_type: torch.dtype, **options: object) -> None:
        assert sizes == (8, 2, 64, 16) and q_data_type == torch.float16
        self.kv_data_type = kv_data_type
        owned = [indices[begin:end].numpy() for begin, end in zip(indptr, indptr[1:])]
        self.rows = [(ids, (len(ids) - 1) * 16 + int(last)) for ids, last in zip(owned, last_page_len)]

    def run(self, q: torch.Tensor, pages: tuple, *, out: torch.Tensor, k_scale: float, v_scale: float) -> None:
        assert {pool.dtype for pool in pages} == {self.kv_data_type}
        attend(q, pages, self.rows, out, k_scale=k_scale, v_scale=v_scale)


def xqa(q: torch.Tensor, pages: tuple, workspace: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
        max_seq_len: int, *, bmm1_scale: float, bmm2_scale: float, out: torch.Tensor, **options: object) -> None:
    assert {pool.dtype for pool in pages} == {torch.float8_e4m3fn}
    attend(q, pages, [(ids.numpy(), int(length)) for ids, length in zip(block_table, seq_lens)], out,
           k_scale=bmm1_scale * q.shape[-1] ** 0.5, v_scale=bmm2_scale)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Wrapper},
               "flashinfer.decode": {"xqa_batch_decode_with_kv_cache": xqa}}
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: torch.empty(0))  # the workspace, on a GPU


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("backend, kv_dtype", SERVED)
def test_pages_types_and_scales_reach_the_backend(backend: str, kv_dtype: str, as_codes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 64, generator=generator).half()
    pages = [(torch.randn(7, 2, 16, 64, generator=generator) * 8).to(getattr(torch, kv_dtype)) for _ in "kv"]
    engine = fi.FlashInferDecode(SHAPE, "float16", backend, AttentionOptions(kv_dtype=kv_dtype))
    engine.plan_packed(fi.pack_table(LENGTHS, TABLE, page_size=16, device="cpu"))
    out, lse = engine.run(q, *(pool.view(torch.uint8) if as_codes else pool for pool in pages), return_lse=False,
                          **SCALES)
    wanted = torch.empty(2, 8, 64, dtype=torch.float64)
    attend(q, tuple(pages), list(zip(TABLE, LENGTHS.tolist())), wanted, **SCALES)
    assert lse is None and float((out.double() - wanted).abs().max()) < 2e-3


@pytest.mark.parametrize("backend", fi.BACKENDS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_a_backend_has_no_pages_for_is_refused_with_the_reason(backend: str, kv_dtype: str) -> None:
    served = (backend, kv_dtype) in SERVED
    assert (fi.supports(SHAPE, backend, AttentionOptions(kv_dtype=kv_dtype, kv_scales="tensor")) is None) == served
    for kv_scales in ("page", "token"):
        options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
        said = f"one scale each of K and V, not one of every {kv_scales}" if served else f"no {kv_dtype} pages"
        with pytest.raises(ValueError, match=f"^shape: FlashInfer {backend} cannot run it: it takes {said}"):
            fi.FlashInferDecode(SHAPE, "float16", backend, options)
