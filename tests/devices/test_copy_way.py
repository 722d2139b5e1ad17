"""pkvsim.devices.copy_way: pieces that a ring's slot holds, and the way of sizes whose rates were measured."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.devices.copy_way import COPY_WAYS, DMA, KERNEL, KIB, PIECE_BYTES, STAGED, choose_copy_way, layers_in_piece


@given(st.integers(1, 200), st.integers(1, 2**24), st.integers(0, 2**28), st.booleans())
def test_pieces_are_whole_layers_that_fit(num_layers: int, layer_bytes: int, most_bytes: int, whole: bool) -> None:
    layers = layers_in_piece(num_layers, layer_bytes, most_bytes=most_bytes, whole=whole)
    assert 1 <= layers <= num_layers and (layers == 1 or layers * layer_bytes <= most_bytes)
    if most_bytes >= num_layers * layer_bytes:
        if whole:
            assert layers == num_layers
        else:  # as few as are long enough
            assert layers in (1, num_layers) or (layers - 1) * layer_bytes < PIECE_BYTES
            assert layers == num_layers or layers * layer_bytes >= PIECE_BYTES


@given(st.integers(1, 2**24), st.integers(1, 200), st.booleans())
def test_longer_pieces_of_the_same_runs_are_never_less_staged(run_bytes: int, runs: int, to_host: bool) -> None:
    ways = [choose_copy_way(run_bytes, count * run_bytes, to_host=to_host) for count in range(1, runs + 1)]
    assert set(ways) <= set(COPY_WAYS) and ways[0] != STAGED
    assert sorted(ways, key=lambda way: way == STAGED) == ways


@pytest.mark.parametrize(("run_kib", "piece_kib", "into", "out"), [
    (64, 512, DMA, STAGED), (32, 512, STAGED, STAGED), (4, 256, STAGED, STAGED), (4, 64, KERNEL, KERNEL), (64, 64, DMA, KERNEL),
    (512, 512, DMA, DMA), (1024, 1024, DMA, DMA), (256, 256, DMA, KERNEL),
])  # fmt: skip
def test_ways_of_measured_sizes(run_kib: int, piece_kib: int, into: str, out: str) -> None:
    found = [choose_copy_way(run_kib * KIB, piece_kib * KIB, to_host=to_host) for to_host in (False, True)]
    assert found == [into, out]
