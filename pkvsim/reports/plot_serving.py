"""A whatif as a picture: where the GPU's time goes, by policy and over the run, and the latencies it gives."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from pkvsim.reports.plots import DASHES, PART_COLOURS, colour_of, picture, plain_log, thin_grid, time_unit
from pkvsim.serving.costs import fit_note
from pkvsim.serving.results.result import ServingResult
from pkvsim.studies.series import busy_parts_s, busy_shares, distribution, is_wide, time_edges
from pkvsim.studies.whatif import WhatIf

TIME_BINS = 160


def plot_whatif(report: WhatIf, path: str | Path) -> None:
    """Draws to a .png or .svg file. ValueError as pkvsim.reports.plots.picture."""
    note = f"attention prices of {report.device.name}: {fit_note(report.device)}"
    with picture(path, width=11, height=7.4, note=note) as figure:
        panels = figure.subplots(2, 2, width_ratios=(1.15, 1))
        shown = "calibrated" if "calibrated" in report.results else next(iter(report.results))
        _parts_by_policy(panels[0, 0], report)
        _parts_over_time(panels[1, 0], report.results[shown])
        for axes, name, words in (
            (panels[0, 1], "ttft_s", "time to first token (TTFT)"),
            (panels[1, 1], "tpot_s", "time per output token (TPOT), mean of a request"),
        ):
            _distributions(axes, report, name, words)
        panels[0, 1].legend(loc="best")
        figure.suptitle(
            f"{report.model.name} on {report.device.label}; {report.trace.name}, {len(report.trace):,} requests",
            fontsize=11, x=0.01, horizontalalignment="left",
        )  # fmt: skip


def _parts_by_policy(axes, report: WhatIf) -> None:
    names = list(report.results)
    parts = [busy_parts_s(result) for result in report.results.values()]
    unit, scale = time_unit(max(sum(part.values()) for part in parts))
    left = np.zeros(len(names))
    for name, colour in PART_COLOURS.items():
        width = np.array([part[name] for part in parts]) * scale
        axes.barh(names, width, left=left, color=colour, label=name, height=0.72)
        for at, (begin, wide) in enumerate(zip(left, width)):
            whole = sum(parts[at].values()) * scale
            if whole and wide > 0.07 * max(sum(part.values()) for part in parts) * scale:
                ink = "white" if name == "decode attention" else "black"
                axes.text(begin + wide / 2, at, f"{wide / whole:.0%}", ha="center", va="center", color=ink, fontsize=8)
        left += width
    axes.set(xlabel=f"GPU time of the whole run, {unit}", title="where the GPU's time goes, by policy")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3)


def _parts_over_time(axes, result: ServingResult) -> None:
    edges = time_edges([result], TIME_BINS)
    shares = busy_shares(result.steps, edges)
    unit, scale = time_unit(float(edges[-1]))
    bottom = np.zeros(TIME_BINS)
    for name, share in shares.items():
        axes.stairs((bottom + share) * 100, edges * scale, baseline=bottom * 100, fill=True, color=PART_COLOURS[name])
        bottom = bottom + share
    axes.set_xlim(edges[0] * scale, edges[-1] * scale)
    axes.set(xlabel=f"time from the first arrival, {unit}", ylabel="wall time, %", ylim=(0, 100))
    axes.set_title(f"the same over the run, policy {result.policy} (white: idle)")


def _distributions(axes, report: WhatIf, name: str, words: str) -> None:
    curves = {policy: distribution(getattr(result.requests, name)) for policy, result in report.results.items()}
    longest = max((values[-1] for values, _ in curves.values() if len(values)), default=0.0)
    unit, scale = time_unit(longest)
    for at, (policy, (values, share)) in enumerate(curves.items()):
        # Policies that agree lie on each other: later lines are thinner and dashed, so that earlier ones show through.
        axes.plot(
            values * scale, share * 100, color=colour_of(at), label=policy, drawstyle="steps-post",
            linestyle=DASHES[at % len(DASHES)], linewidth=max(1.0, 2.6 - 0.35 * at),
        )  # fmt: skip
    thin_grid(axes, axis="both")
    axes.set(xlabel=f"{words}, {unit}", ylabel="requests at or below, %", ylim=(0, 101))
    axes.set_title(f"{words.partition(',')[0]} by policy")
    if is_wide(values for values, _ in curves.values()):
        axes.set_xscale("log")
        plain_log(axes.xaxis)
