"""One A/B call: which of the selecting kernel's options are worth keeping. python ab_selection.py; under a minute."""
import itertools
import sys

sys.path.insert(0, "examples")
import numpy as np
import torch
from bench.selection_measure import MOST_LAYERS, PINS, SHAPE

from gpu import DecodeEngine, PageSelector, PageSummaries
from gpu.kernels import compile as compiler
from gpu.measure.cases import lay_out
from gpu.measure.pools import BenchPool
from gpu.measure.timing import graph_time_us, l2_bytes, rotation_length
from gpu.selection import variant
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.selection.rules import Budget

extra: dict[str, int] = {}
options_of, warps_of = compiler.compile_options, variant.warps_of
compiler.compile_options = lambda defines: options_of(defines | extra)
pool = BenchPool(pool_gib=18, dtype=torch.float16, seed=1)
budget = Budget(0.1, 0)


def set_up(wide: int, **defines: int) -> None:
    extra.clear()
    extra.update({name: 1 for name, on in defines.items() if on})
    compiler._load.cache_clear()
    variant.warps_of = warps_of if wide else lambda *_: variant.WARPS


def time_us(run, layers: int) -> float:
    return graph_time_us(run, variants=layers, repeats=5).median_us


for rows, length in ((1, 131072), (2, 65536), (4, 32768), (8, 32768), (64, 32768)):
    lens = np.full(rows, length, np.int32)
    read = max(1, int(useful_kv_bytes(SHAPE, lens) * budget.fraction))
    case = lay_out(pool, SHAPE, lens, seed=rows, min_layers=min(MOST_LAYERS, rotation_length(read, l2_size=l2_bytes())))
    seq_lens, table = case.on_gpu()
    layers = len(case.layers)
    out, lse = torch.empty_like(case.q), torch.empty(case.q.shape[:2], device=case.q.device)
    set_up(1)
    engine = DecodeEngine(SHAPE)
    engine.plan(seq_lens, table)
    dense = time_us(lambda i: engine.run(case.q, *case.layers[i], out=out, lse=lse), layers)
    print(f"{rows} x {length}: dense {dense:.1f}", flush=True)
    for coded in (None, "uint8"):
        summaries = [PageSummaries(SHAPE, k, summary_dtype=coded) for k, _ in case.layers]
        for own, (k, _) in zip(summaries, case.layers):
            own.update(k, seq_lens, table)
        lists = None
        for late, early, wide in itertools.product((1, 0), (0, 1), (0, 1)):
            if wide and warps_of(SHAPE, length // 16, rows * 8, 132, "softmax_mean") == variant.WARPS:
                continue
            if (late and (early or wide)) or (coded and (late, early) != (0, 1) and (late, early, wide) != (0, 0, 0)):
                continue
            set_up(wide, COUNT_LATE=late, ASK_LATE=1 - early)
            selector = PageSelector(SHAPE, budget=budget, pins=PINS, summary_dtype=coded)
            selector.plan(seq_lens, table)
            found = selector.select(case.q, summaries[0]).pages.clone()
            same = lists is None or bool((found == lists).all())
            lists = found
            select = time_us(lambda i: selector.select(case.q, summaries[i]), layers)
            both = time_us(lambda i: engine.run(case.q, *case.layers[i], out=out, lse=lse, selected=selector.select(
                case.q, summaries[i])), layers)  # fmt: skip
            print(f"  {coded or '16 bits'} count late {late} early {early} wide {wide}: select {select:.1f}, "
                  f"everything {both:.1f} ({both / dense:.3f}), lists as before {same}", flush=True)  # fmt: skip
    if rows == 64:
        masses = torch.empty(rows, 8, length // 16, 4, device=case.q.device)
        for late, kept in itertools.product((0, 1), (1, 0)):
            set_up(1, PAGE_LSE_EARLY=1 - late, PAGE_LSE_THROUGH=1 - kept)
            own = DecodeEngine(SHAPE)
            own.plan(seq_lens, table)
            us = time_us(lambda i: own.run(case.q, *case.layers[i], out=out, lse=lse, page_lse=masses), layers)
            print(f"  mass late {late} kept {kept}: {us:.1f} ({us / dense - 1:+.2%})", flush=True)
