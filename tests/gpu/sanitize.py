"""One small ragged step of every schedule, option and type of cache, checked, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitize
    compute-sanitizer --tool racecheck python -m tests.gpu.sanitize --racecheck

racecheck does not see that __syncwarp orders the lanes' writes before one lane's arrival at a barrier; with --racecheck
the kernels are compiled such that every lane arrives (PKV_RACECHECK in cuda_src/mma.cuh).
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import test_gpu_kv_types as kv_types  # noqa: E402
from decode_ref import check, make_case, run_poisoned  # noqa: E402
from test_gpu_options import OPTIONS, agree, expected, run, step  # noqa: E402

from gpu import DecodeEngine  # noqa: E402
from gpu.config import KernelConfig  # noqa: E402
from pkvsim import AttentionOptions, DecodeShape  # noqa: E402

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
SCHEDULES = ("balanced", "workqueue", "split")


def main() -> int:
    if "--racecheck" in sys.argv[1:]:
        plain = KernelConfig.defines
        KernelConfig.defines = lambda config: plain(config) | {"PKV_RACECHECK": 1}
    for schedule in SCHEDULES:
        case = make_case(SHAPE, (0, 1, 700, 33, 2100), seed=1)
        engine = DecodeEngine(SHAPE, schedule=schedule, splits=4)
        engine.plan(case.seq_lens, case.block_table)
        for _ in range(2):
            check(*run_poisoned(engine, case), case, dtype="float16")
        print(schedule, "ok", flush=True)
    for options in OPTIONS:
        if options.sinks:
            continue
        arrays = step(SHAPE, options, "float16")
        agree(run(DecodeEngine(SHAPE, options=options), arrays), expected(SHAPE, options, arrays), "float16")
        print(options, "ok", flush=True)
    for kv_dtype, kv_scales in kv_types.KINDS:
        options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
        quantised = kv_types.make_quantised(SHAPE, (0, 1, 700, 33, 2100), options, seed=1)
        check(*kv_types.run(DecodeEngine(SHAPE, options=options), quantised), quantised.case(), dtype="float16")
        print(options, "ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
