"""Append and decode back to back, as a model's layers do, eagerly and in one captured graph."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from append_ref import inv_freq
from decode_ref import Case, check, make_table

from gpu import CacheWriter, DecodeEngine
from pkvsim import DecodeShape
from pkvsim.reference.rope import Rope


def write_prompt(lens: np.ndarray, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor) -> None:
    """The rows' first tokens, as a prefill would write them."""
    shape = DecodeShape(num_q_heads=8, num_kv_heads=8, head_dim=128, page_size=16)
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lens))).astype(np.int32)).cuda()
    k_new, v_new = (torch.randn(int(lens.sum()), 8, 128, device="cuda").half() for _ in range(2))
    CacheWriter(shape).append(
        k_new,
        v_new * 0.5,
        k_pages,
        v_pages,
        seq_lens=torch.from_numpy(lens).cuda(),
        block_table=table,
        token_offsets=offsets,
        validate=True,
    )


def decode_loop(*, steps: int, graph: bool) -> None:
    """Appends and decodes with nothing in between but the lengths' increment, then checks every step's output."""
    shape = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
    start = np.array([1, 15, 16, 300, 0, 2000], np.int32)  # the fifth row stays empty
    table = make_table(start + steps + 1, 16, np.random.default_rng(0).permutation(1000).astype(np.int32))
    k_pages, v_pages = (
        torch.full((1000, 8, 16, 128), float("nan"), dtype=torch.float16, device="cuda") for _ in range(2)
    )
    table = torch.from_numpy(table).cuda()
    write_prompt(start, k_pages, v_pages, table)
    lens = torch.from_numpy(start).cuda()
    live = (lens > 0).int()
    fused = torch.randn(steps, len(start), 48 * 128, device="cuda")
    fused[..., 40 * 128 :] *= 0.5  # V, as in decode_ref
    fused = fused.half()
    static = fused[0].clone()
    q, k_new, v_new = (part.unflatten(1, (-1, 128)) for part in static.split((4096, 1024, 1024), dim=1))
    q_turned = torch.empty(len(start), 32, 128, dtype=torch.float16, device="cuda")
    out, lse = torch.empty_like(q_turned), torch.empty(len(start), 32, device="cuda")
    writer = CacheWriter(shape, rope=Rope(style="half", inv_freq=inv_freq(128)))
    engine = DecodeEngine(shape)
    engine.plan(lens, table)

    def step() -> None:
        lens.add_(live)
        writer.append(k_new, v_new, k_pages, v_pages, seq_lens=lens, block_table=table, q=q, q_out=q_turned)
        engine.run(q_turned, k_pages, v_pages, out=out, lse=lse)

    kept = []
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        if graph:
            step()  # loads the kernels, and is undone
            lens.sub_(live)
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                step()
        for index in range(steps):
            static.copy_(fused[index])
            q_turned.fill_(float("nan"))
            captured.replay() if graph else step()
            kept.append([array.clone() for array in (q_turned, lens, out, lse)])
    torch.cuda.synchronize()
    for index, (turned, step_lens, step_out, step_lse) in enumerate(kept):
        if index % 7 and index != steps - 1:
            continue
        empty = step_lens == 0
        assert bool(turned[empty].isnan().all()) and not bool(turned[~empty].isnan().any())
        case = Case(shape, torch.where(empty[:, None, None], 0, turned), k_pages, v_pages, table, step_lens)
        check(step_out, step_lse, case, dtype="float16")


@pytest.mark.parametrize("graph", (False, True))
def test_append_and_decode_back_to_back(graph: bool) -> None:
    decode_loop(steps=50, graph=graph)
