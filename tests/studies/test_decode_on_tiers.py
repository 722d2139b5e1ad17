"""Decode over tiers: arithmetic by hand, and what must hold of the three methods."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.memory.tier_presets import find_tiers
from pkvsim.models.presets import get_model, kv_bytes_per_token
from pkvsim.studies.tiers.decode_on_tiers import decode_on_tiers

MODEL = get_model("llama-3.1-8b")
DISKS = find_tiers(["a:1TiB:6", "b:1TiB:2"], {})
RATES = {"link_bytes_per_s": 50e9, "hbm_bytes_per_s": 3e12}


def test_by_hand():
    tokens = 4 * 32768
    whole = tokens * kv_bytes_per_token(MODEL)
    read = decode_on_tiers(MODEL, [32768] * 4, DISKS, **RATES)
    assert read.link_bytes == whole and read.device_s == pytest.approx([whole / 8e9] * 2, rel=1e-5)
    assert read.step_s == pytest.approx(whole / 8e9 + (whole / 50e9 + whole / 3e12) / 32, rel=1e-5)
    near = decode_on_tiers(MODEL, [32768] * 4, DISKS, method="near", internal_bytes_per_s=[12e9, 4e9], **RATES)
    assert near.device_s == pytest.approx([whole / 16e9] * 2, rel=1e-5)
    assert near.link_bytes == 4 * 2 * 32 * (2 * 32 * 128 * 2 + 32 * 4)
    select = decode_on_tiers(MODEL, [32768] * 4, DISKS, method="select", chunk_tokens=64, **RATES)
    assert select.link_bytes == pytest.approx(whole * (0.1 + 1 / 64))
    resident = decode_on_tiers(MODEL, [32768] * 4, DISKS, method="select", abstracts_in_hbm=True, **RATES)
    assert resident.link_bytes == pytest.approx(whole * 0.1) and resident.gpu_s == pytest.approx(select.gpu_s)


def test_answers_come_from_the_tiers_that_hold_something():
    """The GPU reads an answer (outputs and their LSE) of each of them for each row, over all layers."""
    answers = 32 * (32 * 128 * 2 + 32 * 4)
    for rates, used in (([12e9, 4e9], 2), ([12e9, 1.0], 1)):
        near = decode_on_tiers(MODEL, [32768] * 4, DISKS, method="near", internal_bytes_per_s=rates, **RATES)
        assert near.gpu_s == pytest.approx(4 * used * answers / 3e12)
        assert near.link_bytes == 4 * used * (32 * 32 * 128 * 2 + answers)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=8), st.floats(0.01, 1), st.floats(1.01, 20))
def test_selecting_never_costs_more_than_its_abstracts_and_faster_devices_never_hurt(lens, share, factor):
    read = decode_on_tiers(MODEL, lens, DISKS, **RATES)
    select = decode_on_tiers(MODEL, lens, DISKS, method="select", selected_share=share, abstracts_in_hbm=True, **RATES)
    assert max(select.device_s) <= max(read.device_s) * (1 + 1e-9) and select.link_bytes <= read.link_bytes
    slow, fast = (decode_on_tiers(MODEL, lens, DISKS, method="near", internal_bytes_per_s=[r, r], **RATES)
                  for r in (1e9, factor * 1e9))  # fmt: skip
    assert fast.step_s <= slow.step_s and fast.link_bytes == slow.link_bytes


@pytest.mark.parametrize(("options", "name"), [
    ({"method": "guess"}, "method"), ({"selected_share": 0}, "selected_share"),
    ({"method": "near", "internal_bytes_per_s": [1e9]}, "internal_bytes_per_s"),
    ({"method": "near", "internal_bytes_per_s": [1e9, float("inf")]}, "internal_bytes_per_s"),
    ({"seq_lens": []}, "seq_lens"), ({"seq_lens": [5, 0]}, "seq_lens"), ({"seq_lens": [1.5]}, "seq_lens"),
    ({"seq_lens": [[1]]}, "seq_lens"), ({"tiers": []}, "tiers"), ({"link_bytes_per_s": 0}, "link_bytes_per_s"),
    ({"hbm_bytes_per_s": float("nan")}, "hbm_bytes_per_s"),
])
def test_refusals(options, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        decode_on_tiers(MODEL, **({"seq_lens": [1], "tiers": DISKS} | RATES | options))
    with pytest.raises(ValueError, match="model: expected full attention"):
        decode_on_tiers(get_model("gpt-oss-20b"), [1], DISKS, **RATES)
