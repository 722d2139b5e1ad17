"""The GPUs that ship: all of them, each number sourced, and numbers that agree with one another."""
import json
import re

import pytest

from pkvsim.devices.device import CATALOGUE, DEVICES, NUMBER_FIELDS, device_named_by, get_device
from pkvsim.devices.outside_constants import CONSTANTS

NAMES = {
    "a10", "a100_40gb", "a100_80gb", "b200", "h100_pcie", "h100_sxm", "h200", "l4", "l40s", "rtx3060", "rtx3090",
    "rtx4060ti", "rtx4090", "rtx5090", "h20", "h100_nvl", "gh200", "b300", "l20", "a30", "rtx_a6000", "rtx_6000_ada",
    "rtx_pro_6000", "rtx4070", "rtx5070ti",
}  # fmt: skip
SMEM_KIB = {(8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228, (10, 0): 228, (10, 3): 228, (12, 0): 100}
# Dense FP16 tensor FLOP with FP32 sums, per SM and clock; GeForce halves what its chips do elsewhere.
FLOP_PER_CLOCK = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192, (12, 0): 1024}
CAPPED = {"h20", "l20"}  # arithmetic cut for export, below what the chip's clock gives


def test_the_catalogue_is_complete():
    assert NAMES <= set(DEVICES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_numbers_agree_with_one_another(name):
    device = get_device(name)
    assert device.label.startswith("NVIDIA ")
    assert device.smem_per_sm_kib == SMEM_KIB[device.compute_capability]
    assert 0.75 < device.beta_gb_s / device.peak_gb_s < 1
    if device.sources["cta_read_gb_s"].status == "estimated":  # as the least that one CTA must read
        assert device.cta_read_gb_s * device.num_sms <= device.peak_gb_s
    geforce = 2 if "GeForce" in device.label else 1
    clock_ghz = device.fp16_tflops * 1e3 * geforce / (device.num_sms * FLOP_PER_CLOCK[device.compute_capability])
    assert 1.3 < clock_ghz < 2.65 or (name in CAPPED and clock_ghz <= 1.3)
    gigabytes = float(re.search(r"(\d+) GB$", device.label)[1])
    assert 0.9 * gigabytes < device.memory_gib <= gigabytes


@pytest.mark.parametrize("name", sorted(NAMES))
def test_narrow_rates_are_multiples_of_the_16_bit_rate(name):
    device = get_device(name)
    for narrow, factors in ((device.fp8_tflops, (2, 2)), (device.int8_tops, (2, 4)), (device.fp4_tflops, (4, 8))):
        if narrow is not None:
            assert 0.98 * factors[0] <= narrow / device.fp16_tflops <= 1.02 * factors[1]
    assert (device.fp8_tflops is not None) == (device.compute_capability >= (8, 9))
    assert (device.fp4_tflops is not None) == (device.compute_capability >= (10, 0))
    assert device.link_gb_s >= 16


@pytest.mark.parametrize("name", sorted(NAMES))
def test_datasheet_numbers_cite_a_page(name):
    sources = get_device(name).sources
    assert all("https://" in source.source for source in sources.values() if source.status == "datasheet")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_shares_outside_attention_are_parts_of_the_gpus_own_numbers(name):
    """Or the entry says what they stand above."""
    for entry in get_device(name).outside.values():
        above = [field for field in CONSTANTS if field.endswith("_share") and getattr(entry.constants, field) > 1]
        assert not above or "shares above 1" in entry.source, (above, entry.source)


def test_adding_a_gpu_is_adding_a_file(tmp_path):
    data = json.loads((CATALOGUE / "rtx4090.json").read_text())
    data["name"] = "mine"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    assert get_device(str(path)).name == "mine"


@pytest.mark.parametrize("name", NUMBER_FIELDS)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", '"12"', "null", "true"])
def test_odd_numbers_are_refused(tmp_path, name, value):
    data = json.loads((CATALOGUE / "rtx4090.json").read_text())
    data["numbers"][name]["value"] = "PLACE"
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data).replace('"PLACE"', value))
    with pytest.raises(ValueError, match=f"odd.json: {name}: expected a number"):
        get_device(str(path))


@pytest.mark.parametrize(("driver", "name"), [
    ("NVIDIA H200", "h200"), ("NVIDIA H20", "h20"), ("NVIDIA H100 80GB HBM3", "h100_sxm"), ("NVIDIA H100 PCIe", "h100_pcie"),
    ("NVIDIA H100 NVL", "h100_nvl"), ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
    ("NVIDIA A100-PCIE-40GB", "a100_40gb"), ("NVIDIA A10", "a10"), ("NVIDIA A10G", None), ("NVIDIA L4", "l4"),
    ("NVIDIA L40S", "l40s"), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 3060", "rtx3060"),
    ("NVIDIA GeForce RTX 3060 12 GB", "rtx3060"), ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti"),
    ("NVIDIA GeForce RTX 5070 Ti", "rtx5070ti"), ("NVIDIA GeForce RTX 5070", None), ("NVIDIA RTX A6000", "rtx_a6000"),
    ("NVIDIA RTX 6000 Ada Generation", "rtx_6000_ada"), ("NVIDIA B200", "b200"), ("no CUDA device", None),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"), ("NVIDIA GeForce RTX 3060 Ti", None),
    ("NVIDIA GeForce RTX 4070 SUPER", None)])
def test_drivers_names(driver: str, name: str | None) -> None:
    assert device_named_by(driver) == name


def test_every_label_names_its_own_device() -> None:
    assert {name: device_named_by(spec.label) for name, spec in DEVICES.items()} == {name: name for name in DEVICES}
