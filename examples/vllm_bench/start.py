"""Processes of bench_vllm: one imports vLLM, once, and each job runs in a fork of it with a CUDA context of its own.

An engine of vLLM starts in 70 s, of which 20 are imports and 20 the model's inspection in a process of its own. Forks
share both. What the forks compile they share as well: the graph of a model calls attention as an operator that knows
its layer by name, so that it is the same whatever the backend and the type of its cache, although vLLM keeps one for
each. Kernels of sampling ways that no job uses are not compiled before they are used.
"""
from __future__ import annotations

import gc
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vllm_bench.cases import Job

MODULES = ("vllm", "vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker",
           "vllm.v1.worker.gpu.model_runner", "vllm.model_executor.models.llama",
           "vllm.v1.attention.backends.flash_attn", "vllm.v1.attention.backends.triton_attn",
           "torch._dynamo", "torch._inductor.compile_fx")
SHARED_HASH = "of any attention backend"
FRESH = """import sys
from pathlib import Path
from vllm_bench import child, start
from vllm_bench.cases import Job
start._console = int(sys.argv[2])
child.run(Job.read(Path(sys.argv[1])))
"""


def serve_stages(spec: Path, log: Path) -> None:
    """Runs stages of jobs, those of a stage side by side. spec: JSON, lists of paths of jobs; log: of all processes."""
    stages = [[Job.read(Path(path)) for path in stage] for stage in json.loads(spec.read_text())]
    begin, forks = time.monotonic(), True
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module that only saves time, or vLLM, which a job will fail to import again
            say(f"cannot import {name}: {error}")
            forks = name != "vllm" and forks
    forks = forks and _fork_sees_gpu()
    say(f"vLLM imported in {time.monotonic() - begin:.0f} s; each job runs in {'a fork' if forks else 'a new process'}")
    gc.freeze()
    for stage in stages:
        failed = _run_stage(stage, forks, log)
        again = [replace(job, plain=True) for job in failed if job.limit_s == math.inf and not job.plain]
        if again:
            say(f"{', '.join(job.name for job in again)}: once more, started as vLLM starts by itself")
            _run_stage(again, forks, log)


def _run_stage(stage: Sequence[Job], forks: bool, log: Path) -> list[Job]:
    """Runs jobs side by side. Returns those that failed before they found anything, with time left."""
    begun = [replace(job, until=min(job.until, time.monotonic() + job.limit_s)) for job in stage]
    failed = _wait({_start(job, forks and not job.plain, log): job for job in begun if _is_in_time(job)})
    return [job for job in failed if time.monotonic() < job.until and not _found(job)]


def _found(job: Job) -> bool:
    results = Path(job.results)
    found = json.loads(results.read_text()) if results.exists() else {}
    return any(found.get(part) for part in ("shapes", "cases", "rows", "mix"))


def say(line: str) -> None:
    """Prints to where the first process prints, also in a job, whose own output goes to the log."""
    os.write(_console, f"{time.strftime('%H:%M:%S')} {line}\n".encode())


_console = os.dup(1)


def _is_in_time(job: Job) -> bool:
    left = job.until - time.monotonic()
    if left <= 0:
        say(f"{job.name}: not begun, out of time")
    return left > 0


def _fork_sees_gpu() -> bool:
    """Whether imports left CUDA alone: a fork of a process that has started it cannot use it."""

    def starts() -> None:
        import torch

        if torch.cuda.is_available():  # which asks the driver's library that needs no context
            torch.cuda.init()

    return os.waitstatus_to_exitcode(os.waitpid(_forked(starts, None), 0)[1]) == 0


def _forked(work: Callable[[], None], log: Path | None) -> int:
    """The process id of a fork that does the work and ends with 1 where it raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        target = os.open(log or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        work()
        code = 0
    except BaseException as error:
        traceback.print_exc()
        if log is not None:
            say(f"failed: {type(error).__name__}: {str(error)[:300]}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # engines are not taken down: the driver frees what they hold


def _start(job: Job, forks: bool, log: Path) -> int:
    from vllm_bench import child

    if forks:
        return _forked(lambda: child.run(job), log)

    def fresh() -> None:
        spec = job.write(Path(job.results).with_suffix(".job.json"))
        os.set_inheritable(_console, True)
        os.execv(sys.executable, [sys.executable, "-c", FRESH, str(spec), str(_console)])

    return _forked(fresh, log)


def _wait(running: dict[int, Job]) -> list[Job]:
    """Waits for all of a stage, and kills those that outstay their time with their processes; returns what failed."""
    failed = []
    while running:
        for pid, job in [*running.items()]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
                code = os.waitstatus_to_exitcode(status)
                if code:
                    say(f"{job.name}: ended with {code}")
                    failed.append(job)
            elif time.monotonic() > job.until + job.grace_s:
                say(f"{job.name}: out of time")
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)
    return failed


def start_sooner(job: Job) -> None:
    """Before an engine of this process is made: what it would do again, or for nothing, it leaves out."""
    from vllm.config import AttentionConfig, CacheConfig, VllmConfig
    from vllm.model_executor.models import registry
    from vllm.v1.worker import gpu_worker

    def inspect(self: registry._LazyRegisteredModel) -> registry._ModelInfo:
        return registry._ModelInfo.from_model_cls(self.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspect
    triton = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache" / "vllm")) / "triton_of_all"

    def instead_of_warmup(*args: object) -> None:
        os.environ["TRITON_CACHE_DIR"] = str(triton)  # what was compiled with the model lies in a folder of its own

    gpu_worker.warmup_kernels = instead_of_warmup
    quantises_queries = job.kv_cache_dtype != "auto" and job.backend != "CUSTOM"  # in the graph, before attention
    if not job.tokens and not quantises_queries:
        AttentionConfig.compute_hash = CacheConfig.compute_hash = lambda self: SHARED_HASH
    if job.shared_prefixes:
        VllmConfig.compute_hash = _without_additions(VllmConfig.compute_hash)
    if job.cascade:  # not by the environment, of which the graph's name depends as well
        VllmConfig.use_v2_model_runner = property(lambda self: False)


def _without_additions(own: Callable) -> Callable:
    """compute_hash() of a VllmConfig whose additional_config is only for attention, which the graph does not know."""

    def compute_hash(self: object) -> str:
        kept, self.additional_config = self.additional_config, {}
        try:
            return own(self)
        finally:
            self.additional_config = kept

    return compute_hash


def prefills_without_attention(layers: dict[str, object]) -> Callable[[bool], None]:
    """A switch: while it is on, layers write their keys and values and their attention yields zeros.

    layers: vLLM's, by name, that have an implementation `impl`. With dummy weights no output means anything; a prefill
    takes a third of its time so at long contexts, and a sixth with an 8-bit cache. Replays of graphs are not touched.
    """
    skips = [False]

    def switched(own: Callable) -> Callable:
        def forward(*args: object, **kwargs: object) -> object:
            output = kwargs.get("output", args[6] if len(args) > 6 else None)
            return output.zero_() if skips[0] and output is not None else own(*args, **kwargs)

        return forward

    for layer in layers.values():
        if hasattr(layer, "impl"):
            layer.impl.forward = switched(layer.impl.forward)

    def switch(on: bool) -> None:
        skips[0] = on

    return switch


