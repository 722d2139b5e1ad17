"""gpu.inputs.arrays on tensors: whatever changes about one is seen, also where it is the same object."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.inputs import arrays


class Subclass(torch.Tensor):
    pass


KINDS = {"tensor": lambda: torch.zeros(4, 6), "view": lambda: torch.zeros(5, 6)[1:, ::2], "none": lambda: None,
         "parameter": lambda: torch.nn.Parameter(torch.zeros(2, 3)), "empty": lambda: torch.zeros(0, 3),
         "subclass": lambda: torch.zeros(3).as_subclass(Subclass), "number": lambda: 3}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=9))
def test_fingerprints_are_each_arrays_own(kinds) -> None:
    given_arrays = [KINDS[kind]() for kind in kinds]
    addresses, keys = arrays.fingerprints(given_arrays)
    assert list(zip(addresses, keys)) == [arrays.fingerprint(array) for array in given_arrays]


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    tensor.data = data


IN_PLACE = {"resize_": lambda t: t.resize_(2, 6), "t_": lambda t: t.t_(), "unsqueeze_": lambda t: t.unsqueeze_(0),
            "as_strided_": lambda t: t.as_strided_((4, 6), (0, 1)),
            "dtype": lambda t: set_data(t, t.view(torch.bfloat16))}


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_tensor_changed_in_place_is_another(change) -> None:
    tensor = torch.zeros(4, 6, dtype=torch.float16)
    before = arrays.fingerprints([tensor])
    IN_PLACE[change](tensor)
    after = arrays.fingerprints([tensor])
    assert after[1] != before[1] and after[0] == before[0], "the address alone would not tell"


def test_a_tensor_on_another_device_is_another() -> None:
    on_host, on_meta = (arrays.fingerprints([torch.zeros(4, 6, device=device)])[1] for device in ("cpu", "meta"))
    assert on_host != on_meta


def test_another_place_is_seen_and_alike() -> None:
    tensor, storage = torch.zeros(4, 6), torch.zeros(80)
    (first,), key = arrays.fingerprints([tensor])
    for offset, alike in ((8, True), (9, False)):  # elements; from a 16-byte boundary and not
        tensor.set_(storage.untyped_storage(), offset - storage.data_ptr() % 16 // 4, (4, 6), (6, 1))
        (address,), moved = arrays.fingerprints([tensor])
        assert address == tensor.data_ptr() != first and (moved == key) == (alike == (first % 16 == 0))


def test_a_combined_cache_is_split_into_views() -> None:
    both = torch.arange(3 * 2 * 2 * 4 * 8).reshape(3, 2, 2, 4, 8)
    for half, index in zip(arrays.split_combined(both), (0, 1)):
        assert half.data_ptr() == both[:, index].data_ptr() and half.stride() == both[:, index].stride()
        assert torch.equal(half, both[:, index])
    with pytest.raises(ValueError, match="^v_pages: .*3, 1, 2, 4, 8"):
        arrays.split_combined(both[:, :1])


def test_outputs_are_of_the_models_library() -> None:
    made = arrays.empty_like(torch.zeros(2), arrays.shape_of("q", torch.zeros(2, 3)), "float16")
    assert made.shape == (2, 3) and made.dtype == torch.float16
    with pytest.raises(ValueError, match="^q: expected a NumPy, CuPy or torch array"):
        arrays.shape_of("q", [1])


def test_the_stream_is_torchs_current_one_on_that_device(monkeypatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", {3: 99}.__getitem__, raising=False)
    assert arrays.current_stream("torch", 3) == 99
