"""One long row over the GPUs there are, decoded and checked.

    python examples/several.py                              # all GPUs of this machine; with one, two ranks share it
    python examples/several.py --tokens 200000 --ranks 3    # three ranks on one GPU

Every rank's part of the answer is worked out in FP32 by PyTorch from the rank's own pages, and the parts merged, beside
what the kernels gave.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams of ranks on one GPU must not queue up in one
from bench.script import one_line_errors

from gpu.measure.environment import environment, lacks_gpu, options_of, write_json
from pkvsim.schedule.shares import MAX_RANKS
from pkvsim.shapes import check_int

TOLERANCE = 2e-3
CHUNK = 1 << 16  # tokens that are filled, and checked, at a time


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--ranks", type=int, default=2, help="where there is one GPU")
    parser.add_argument("--steps", type=int, default=20, help="decode steps, each of which appends a token")
    parser.add_argument("--json", type=pathlib.Path, help="write what was found here")
    return parser.parse_args(argv)


@one_line_errors("several")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_int("tokens", args.tokens, 0)
    check_int("steps", args.steps, 1)
    check_int("ranks", args.ranks, 2, MAX_RANKS)
    if lacks_gpu("several"):
        return 1
    import cupy
    import numpy as np
    import torch

    from gpu.measure.progress import tracked
    from gpu.several import DeviceGroup, ShardedCache, ShardedDecode
    from pkvsim import DecodeShape

    count = torch.cuda.device_count()
    shape, group = DecodeShape(32, 8, 128, 16), DeviceGroup(range(count) if count > 1 else [0] * args.ranks)
    most = args.tokens + args.steps
    cache = ShardedCache(shape, group, num_pages=-(-most // 16) // group.num_ranks + 2, max_batch=1, max_seq_len=most)
    row = cache.allocate()
    for begin in tracked(range(0, args.tokens, CHUNK), "filling pages"):
        size = min(CHUNK, args.tokens - begin), shape.num_kv_heads, shape.head_dim
        cache.fill(row, random(group, size, begin), random(group, size, begin + 1))
    engine = ShardedDecode(shape, group=group, owner="all", max_batch=1)
    engine.plan(*cache.device_tables())
    pools = [[getattr(pool, name) for pool in cache.pools.values()] for name in ("k_pages", "v_pages")]
    worst, times = 0.0, []
    for step in tracked(range(args.steps), "decoding"):
        size = 1, shape.num_kv_heads, shape.head_dim
        cache.append([row], random(group, size, -2 * step - 1), random(group, size, -2 * step - 2))
        cache.device_tables()  # brings lengths and tables up to date, where they are
        q = random(group, (1, shape.num_q_heads, shape.head_dim), 10**6 + step)
        engine.synchronize()
        start = time.perf_counter()
        results = engine.run(q, *pools)
        engine.synchronize()
        times.append(time.perf_counter() - start)
        if step in (0, args.steps - 1):
            want = expected(cache, q[0].get())
            # NumPy's maximum, since Python's passes over NaN.
            worst = float(np.max([worst, *(abs(out.get().astype("f8") - want).max() for out, _ in results)]))
            same = len({out.get().tobytes() for out, _ in results}) == 1
            if not worst < TOLERANCE or not same:
                print(f"several: error: ranks {'agree' if same else 'differ'}, error {worst:.2g}", file=sys.stderr)
                return 1
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "options": options_of(args), "ranks": group.num_ranks,
                               "gpus": count, "largest_error": worst, "step_us": [us * 1e6 for us in times]})
    where = f"{count} GPUs" if count > 1 else f"{group.num_ranks} ranks on one GPU"
    print(f"{args.tokens:,} tokens over {where} ({cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}): "
          f"largest error {worst:.1e}, {min(times) * 1e6:.0f} us a step with its launches, all ranks alike")
    return 0


def random(group, size: tuple[int, ...], seed: int) -> list:
    """The same numbers on every rank's device, which makes them itself: a million tokens take the host a minute."""
    import cupy

    made = []
    for rank in group.ranks:
        with group.use(rank):
            numbers = cupy.random.default_rng(seed % 2**32).standard_normal(size, dtype=cupy.float32)
            made.append(numbers.astype(cupy.float16))
    return made


def expected(cache, q):
    """FP32 attention of the row, [1, num_q_heads, head_dim] float64, from every rank's own pages."""
    import numpy as np
    import torch

    heads, tops, sums, accs = cache.shape.num_kv_heads, [], [], []
    for rank, pool in cache.pools.items():
        cache.group.barrier()
        where = f"cuda:{cache.group.device(rank)}"
        length = int(pool.seq_lens[0])
        k_pages, v_pages = (torch.as_tensor(pages, device=where) for pages in (pool.k_pages, pool.v_pages))
        query = torch.from_numpy(q).to(where).float().view(heads, -1, cache.shape.head_dim)
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            ids = torch.from_numpy(pool.block_table[0, begin // 16:-(-end // 16)].astype(np.int64)).to(where)
            k, v = (pages[ids].transpose(0, 1).reshape(heads, -1, cache.shape.head_dim)[:, :end - begin].float()
                    for pages in (k_pages, v_pages))
            logits = query @ k.transpose(1, 2) / cache.shape.head_dim**0.5
            top = logits.max(-1, keepdim=True).values
            weights = torch.exp(logits - top)
            tops.append(top.double().cpu()), sums.append(weights.double().sum(-1, keepdim=True).cpu())
            accs.append((weights @ v).double().cpu())
    tops, sums, accs = map(torch.stack, (tops, sums, accs))
    scale = torch.exp(tops - tops.max(0).values)
    return ((accs * scale).sum(0) / (sums * scale).sum(0)).reshape(1, -1, cache.shape.head_dim).numpy()


if __name__ == "__main__":
    sys.exit(main())
