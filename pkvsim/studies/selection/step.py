"""A step that may read selected pages: the route "selected" beside those that read all of them."""
from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from pkvsim.devices.derive import all_routes, selection_entry
from pkvsim.policy.selecting import LEAST_GAIN, SelectionPrices, selection_prices
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.pricing.selected import selected_step_time
from pkvsim.schedule.page_lists import list_shape
from pkvsim.selection.setup import SelectionSetup, summary_bytes
from pkvsim.shapes import DecodeShape
from pkvsim.studies.step_report import RouteStep, StepReport, StepSelection
from pkvsim.timeline.time_split import TimeSplit, saturated_by, time_split
from pkvsim.timeline.timeline import Timeline, simulate

SELECTED = "selected"  # the route's name in a report
MOST_TOKENS = 1 << 20  # of a row, up to which a length is looked for from which on selecting pays


def with_selection(report: StepReport, setup: SelectionSetup) -> StepReport:
    """The report with the step over selected pages as a further route, which is taken where it pays and is cheapest.

    All layers select (SelectionSetup.dense_layers is a server's matter). Raises ValueError naming what no kernel serves
    over lists.
    """
    shape, lens, device = report.shape, report.seq_lens, report.device
    if report.groups is not None:
        raise ValueError("select: expected a step whose rows share nothing, got groups of rows")
    prices = selection_prices(shape, device, setup, options=report.options)
    layer, lists = prices.of(lens), prices.lists(lens)
    rows = int(np.count_nonzero(lens))
    pages = int((-(-lens.astype(np.int64) // shape.page_size)).sum())
    found = StepSelection(
        setup=setup, layer=layer, entry=selection_entry(device),
        listed_bytes=useful_kv_bytes(shape, lists, report.options), scored_bytes=pages * summary_bytes(shape, setup),
        summary_share=summary_bytes(shape, setup) / (shape.num_kv_heads * shape.page_size
                                              * report.options.kv_token_bytes(shape)),
        least_tokens=prices.least_tokens(max(1, rows), MOST_TOKENS),
    )  # fmt: skip
    route = _route_step(report, prices, layer.selected_us, layer.selected.keep + layer.selected.select, lists)
    cheapest = next((one for one in report.routes if one.route == report.taken), None)
    reason, taken = report.reason, report.taken
    if not layer.pays:
        reason += (f"; {SELECTED}: {layer.selected_us:,.1f} us a layer, not {LEAST_GAIN:.0%} under the "
                   f"{layer.dense_us:,.1f} of all pages, so the step goes dense")  # fmt: skip
    elif cheapest is None or route.step_us < cheapest.step_us:
        taken = SELECTED
        reason = f"{SELECTED} {route.step_us:,.1f} us a step, where all pages take: {report.reason}"
    else:
        reason += f"; {SELECTED} {route.step_us:,.1f} us a step"
    return replace(report, routes=(*report.routes, route), selection=found, taken=taken, reason=reason)


def _route_step(
    report: StepReport, prices: SelectionPrices, layer_us: float, before_us: float, lists: np.ndarray
) -> RouteStep:  # fmt: skip
    """The step over lists [batch_size] int32. before_us: of layer_us, what comes before attention."""
    shape, device, options = report.shape, report.device, report.options
    balanced = all_routes(device)["balanced"]
    model = balanced.model
    constants, one_head = prices.prices, list_shape(shape)
    of_lists = np.repeat(lists, shape.num_kv_heads)
    line = simulate(model, one_head, of_lists, num_sms=device.num_sms, options=options)
    limit = saturated_by(model, one_head, line, device, options)
    split = time_split(model, line, one_head, of_lists, limit=limit, options=options)
    counts = np.diff(line.schedule.split_offsets)[of_lists > 0]
    line = _slower(line, shape, before_us, constants.attend_us, constants.attend_share)
    parts = {name: us / constants.attend_share for name, us in asdict(split).items()}
    parts["launches_us"] += constants.attend_us
    parts["select_us"] = before_us
    took, rows = line.end_us - line.start_us, int(np.count_nonzero(lists))
    issue_us = constants.run_us / prices.rule.every
    gpu_us, host_us = selected_step_time(prices.constants, rows, report.layers, layer_us, issue_us)
    area = line.num_slots * (line.makespan_us - before_us)
    entries = balanced.status, selection_entry(device).status
    return RouteStep(
        route=SELECTED,
        status="calibrated" if entries == ("calibrated", "fitted") else "estimated",
        model=model,
        timeline=line,
        closed_us=layer_us,
        step_us=gpu_us + host_us,
        timeline_step_us=sum(selected_step_time(prices.constants, rows, report.layers, line.makespan_us, issue_us)),
        host_us=host_us,
        launches=3,  # summaries, selection, attention
        splits=(int(counts.min()), int(counts.max())) if len(counts) else (0, 0),
        used_slots=len(np.unique(line.slot)),
        busy_share=float(took.sum() / area) if area else 0.0,
        longest_task=int(np.argmax(took)) if len(took) else None,
        saturated_by=limit,
        split=TimeSplit(**parts),
    )


def _slower(line: Timeline, shape: DecodeShape, before_us: float, more_us: float, share: float) -> Timeline:
    """The timeline of rows as that of lists: behind the selection, each list a KV head of its row, at a share of the
    speed."""
    tasks = line.schedule.tasks.copy()
    tasks["kv_head"] = tasks["row"] % shape.num_kv_heads
    tasks["row"] //= shape.num_kv_heads
    first_us = before_us + more_us
    return replace(
        line, schedule=replace(line.schedule, tasks=tasks), makespan_us=first_us + line.makespan_us / share,
        cta_gb_s=line.cta_gb_s * share, shared_gb_s=line.shared_gb_s * share, merge_us=line.merge_us / share,
        start_us=first_us + line.start_us / share, end_us=first_us + line.end_us / share,
    )  # fmt: skip
