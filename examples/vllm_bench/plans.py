"""Which jobs measure what: plans of stages, the jobs of a stage side by side, stages one after another."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_bench.cases import GROUPS, KV_BYTES_FOR_MIX, KV_BYTES_FOR_TOKENS, SHARED_GROUPS, Job

EVERY_GROUP = tuple(group.name for group in GROUPS)
EIGHT_BIT = ("fp8", "int8_per_token_head")
SIXTEEN_BIT = ("CUSTOM", "CUSTOM vLLM's append")  # whose tokens are FLASH_ATTN's but for ties
PEER = "TRITON_ATTN"  # which has every type of cache that ours has
# Names of cases in a file of requests (`iN_oM_cK`: K requests of N tokens in and M out at once), the cheap ones first.
SHORT_CASES = ("i1024_o256_c1", "i1024_o256_c8", "i1024_o256_c32", "i8192_o256_c1", "i32768_o128_c1",
               "i1024_o256_c128", "i32768_o128_c4", "i8192_o256_c32")
LONG_CASES = ("azure300_x3", "i120000_o64_c1", "i32768_o128_c16")
SHAPES_S, EIGHT_BIT_S, APPEND_S = 60.0, 32.0, 40.0  # of engines that time every group, one, and three, and their start
FLASHINFER_S = 130.0  # after which it is taken for one that compiles without end
CHECKS_S = 150.0
LONGEST_CASE_S = 12.0  # of SHORT_CASES
PLANS = ("timings", "others", "checks", "mix")


@dataclass(frozen=True, slots=True)
class Given:
    """What plans need: folders of models, where results go, a CSV of requests or "", and when the last job ends."""

    llama: str
    checked: str
    results: Path
    requests: str
    begin: float  # of time.monotonic()
    end: float
    seed: int = 0  # of drawn requests

    def job(self, number: int, backend: str, kv_cache_dtype: str = "auto", **fields: object) -> Job:
        given = {"model": self.llama, "until": self.end, "cases_until": self.end} | fields
        if not self.requests:
            given["cases"] = ()
        return Job(backend, kv_cache_dtype, results=str(self.results / f"{number}.json"), requests=self.requests,
                   **given)


def plan(name: str, given: Given) -> list[list[Job]]:
    """The stages of a plan. ValueError for a name that is none of PLANS."""
    if name == "timings":
        last = given.end - 2 * EIGHT_BIT_S - APPEND_S - LONGEST_CASE_S  # when a case may begin that others follow
        jobs = [given.job(0, "CUSTOM", groups=EVERY_GROUP, cases=SHORT_CASES, cases_until=last - SHAPES_S),
                given.job(1, "FLASH_ATTN", groups=EVERY_GROUP, cases=SHORT_CASES, cases_until=last)]
        jobs += [given.job(2 + number, "CUSTOM", kind, groups=("32.8K",)) for number, kind in enumerate(EIGHT_BIT)]
        jobs.append(given.job(4, "CUSTOM", groups=("32.8K", "120K", "1.2K"), vllm_append=True))
        return [[job] for job in jobs]
    if name == "others":
        return [[given.job(0, "TRITON_ATTN", groups=EVERY_GROUP)],
                [given.job(1, "FLASHINFER", groups=EVERY_GROUP, limit_s=FLASHINFER_S)],
                [given.job(2, "CUSTOM", cases=LONG_CASES)]]
    if name == "checks":
        return [checks(given.checked, given.results, given.begin + CHECKS_S, vllm_append=True), [mix(given)]]
    if name == "mix":
        return [[mix(given)]]
    raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {name}")


def mix(given: Given) -> Job:
    """Drawn requests until the end; several at a time with other seeds, a GPU each, are as many minutes of it."""
    return given.job(99, "CUSTOM", mix_s=3600.0, seed=given.seed, kv_bytes=KV_BYTES_FOR_MIX, title="mix")


def shared(given: Given, backends: Iterable[str], steps: int) -> list[list[Job]]:
    """Engines with prefix caching on rows of one prompt: each as it comes, then with what reads it once. CUSTOM also
    times rows that share nothing, which the option must not slow down."""
    sharing = tuple(group.name for group in SHARED_GROUPS if group.shared_tokens)
    every = tuple(group.name for group in SHARED_GROUPS)
    ways = {"CUSTOM": ({}, {"shared_prefixes": True}), "FLASH_ATTN": ({}, {"cascade": True})}
    found: list[list[Job]] = []
    for backend in backends:
        for way in ways.get(backend, ({},)):
            groups = every if backend == "CUSTOM" else sharing
            found.append([given.job(len(found), backend, groups=groups, steps=steps, prefix_caching=True, **way)])
    return found


def checks(model: str, results: Path, until: float, kinds: Iterable[str] = ("auto", *EIGHT_BIT),
           eager: bool = False, vllm_append: bool = False) -> list[Job]:
    """Engines that make the same greedy tokens: FLASH_ATTN, and of each type of cache ours and its peer."""
    engines = [("FLASH_ATTN", "auto", False)]
    engines += [(backend, kind, False) for kind in kinds for backend in ("CUSTOM", PEER)]
    engines += [("CUSTOM", "auto", True)] * vllm_append
    return [Job(backend, kind, model, str(results / f"tokens-{number}.json"), until=until, tokens=True, eager=eager,
                vllm_append=appends, kv_bytes=KV_BYTES_FOR_TOKENS, title="tokens")
            for number, (backend, kind, appends) in enumerate(engines)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An engine's tokens against another's, by names. peer: the engine whose agreement with the same other one ours is
    held against, "" where the pair is only told."""

    own: str
    other: str
    peer: str = ""


def comparisons(names: Iterable[str]) -> list[Comparison]:
    """Which of these to hold against which: peers against FLASH_ATTN with 16 bits, then ours; 8 bits against both.

    Ours with 8 bits against its peer's is told, not judged: vLLM's Triton backend quantises the queries too where its
    cache is FP8, which ours does not, and what the peer errs would count as ours.
    """
    known = {*names}
    wanted = [Comparison(PEER, "FLASH_ATTN"), *(Comparison(name, "FLASH_ATTN", PEER) for name in SIXTEEN_BIT)]
    for kind in EIGHT_BIT:
        own, peer = f"CUSTOM {kind}", f"{PEER} {kind}"
        wanted += [Comparison(peer, "FLASH_ATTN"), Comparison(own, "FLASH_ATTN", peer), Comparison(own, peer)]
    return [one for one in wanted if one.own in known and one.other in known]
