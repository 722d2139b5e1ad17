#!/bin/sh
# Everything that the GPU record stands for, in one go: the GPU tests as the GPU at hand, then as the card,
# then the default benchmark alone on the GPU, then the record. Logs, junit files, bench.json and record.json go to $OUT.
#
#     OUT=/tmp/out sh tests/gpu/run_all.sh                     # the table of what passed comes last
#     OUT=/tmp/out STEPS="itself card" sh tests/gpu/run_all.sh # of the steps itself, card, several, several_card,
#                                                              # bench, record
#
# PYTHON, WORKERS (pytest -n), CARD and BACKENDS may be given. The exit status is 0 where every step asked for passed.
set -u
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-out}
CARD=${CARD:-rtx3060}
WORKERS=${WORKERS:-14}
STEPS=${STEPS:-itself card several several_card bench record}
BACKENDS=${BACKENDS:-balanced,workqueue,cuda_core,tensor_core,xqa}
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$OUT"
failed=0

# step NAME COMMAND...: runs it, keeps its log and a line for the table.
step() {
    name=$1
    shift
    case " $STEPS " in *" $name "*) ;; *) return ;; esac
    begin=$(date +%s)
    "$@" >"$OUT/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    printf '%-12s exit %d  %4d s  %s\n' "$name" $status $(($(date +%s) - begin)) "$(tail -n 1 "$OUT/$name.log")" \
        >>"$OUT/table.txt"
}

: >"$OUT/table.txt"
# Each worker takes tests that stand together, which use the same models and kernels, and one thread for its references
# on the CPU, as there is a worker for each core.
workers() {
    env OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$PYTHON" -m pytest tests/gpu -q -n "$WORKERS" --dist worksteal \
        --durations 25 "$@"
}
step itself workers --junit-xml "$OUT/itself.xml"
step card workers --card "$CARD" --junit-xml "$OUT/card.xml"
# Ranks that share the GPU wait for each other, so that nothing may run beside them.
step several "$PYTHON" -m pytest tests/gpu/several -q --durations 5
step several_card "$PYTHON" -m pytest tests/gpu/several -q --durations 5 --card "$CARD"
step bench "$PYTHON" examples/bench_decode.py --cells default --backends "$BACKENDS" --json "$OUT/bench.json"
step record "$PYTHON" -m tests.gpu.record --bench "$OUT/bench.json" --junit "$OUT/itself.xml" "$OUT/card.xml" \
    --out "$OUT/record.json"
grep -hE '^(FAILED|ERROR)' "$OUT"/itself.log "$OUT"/card.log "$OUT"/several*.log 2>/dev/null | head -n 20
cat "$OUT/table.txt"
exit $failed
