"""The slots of pkvsim.schedule.spans, played through: CTAs one after the other, states as lists of their tiles."""
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from shared_cases import balanced_costs, shared_batches

from pkvsim import make_schedule


class Slots:
    """Words that are empty between launches: each is written when it is empty and emptied by whoever reads it."""

    def __init__(self):
        self.words = {}

    def send(self, key, tiles):
        assert key not in self.words
        self.words[key] = tiles

    def take(self, key):
        return self.words.pop(key)  # a KeyError is a wait for a CTA of higher index


@settings(max_examples=150, deadline=None)
@given(shared_batches(max_rows=14), balanced_costs, st.integers(1, 40))
def test_every_output_merges_every_tile_once_in_order(batch, costs, num_ctas):
    schedule = make_schedule("balanced", batch.shape, batch.lens, num_ctas=num_ctas, costs=costs, **batch.options())
    if schedule.shared is None:
        return
    shared, tasks = schedule.shared, schedule.tasks.tolist()
    reads = shared.read_of_task.tolist()
    ranges = [range(a, b) for a, b in itertools.pairwise(schedule.cta_offsets.tolist())]
    homes = {}  # ranges of each span
    for index, these in enumerate(ranges):
        for t in these:
            row, head = tasks[t][:2]
            homes.setdefault((reads[t], row if reads[t] < 0 else -1, head), []).append(index)
    tiles_of_row = [-(-length // batch.tile_tokens) for length in batch.lens]

    cut, ended, own, outputs = Slots(), Slots(), Slots(), {}
    for index, these in enumerate(ranges):
        kept, parked = [], []
        for t in these:
            row, head, _, begin, end = tasks[t]
            tiles, read = list(range(begin, end)), reads[t]
            if read >= 0:
                for place, member in enumerate(shared.members_of(read).tolist()):
                    if end == shared.reads["tiles"][read]:
                        ended.send((member, head), tiles)
                    else:
                        cut.send((index, place * batch.columns), tiles)
            elif end < tiles_of_row[row]:
                cut.send((index, 0), tiles)
            elif shared.read_of_row[row] >= 0:
                own.send((row, head), tiles)
                parked.append((row, head))
            elif begin == 0:
                assert outputs.setdefault((row, head), tiles) is tiles
            else:
                kept.append((row, head, tiles))
        assert len(kept) <= 1
        for row, head in parked:
            read = int(shared.read_of_row[row])
            column = shared.members_of(read).tolist().index(row) * batch.columns
            of_read, of_row = homes[read, -1, head], homes[-1, row, head]
            merged = sum((cut.take((i, column)) for i in of_read[:-1]), []) + ended.take((row, head))
            merged += sum((cut.take((i, 0)) for i in of_row[:-1]), []) + own.take((row, head))
            assert of_row[-1] == index and outputs.setdefault((row, head), merged) is merged
        for row, head, tiles in kept:
            merged = sum((cut.take((i, 0)) for i in homes[-1, row, head][:-1]), []) + tiles
            assert outputs.setdefault((row, head), merged) is merged
    assert not cut.words and not ended.words and not own.words
    heads = range(batch.shape.num_kv_heads)
    assert outputs == {(r, h): list(range(n)) for r, n in enumerate(tiles_of_row) if n for h in heads}
