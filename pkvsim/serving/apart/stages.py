"""Prompts computed by some servers, their KV sent to others that decode: two runs, one after the other.

The prefill servers serve every request for its first token alone. Its KV then crosses a link, and the request comes to
the decode servers with its prompt in the cache; what gives way there is computed again there. Transfers do not wait for
each other, and pages on the prefill server are free once the token is out: assumptions, which a note says.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.presets import ModelSpec
from pkvsim.outside.communication import DEFAULT_LINK_GB_S
from pkvsim.serving.costs import cache_bytes_per_token
from pkvsim.serving.results.logs import RequestLog
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.results.summary import count_gaps, gap_percentiles, is_saturated, percentiles
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of, refusals, simulate
from pkvsim.serving.state import SERVED
from pkvsim.traces.requests import RequestTrace

Progress = Callable[[int, int], None]  # output tokens produced, of how many


def serve(
    trace: RequestTrace,
    model: ModelSpec,
    device: DeviceSpec,
    policy: str,
    config: ServingConfig = ServingConfig(),
    *,
    progress: Progress | None = None,
) -> ServingResult:
    """simulate, or with config.prefill_replicas prefill and decode on servers of their own: steps and pages are then
    those of the decode servers. ValueError as simulate, or where requests wait for others' ends."""
    if not config.prefill_replicas:
        return simulate(trace, model, device, policy, config, progress=progress)
    if trace.after is not None or trace.concurrency is not None:
        raise ValueError("prefill_replicas: expected requests that wait for no answer, neither turns nor a closed loop")
    if config.tiers is not None or config.kv_parallel != 1:
        raise ValueError("prefill_replicas: expected 0 with tiers, and with several GPUs a server")
    prompts = replace(config, replicas=config.prefill_replicas, prefill_replicas=0)
    # What no server could decode is refused as it is sent, not once its prompt has been computed.
    limits = limits_of(model, device, config)
    served = refusals(trace, model, config, limits.num_pages - limits.state_pages) == SERVED
    one_token = replace(trace, output_tokens=np.where(served, 1, trace.output_tokens))
    first = simulate(one_token, model, device, policy, prompts)
    token_s = first.requests.finish_s  # of answers of one token
    sent_s = token_s + trace.prompt_tokens * transfer_us_per_token(model, device, config) / 1e6
    goes_on = np.flatnonzero((first.requests.rejected == SERVED) & (trace.output_tokens > 1))
    goes_on = goes_on[np.argsort(sent_s[goes_on], kind="stable")]
    if not len(goes_on):
        return first
    rest = RequestTrace(
        trace.name, sent_s[goes_on], trace.prompt_tokens[goes_on] + 1, trace.output_tokens[goes_on] - 1
    )
    decode = replace(config, prefill_replicas=0, prefix_cache="none", order="fcfs")
    second = simulate(
        rest, model, device, policy, decode, cached=trace.prompt_tokens[goes_on], progress=progress
    )  # fmt: skip
    return _joined(trace, first, second, goes_on, token_s, sent_s)


def transfer_us_per_token(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> float:
    """KV of one token from each GPU of a prefill server to one of a decode server."""
    return cache_bytes_per_token(model, config) / (transfer_gb_s(device, config) * 1e3)


def transfer_gb_s(device: DeviceSpec, config: ServingConfig) -> float:
    """As it is set; else the link between GPUs of a host, or that of PCIe where the GPU has none."""
    return config.transfer_gb_s or device.link_gb_s or DEFAULT_LINK_GB_S


def _joined(
    trace: RequestTrace, first: ServingResult, second: ServingResult, goes_on: np.ndarray, token_s: np.ndarray,
    sent_s: np.ndarray,
) -> ServingResult:  # fmt: skip
    """goes_on: requests of the second run; token_s: first tokens; sent_s: arrivals at the decode servers."""
    one, two, start_s = first.requests, second.requests, float(sent_s[goes_on[0]])
    finish_s, rejected, output = token_s.copy(), one.rejected.copy(), one.output_tokens.copy()
    finish_s[goes_on], rejected[goes_on] = start_s + two.finish_s, two.rejected
    output[goes_on] += two.output_tokens
    preemptions, replica = one.preemptions.copy(), one.replica.copy()
    preemptions[goes_on] += two.preemptions
    replica[goes_on] = two.replica
    known = rejected == SERVED
    output = np.where(known, output, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot_s = (finish_s - token_s) / (output - 1)
    requests = RequestLog(
        arrival_s=one.arrival_s, queue_s=np.where(known, one.queue_s, np.nan),
        ttft_s=np.where(known, one.ttft_s, np.nan),
        tpot_s=np.where(known & (output > 1), tpot_s, np.nan), finish_s=np.where(known, finish_s, np.nan),
        prompt_tokens=one.prompt_tokens, output_tokens=output, hit_tokens=one.hit_tokens, hit_blocks=one.hit_blocks,
        preemptions=preemptions, rejected=rejected, replica=replica,
    )  # fmt: skip
    waited_s = start_s + two.arrival_s + two.ttft_s - token_s[goes_on]
    gaps = second.gaps + count_gaps(1e6 * waited_s[two.rejected == SERVED])
    makespan_s = float(np.nanmax(requests.finish_s))
    summary = second.summary | {
        "requests": len(trace), "finished": int(np.count_nonzero(known)),
        "rejected_too_long_for_pool": int(np.count_nonzero(rejected == 1)),
        "rejected_too_long_for_model": int(np.count_nonzero(rejected == 2)),
        "output_tokens": int(output.sum()), "makespan_s": makespan_s,
        "tokens_per_s": float(output.sum() / makespan_s), "requests_per_s": float(np.count_nonzero(known) / makespan_s),
        "busy_share": second.totals["duration_us"] / 1e6 / len(second.summary["replicas"]) / makespan_s,
        "ttft_s": percentiles(requests.ttft_s), "tpot_s": percentiles(requests.tpot_s),
        "itl_s": gap_percentiles(gaps), "e2e_s": percentiles(requests.e2e_s), "queue_s": percentiles(requests.queue_s),
        "prefix_hit_share": first.summary["prefix_hit_share"], "prefix_hit_tokens": first.summary["prefix_hit_tokens"],
        "preemptions": int(preemptions.sum()), "saturated": is_saturated(one) or is_saturated(two),
    }  # fmt: skip
    return replace(second, requests=requests, gaps=gaps, summary=summary)
