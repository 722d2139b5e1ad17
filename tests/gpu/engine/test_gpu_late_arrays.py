"""Lengths and page ids written by a kernel that lets the decode kernel start before it writes them."""
from __future__ import annotations

import cupy
import numpy as np
import pytest
import torch
from decode_ref import check, make_case

from gpu import DecodeEngine
from pkvsim import DecodeShape

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
WRITER = cupy.RawKernel(r"""
// Lets the next kernel start, waits, and only then copies `count` words.
extern "C" __global__ void write_late(int* to, const int* from, int count, long long nanoseconds) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}
""", "write_late")


@pytest.mark.parametrize("late", ("lengths", "page ids", "both"))
@pytest.mark.parametrize("rows", (1, 7, 60))
@pytest.mark.parametrize("planned_before", (False, True))
def test_what_the_previous_kernel_writes_counts(rows: int, late: str, planned_before: bool) -> None:
    """The plan and the first page ids are read 30 us before they are right; planned_before: the plan is one that an
    earlier launch left for these lengths."""
    rng = np.random.default_rng(rows)
    case = make_case(SHAPE, rng.integers(1, 2000, rows), seed=rows)
    width = case.block_table.shape[1]
    now = torch.cat([case.seq_lens, case.block_table.flatten()])  # one array, for one writer
    before = now.clone()
    if late != "page ids":
        before[:rows] = torch.from_numpy(rng.integers(-5, 3000, rows, dtype=np.int32)).cuda()
    if late != "lengths":
        before[rows:] = torch.from_numpy(rng.integers(-2**31, 2**31, rows * width, dtype=np.int32)).cuda()
    seen = before.clone()
    engine = DecodeEngine(SHAPE, schedule="balanced")
    out = torch.empty_like(case.q)
    lse = torch.empty(case.q.shape[:2], device="cuda")
    arrays = [cupy.asarray(x) for x in (seen, now)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine.plan(seen[:rows], seen[rows:].view(rows, width))
        for _ in range(5):
            seen.copy_(before)
            if planned_before:
                engine.run(case.q, case.k_pages, case.v_pages, out=out, lse=lse)
            out.fill_(float("nan"))
            with cupy.cuda.ExternalStream(stream.cuda_stream):
                WRITER((1,), (256,), (*arrays, np.int32(len(now)), np.int64(30_000)))
            engine.run(case.q, case.k_pages, case.v_pages, out=out, lse=lse)
            stream.synchronize()
            check(out, lse, case, dtype="float16")
