"""What serving_trace prints, from its runs' records: times, ratios, counters, routes, regret, prediction errors."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from bench.tables import Table, ratio, us

FLASHINFER = ("flashinfer_cuda_core", "flashinfer_tensor_core", "xqa")
DEFAULT = "flashinfer_tensor_core"
ADAPTIVE = "adaptive"
CLOCKS = ("event_us", "wall_us")
Record = dict


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The runs of one configuration and family, one a seed."""

    label: str
    family: str
    layers: int
    records: tuple[Record, ...]

    @property
    def title(self) -> str:
        return f"{self.label} {self.family}, {self.layers} layer{'s' if self.layers > 1 else ''} per plan"

    @property
    def engines(self) -> list[str]:
        """Those that ran on every seed."""
        return [
            name for name in self.records[0]["engines"] if all(name in record["engines"] for record in self.records)
        ]

    def means(self, engine: str, clock: str) -> list[float]:
        """Mean step time of each seed, us."""
        return [float(np.mean(record["engines"][engine][clock])) for record in self.records]

    def best_flashinfer(self, clock: str) -> str | None:
        """The backend of the least mean over all seeds: one configuration for the whole family."""
        names = [name for name in self.engines if name in FLASHINFER]
        return min(names, key=lambda name: float(np.mean(self.means(name, clock))), default=None)

    def ratios(self, engine: str, clock: str, over: str | None) -> list[float]:
        """How many times as fast as `over` the engine is, by seed."""
        if over is None or over not in self.engines:
            return []
        return [theirs / ours for theirs, ours in zip(self.means(over, clock), self.means(engine, clock), strict=True)]


def groups(records: list[Record]) -> list[Group]:
    """In the order of first appearance."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault((record["label"], record["family"], record["layers"]), []).append(record)
    return [Group(*key, tuple(runs)) for key, runs in found.items()]


def times_table(group: Group) -> Table:
    """Step times over all seeds, tokens/s, and ratios as mean and deviation over the seeds."""
    rows = []
    for name in group.engines:
        cells = [name]
        for clock in CLOCKS:
            steps = np.concatenate([record["engines"][name][clock] for record in group.records])
            cells += [us(float(value)) for value in (steps.mean(), np.percentile(steps, 95), np.percentile(steps, 99))]
        seconds = sum(sum(record["engines"][name]["wall_us"]) for record in group.records) / 1e6
        cells.append(f"{sum(sum(record['active']) for record in group.records) / seconds:.0f}")
        for over in (DEFAULT, None):
            cells += [ratio(group.ratios(name, clock, over or group.best_flashinfer(clock))) for clock in CLOCKS]
        rows.append(tuple(cells))
    best = {clock: group.best_flashinfer(clock) for clock in CLOCKS}
    mib = float(np.mean([np.mean(record["kv_mib"]) for record in group.records]))
    note = (
        f"{len(group.records)} seeds, {len(group.records[0]['active'])} steps each, {mib:.1f} MiB of KV a layer. "
        f"FlashInfer's best here: {best['event_us'] or 'none'} by events, {best['wall_us'] or 'none'} by wall."
    )
    columns = (
        "engine",
        "event us",
        "p95",
        "p99",
        "wall us",
        "p95 ",
        "p99 ",
        "tokens/s",
        "x default, event",
        "x default, wall",
        "x best, event",
        "x best, wall",
    )
    return Table(group.title, columns, tuple(rows), note)


def counters_table(group: Group) -> Table:
    """Structural counters per step and layer, means over steps and seeds."""
    names = ("launches", "merge_launches", "cta_work_per_sm", "useful_kv_bytes", "merge_bytes", "nonempty_cta_fraction")
    rows = []
    for engine in group.records[0]["counters"]:
        mean = {name: float(np.mean([record["counters"][engine][name] for record in group.records])) for name in names}
        rows.append(
            (
                engine,
                f"{mean['launches']:.2f}",
                f"{mean['merge_launches']:.2f}",
                f"{mean['cta_work_per_sm']:.1f}",
                f"{mean['useful_kv_bytes'] / 2**20:.1f}",
                f"{mean['merge_bytes'] / 2**20:.2f}",
                f"{mean['nonempty_cta_fraction']:.0%}",
            )
        )
    return Table(
        f"{group.title}: counters",
        ("engine", "launches", "merges", "CTAs/SM", "KV MiB", "merge MiB", "non-empty CTAs"),
        tuple(rows),
    )


def routes_table(all_groups: list[Group]) -> Table:
    """How many steps the policy gave to each route."""
    counts = {
        group.title: Counter(route for record in group.records for route in record["decisions"]) for group in all_groups
    }
    seen = list(dict.fromkeys(route for count in counts.values() for route in count))
    rows = tuple((title, *(str(count[route]) for route in seen)) for title, count in counts.items())
    return Table("steps by route, adaptive", ("run", *seen), rows)


def adaptive_table(all_groups: list[Group]) -> Table:
    """One line per run: how many times as fast as FlashInfer the adaptive engine is."""
    rows = []
    for group in (group for group in all_groups if ADAPTIVE in group.engines):
        cells = [us(float(np.mean(group.means(ADAPTIVE, clock)))) for clock in CLOCKS]
        for over in (DEFAULT, None):
            cells += [ratio(group.ratios(ADAPTIVE, clock, over or group.best_flashinfer(clock))) for clock in CLOCKS]
        rows.append((group.title, *cells))
    columns = ("event us", "wall us", "x default, event", "x default, wall", "x best, event", "x best, wall")
    return Table("adaptive against FlashInfer", ("run", *columns), tuple(rows))


def step_regrets(record: Record, clock: str) -> np.ndarray:
    """Of each step, by how much the chosen route is slower than the fastest one [steps]; empty without decisions."""
    times = {name: row[clock] for name, row in record["engines"].items() if name != ADAPTIVE}
    best = np.min(list(times.values()), axis=0)
    chosen = [times[route][step] if route in times else np.nan for step, route in enumerate(record["decisions"])]
    return np.array(chosen) / best[: len(chosen)] - 1


def prediction_errors(record: Record, route: str) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors [steps] of the predicted GPU time against events and of the predicted step against wall."""
    prices = np.array(record["prices"][route])
    row = record["engines"][route]
    on_gpu = prices - np.array(record["model_host_us"][route])
    return on_gpu / np.array(row["event_us"]) - 1, prices / np.array(row["wall_us"]) - 1


def regret_table(all_groups: list[Group]) -> Table:
    """Regret of the policy against timing every route at every step, in percent."""
    rows, whole = [], {clock: [] for clock in CLOCKS}
    for group in all_groups:
        cells = [group.title]
        for clock in CLOCKS:
            regrets = np.concatenate([step_regrets(record, clock) for record in group.records])
            whole[clock].append(regrets)
            cells += _regret_cells(regrets)
        rows.append(tuple(cells))
    rows.append(("all", *(cell for clock in CLOCKS for cell in _regret_cells(np.concatenate(whole[clock])))))
    return Table(
        "regret of the policy, percent",
        ("run", "event mean", "worst step", "wall mean", "worst step "),
        tuple(rows),
        "Against the fastest fixed route of every step. The policy minimises what a step takes by the wall clock, "
        "so wall is what it is judged by.",
    )


def _regret_cells(regrets: np.ndarray) -> list[str]:
    regrets = regrets[np.isfinite(regrets)]
    return [f"{100 * regrets.mean():.2f}", f"{100 * regrets.max():.1f}"] if regrets.size else ["-", "-"]


def prediction_table(all_groups: list[Group]) -> Table:
    """Mean absolute percentage error and bias of the model, by route over all runs."""
    rows = []
    for route in dict.fromkeys(name for group in all_groups for record in group.records for name in record["prices"]):
        pairs = [
            prediction_errors(record, route)
            for group in all_groups
            for record in group.records
            if route in record["prices"] and route in record["engines"]
        ]
        if not pairs:
            continue
        cells = [route]
        for errors in (np.concatenate([pair[which] for pair in pairs]) for which in (0, 1)):
            cells += [f"{100 * np.abs(errors).mean():.1f}", f"{100 * errors.mean():+.1f}"]
        rows.append(tuple(cells))
    return Table(
        "predicted against measured, percent",
        ("route", "GPU MAPE", "bias", "step MAPE", "bias "),
        tuple(rows),
        "GPU: the model's time of all layers against events. Step: with the host's part against wall.",
    )


def errors_table(records: list[Record]) -> Table:
    """Largest differences from the baseline engine and from float64."""
    rows = []
    for name in dict.fromkeys(name for record in records for name in record["errors"]):
        found = [record["errors"][name] for record in records if name in record["errors"]]
        rows.append(
            (name, *(f"{max(one.get(key, 0.0) for one in found):.1e}" for key in ("difference", "float64_error")))
        )
    wrong = sorted(
        {
            f"{name}: {why}"[:200]
            for record in records
            for name, why in {**record["wrong"], **record["left_out"]}.items()
        }
    )
    return Table(
        "largest errors", ("engine", f"from {records[0]['baseline']}", "from float64"), tuple(rows), "; ".join(wrong)
    )


def all_tables(records: list[Record], *, exhaustive: bool) -> list[Table]:
    """Everything, in the order it is printed."""
    found = groups(records)
    tables = [table for group in found for table in (times_table(group), counters_table(group))]
    decided = [group for group in found if all(record["decisions"] for record in group.records)]
    if decided:
        tables.append(routes_table(decided))
    if decided and exhaustive:
        tables += [regret_table(decided), prediction_table(decided)]
    tables.append(errors_table(records))
    return [*tables, adaptive_table(decided)] if decided else tables
