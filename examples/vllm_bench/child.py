"""One job of bench_vllm: starts vLLM with one backend, times decode steps, serves requests or writes greedy tokens."""
from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_bench import serving
from vllm_bench.cases import BLOCK_TOKENS, GROUPS, SHARED_GROUPS, Group, Job, Shape, engine_arguments
from vllm_bench.report import case_line
from vllm_bench.start import prefills_without_attention, say, start_sooner

SETTLING_STEPS = 6  # after rows come or go, before steps are timed
GREEDY_TOKENS, TOP = 64, 10  # of each row of --check, and log-probabilities kept of each token
PROMPTS = (5, 17, 64, 200, 777, 1500, 3001)  # tokens of --check's rows


def run(job: Job) -> None:
    """Does a job; its results lie in job.results, whole after every shape, case and check.

    What an engine does wrong while it serves stands there as `error`, and is raised.
    """
    begin = time.monotonic()
    if not job.plain:
        start_sooner(job)
    counted = _count_our_runs() if job.backend == "CUSTOM" else {}
    if job.vllm_append:
        from gpu.drop_ins.vllm import builder

        builder.APPENDS_IN_GRAPHS = False
    from vllm import LLM

    llm = LLM(**engine_arguments(job))
    engine, config = llm.llm_engine, llm.llm_engine.vllm_config
    found: dict[str, Any] = {
        "backend": job.backend, "kv_cache_dtype": job.kv_cache_dtype, "vllm_append": job.vllm_append,
        "shared_prefixes": job.shared_prefixes, "cascade": job.cascade, "title": job.title,
        "start_s": time.monotonic() - begin,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode), "shapes": [], "cases": {},
    }
    say(f"{job.name}: started in {found['start_s']:.0f} s")
    found |= {f"{what}_at_start": count for what, count in counted.items()}
    _write(job, found)
    try:
        if job.tokens:
            found["rows"] = _greedy(llm, Path(job.model))
        else:
            _time_and_serve(engine, job, found)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        found |= counted
        _write(job, found)


def _time_and_serve(engine: Any, job: Job, found: dict[str, Any]) -> None:
    """The shapes of a job, then its cases, then its mix, each written to `found` and to the job's file."""
    ids = itertools.count()
    layers = engine.vllm_config.compilation_config.static_forward_context
    skip_attention = prefills_without_attention(layers)
    for group in (group for group in (*GROUPS, *SHARED_GROUPS) if group.name in job.groups):
        if time.monotonic() > job.until:
            say(f"{job.name}: out of time before {group.name}")
            break
        for shape, result in _measure(engine, group, job, ids, skip_attention):
            found["shapes"].append(result)
            _write(job, found)
            say(f"{job.name}: {shape.name}: {result['median_ms']:.3f} ms ({result['steps']} steps, "
                f"{result['low_ms']:.3f} to {result['high_ms']:.3f}, mean context {result['mean_context']:.0f})")
    if job.cases or job.mix_s:
        serving.warm(engine, ids)
    given = serving.read_cases(Path(job.requests)) if job.cases else {}
    for name in job.cases:
        if time.monotonic() > job.cases_until or name not in given:
            say(f"{job.name}: {name} left out, {'out of time' if name in given else 'not in ' + job.requests}")
            continue
        found["cases"][name] = served = serving.serve_case(engine, given[name], ids, job.until)
        _write(job, found)
        say(f"{job.name}: {name}: {case_line(served)}")
    seconds = min(job.mix_s, job.until - time.monotonic())
    if seconds > 0:
        for found["mix"] in serving.mix(engine, seconds, ids, job.seed):
            _write(job, found)
        say(f"{job.name}: mix: {found['mix']}")


def _write(job: Job, found: dict[str, Any]) -> None:
    whole = Path(job.results).with_suffix(".new")
    whole.write_text(json.dumps(found))
    whole.replace(job.results)  # in one go: a process may end, or be read, at any time


def _count_our_runs() -> dict[str, int]:
    """How often a layer of ours decodes, how often of that on queries that it must copy first, and how often it stores
    keys and values itself, from here on.

    Replays of a CUDA graph do not count. vLLM imports our backend later, so that it takes what is put here.
    """
    from gpu.drop_ins.vllm import engines

    counted = {"our_runs": 0, "our_copies_of_queries": 0, "our_appends": 0}
    own, stores = engines.LayerDecoder.run, engines.append

    def counting(decoder: Any, rows: Any, q: Any, *others: Any) -> None:
        counted["our_runs"] += 1
        counted["our_copies_of_queries"] += not q.is_contiguous()
        own(decoder, rows, q, *others)

    def counting_stores(*arguments: Any) -> None:
        counted["our_appends"] += 1
        stores(*arguments)

    engines.LayerDecoder.run, engines.append = counting, counting_stores
    return counted


def _measure(engine: Any, group: Group, job: Job, ids: Iterator[int], skip_attention: Callable[[bool], None]) -> Any:
    """Yields (shape, result) of a group's shapes. The engine is left without requests."""
    most = (job.steps + SETTLING_STEPS + 4) * (len(group.shapes) + 1) + len(group.prompts) * 64 + 512
    rows = [f"{group.name}-{next(ids)}" for _ in group.prompts]
    for number, (row, length) in enumerate(zip(rows, group.prompts)):
        engine.add_request(row, _prompt(group, number, length), serving.sampling(most))
    produced = dict.fromkeys(rows, 0)
    filled = time.perf_counter()
    skip_attention(True)
    while not all(produced.values()):
        for output in engine.step():
            produced[output.request_id] += len(output.outputs[0].token_ids)
    skip_attention(False)
    say(f"{job.name}: {group.name} prefilled in {time.perf_counter() - filled:.1f} s")
    blocks = _count_blocks(engine, group) if group.shared_tokens else {}
    for shape in group.shapes:
        if time.monotonic() > job.until:
            say(f"{job.name}: out of time before {shape.name}")
            break
        engine.abort_request(rows[shape.rows:])
        rows = rows[:shape.rows]
        yield shape, _time_steps(engine, shape, rows, produced, group, job.steps) | blocks
    engine.abort_request(rows)
    while engine.has_unfinished_requests():
        engine.step()


def _prompt(group: Group, number: int, length: int) -> dict[str, list[int]]:
    """The prompt of a group's row, as many of its first tokens those of all rows as the group says."""
    own = serving.prompt(length, number)["prompt_token_ids"]
    common = serving.prompt(group.shared_tokens, len(group.prompts))["prompt_token_ids"]
    return {"prompt_token_ids": common + own[group.shared_tokens:]}


def _count_blocks(engine: Any, group: Group) -> dict[str, int]:
    """Blocks in the tables of a group's rows, and the distinct ones. RuntimeError where rows do not share the first."""
    scheduler = engine.engine_core.engine_core.scheduler
    ids = [block for request in scheduler.running
           for blocks in scheduler.kv_cache_manager.get_block_ids(request.request_id) for block in blocks]
    found = {"blocks": len(ids), "distinct_blocks": len({*ids})}
    say(f"{group.name}: {found['distinct_blocks']} distinct of {found['blocks']} blocks of {len(group.prompts)} rows")
    saved = (len(group.prompts) - 1) * (group.shared_tokens // BLOCK_TOKENS)
    if found["distinct_blocks"] > found["blocks"] - saved:
        raise RuntimeError(f"{group.name}: expected prefix caching to save {saved} blocks, got {found}")
    return found


def _time_steps(engine: Any, shape: Shape, rows: list[str], produced: dict[str, int], group: Group,
                steps: int) -> dict[str, Any]:
    """Times between the ends of successive steps in which each of the rows, and no other, made one token."""
    times: list[float] = []
    settled, last = 0, None
    for _ in range(10 * steps):
        outputs = engine.step()
        now = time.perf_counter()
        made = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
        for row, count in made.items():
            produced[row] += count
        whole = made == dict.fromkeys(rows, 1)
        settled = settled + 1 if whole else 0
        if whole and last is not None and settled > SETTLING_STEPS:
            times.append((now - last) * 1e3)
        last = now
        if len(times) == steps:
            break
    if not times:
        raise RuntimeError(f"{shape.name}: no step in which every row made one token")
    lengths = [length + produced[row] for row, length in zip(rows, group.prompts)]
    order = sorted(times)
    return {"shape": shape.name, "rows": len(rows), "steps": len(times), "median_ms": statistics.median(times),
            "sm_mhz": _sm_mhz(), "low_ms": order[len(order) // 10], "high_ms": order[-1 - len(order) // 10],
            "mean_context": statistics.fmean(lengths)}


def _sm_mhz() -> int | None:
    """The clock of the SMs while the last step's successor still runs, which tells times that differ by the clock from
    those that differ at one and the same. None where no NVML answers."""
    try:
        import torch

        return torch.cuda.clock_rate()
    except Exception:  # noqa: BLE001 - a figure beside the times must not end them
        return None


def _greedy(llm: Any, model: Path) -> list[dict[str, Any]]:
    """Greedy tokens of rows of several lengths, with the most likely tokens of each place and their log-probability."""
    from vllm import SamplingParams

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    texts = model / "prompts.json"  # of a converted model: token ids of texts
    given = json.loads(texts.read_text()) if texts.exists() else []
    prompts = [{"prompt_token_ids": ids} for ids in given]
    prompts += [serving.prompt(length, row, vocabulary) for row, length in enumerate(PROMPTS)]
    params = SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True, detokenize=False, temperature=0.0, logprobs=TOP)
    found = []
    for output in llm.generate(prompts, params):
        one = output.outputs[0]
        top = [{int(token): entry.logprob for token, entry in place.items()} for place in one.logprobs]
        found.append({"prompt_tokens": len(output.prompt_token_ids), "tokens": list(one.token_ids), "top": top})
    return found
