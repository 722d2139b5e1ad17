"""The drawings of docs/schedule.md as SVG, made from schedules of pkvsim, so that they show what really runs."""
from __future__ import annotations

from html import escape

from pkvsim import DecodeShape, make_schedule
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.make import Schedule

COLOURS = ("#2a78b5", "#e08a1e", "#4a9d5b", "#b5478a", "#7a68c0", "#8a6d3b")
INK, QUIET, GROUND = "#22303a", "#7b8790", "#eef1f3"
ROW_TILES = (5, 17, 0, 9, 3)  # tiles of 16 tokens
SEGMENT, NUM_CTAS = 1, 6


class Drawing:
    """An SVG of that size; coordinates in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [f"<title>{escape(title)}</title>", f'<rect width="{width}" height="{height}" fill="#fff"/>']

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "#fff",
            dashed: bool = False) -> None:
        dash = ' stroke-dasharray="3 2"' if dashed else ""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
                          f'fill="{fill}" stroke="{stroke}"{dash}/>')

    def text(self, x: float, y: float, words: str, *, size: int = 12, fill: str = INK, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
                          f'text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, *points: tuple[float, float], stroke: str = QUIET, arrow: bool = False,
             dashed: bool = False) -> None:
        end = ' marker-end="url(#arrow)"' if arrow else ""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="1.3"{end}{dash}/>')

    def svg(self) -> str:
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="system-ui, sans-serif">')
        arrow = ('<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                 f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>')
        return "\n".join([head, arrow, *self.parts, "</svg>"]) + "\n"


def example(name: str) -> Schedule:
    """The example's step under a schedule: five rows of one KV head."""
    shape = DecodeShape(num_q_heads=4, num_kv_heads=1, head_dim=128, page_size=16)
    lens = [16 * tiles for tiles in ROW_TILES]
    if name == "balanced":
        return make_schedule(name, shape, lens, num_ctas=NUM_CTAS, tile_tokens=16, costs=BalancedCosts(segment=SEGMENT))
    return make_schedule(name, shape, lens, splits=4 if name == "workqueue" else NUM_CTAS, tile_tokens=16)


def spans() -> str:
    """Rows end to end on the cost axis, the equal ranges of the CTAs, and who merges what."""
    schedule = example("balanced")
    picture = Drawing(860, 330, "Rows laid end to end, cut into equal ranges")
    total = sum(tiles + SEGMENT for tiles in ROW_TILES if tiles)
    left, unit, top = 90, 740 / total, 52
    picture.text(left, 24, "All rows' tiles end to end; every row segment also costs a fixed amount (grey)", size=13)
    picture.text(left - 12, top + 21, "tiles", anchor="end", fill=QUIET)
    at, begins = 0, {}
    for row, tiles in enumerate(ROW_TILES):
        if not tiles:
            continue
        begins[row] = at
        for tile in range(tiles):
            # Tile 0 lies where its row begins; the fixed cost stands between it and the others.
            x = left + unit * (at + tile + (SEGMENT if tile else 0))
            picture.box(x, top, unit, 32, COLOURS[row])
        picture.box(left + unit * (at + 1), top, unit * SEGMENT, 32, "#c9d0d5")
        picture.text(left + unit * (at + (tiles + SEGMENT) / 2), top + 50, f"row {row}: {tiles}", size=12,
                     anchor="middle", fill=COLOURS[row])
        at += tiles + SEGMENT
    ranges = schedule.num_ctas
    for i in range(ranges + 1):
        x = left + unit * total * i / ranges
        picture.line((x, top - 8), (x, top + 78), stroke=INK, dashed=True)
    lane, gap = top + 92, 27
    places: dict[int, list[tuple[float, float, float]]] = {}
    for cta in range(ranges):
        y = lane + gap * cta
        picture.text(left - 12, y + 15, f"CTA {cta}", anchor="end", fill=QUIET)
        for index in range(schedule.cta_offsets[cta], schedule.cta_offsets[cta + 1]):
            row, _, _, begin, end = (int(value) for value in schedule.tasks[index])
            x = left + unit * (begins[row] + begin + (SEGMENT if begin else 0))
            width = unit * (end - begin + (0 if begin else SEGMENT if end > 1 else 0))
            whole = end - begin == ROW_TILES[row]
            picture.box(x, y, width, 20, COLOURS[row] if whole else "#fff", stroke=COLOURS[row], dashed=not whole)
            picture.text(x + width / 2, y + 14, f"{begin}..{end}", size=11, anchor="middle",
                         fill="#fff" if whole else COLOURS[row])
            if not whole:
                places.setdefault(row, []).append((x, x + width, y + 10))
    for *others, (merger, _, at_y) in places.values():
        for _, end_x, y in others:
            picture.line((end_x - 10, y + 10), (end_x - 10, at_y), (merger, at_y), stroke=INK, arrow=True)
    picture.text(left, 318, "Filled: a whole row, written directly. Dashed: a part, left in its CTA's slot; the CTA "
                 "that ends the row merges them in order.", size=12, fill=QUIET)
    return picture.svg()


def schedules() -> str:
    """The same step under the three schedules: CTAs as lanes, tiles as length."""
    picture = Drawing(860, 470, "One step under three schedules")
    left, unit, y = 120, 38.0, 20
    for name, says in (
        ("split", "2 launches for every distinct length (decode, merge)"),
        ("workqueue", "2 launches: tasks in queue order, then one merge"),
        ("balanced", "1 launch: equal ranges, merged by the last CTA of each row"),
    ):
        schedule = example(name)
        picture.text(left, y + 4, f"{name}: {says}", size=13)
        y += 12
        # Tasks go to the lane that is free first, as CTAs go to SMs; balanced has a range for each. The launches of
        # split come one after the other, long rows first.
        lanes, length = [0.0] * NUM_CTAS, 0
        order = enumerate(schedule.tasks)
        for index, task in sorted(order, key=lambda one: -ROW_TILES[one[1]["row"]]) if name == "split" else order:
            row, _, _, begin, end = (int(value) for value in task)
            if name == "split" and ROW_TILES[row] != length:
                lanes, length = [max(lanes)] * NUM_CTAS, ROW_TILES[row]
            if name == "balanced":
                lane = next(i for i in range(schedule.num_ctas) if index < schedule.cta_offsets[i + 1])
            else:
                lane = lanes.index(min(lanes))
            cost = end - begin + SEGMENT
            picture.box(left + unit * lanes[lane], y + 20 * lane, unit * SEGMENT, 16, "#c9d0d5")
            picture.box(left + unit * (lanes[lane] + SEGMENT), y + 20 * lane, unit * (end - begin), 16, COLOURS[row])
            lanes[lane] += cost
        for lane in range(NUM_CTAS):
            picture.text(left - 12, y + 20 * lane + 13, f"CTA slot {lane}", size=11, anchor="end", fill=QUIET)
        picture.line((left + unit * max(lanes), y - 2), (left + unit * max(lanes), y + 20 * NUM_CTAS), stroke=INK,
                     dashed=True)
        picture.text(left + unit * max(lanes) + 6, y + 12, f"done after {max(lanes):g} tiles", size=11, fill=QUIET)
        y += 20 * NUM_CTAS + 22
    picture.text(left, y, "Colours are rows, grey is a segment's fixed cost. Launch gaps and merges are left out.",
                 size=12, fill=QUIET)
    return picture.svg()


def launch() -> str:
    """A CTA's life in one launch, and how the next launch begins under its end; not to scale."""
    picture = Drawing(860, 300, "The timeline of one balanced launch")
    left = 110
    phases = (
        (0, 80, "#9fb3c1", "read lengths"), (80, 60, "#7a68c0", "find range"), (140, 70, "#e08a1e", "first pages"),
        (210, 290, "#2a78b5", "stream K,V tiles: copy ahead, multiply, softmax"),
        (500, 70, "#4a9d5b", "store"), (570, 90, "#b5478a", "merge"),
    )
    picture.text(left, 24, "Layer n: a CTA that ends a row others began", size=13)
    for x, width, colour, words in phases:
        picture.box(left + x, 36, width, 30, colour)
        picture.text(left + x + width / 2, 56, words, size=11, anchor="middle", fill="#fff")
    picture.text(left - 12, 56, "CTA i", anchor="end", fill=QUIET)
    picture.text(left - 12, 100, "CTA i - 1", anchor="end", fill=QUIET)
    for x, width, colour, words in (*phases[:3], (210, 290, "#2a78b5", "stream K,V tiles"),
                                    (500, 60, "#4a9d5b", "to its slot")):
        picture.box(left + x, 80, width, 30, colour)
        picture.text(left + x + width / 2, 100, words, size=11, anchor="middle", fill="#fff")
    picture.line((left + 560, 95), (left + 600, 95), (left + 600, 69), stroke=INK, arrow=True)
    picture.text(left + 560, 126, "every word of a state is its own arrival flag", size=11, fill=QUIET, anchor="end")
    early = "Layer n + 1: launched early (sm_90 and newer), so that its start lies under layer n"
    picture.text(left, 150, early, size=13)
    for x, width, colour, words in (
        (420, 70, "#9fb3c1", "lengths"), (490, 60, "#7a68c0", "range"), (550, 110, "#e08a1e", "ask for pages"),
        (660, 80, "#2a78b5", "stream"),
    ):
        picture.box(left + x, 162, width, 30, colour)
        picture.text(left + x + width / 2, 182, words, size=11, anchor="middle", fill="#fff")
    picture.text(left - 12, 182, "CTA i", anchor="end", fill=QUIET)
    picture.line((left + 660, 30), (left + 660, 236), stroke=INK, dashed=True)
    picture.text(left + 654, 228, "layer n has ended: lengths, page ids and record are read again;", size=12,
                 anchor="end", fill=INK)
    picture.text(left + 654, 246, "if any of them changed, the CTA plans anew", size=12, anchor="end", fill=INK)
    picture.text(left, 284, "Not to scale. A CTA waits only for CTAs of lower index, which never wait for it.", size=12,
                 fill=QUIET)
    return picture.svg()
