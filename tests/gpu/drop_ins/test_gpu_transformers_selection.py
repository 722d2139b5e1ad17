"""PagedCache(selection=...) in generate(): all pages are the dense tokens, a part of them still generates."""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from tiny_models import make_model, prompts  # noqa: E402

from gpu.drop_ins.transformers_attention import register  # noqa: E402
from gpu.drop_ins.transformers_cache import PagedCache  # noqa: E402
from pkvsim.devices.device import get_device  # noqa: E402

register()
LENS = [500, 2, 333, 64]


@pytest.mark.parametrize(("method", "summary_dtype"), [("mean_std", None), ("quest", None), ("mean_std", "uint8"),
                                                       ("centroids", None)])
def test_generate_over_selected_pages(method: str, summary_dtype: str | None) -> None:
    model = make_model("llama", head_dim=64, dtype=torch.float16, device="cuda")
    inputs, new_tokens = prompts(LENS, "left", device="cuda"), 30
    model.set_attn_implementation("pkv")
    found = {}
    for budget in (None, 1.0, 0.25):
        options = {} if budget is None else {"selection": method, "budget": budget, "dense_layers": 0,
                                             "summary_dtype": summary_dtype, "always_select": True}
        cache = PagedCache(model.config, max_batch_size=len(LENS), max_seq_len=600, **options)
        for _ in range(2):  # the second on pages and summaries that were used
            found[budget] = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False,
                                           **cache.argument_of(model))
            cache.reset()
    assert found[1.0].shape == found[None].shape == found[0.25].shape
    same = (found[1.0] == found[None])[:, max(LENS):]
    assert bool(same[:, :5].all())  # a near tie may turn later tokens
    assert bool((found[0.25][:, : max(LENS)] == found[None][:, : max(LENS)]).all())


def test_short_steps_go_dense() -> None:
    """Rows of a few hundred tokens: lists do not pay, no summary is kept, and the tokens are the dense ones."""
    model = make_model("llama", head_dim=64, dtype=torch.float16, device="cuda")
    inputs = prompts(LENS, "left", device="cuda")
    model.set_attn_implementation("pkv")
    found = []
    for options in ({}, {"selection": "mean_std", "budget": 0.1, "dense_layers": 0}):
        cache = PagedCache(model.config, max_batch_size=len(LENS), max_seq_len=600, **options)
        if cache.selection is not None:
            cache.selection.rule.device = get_device("h200")  # whatever this GPU is
        found.append(model.generate(**inputs, max_new_tokens=8, do_sample=False, **cache.argument_of(model)))
    assert not cache.selection._summaries and bool((found[0] == found[1]).all())


def test_other_selections_are_refused() -> None:
    model = make_model("llama", head_dim=64, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match="method: expected one of mean_std, quest"):
        PagedCache(model.config, max_batch_size=1, max_seq_len=64, selection="best")
    for options in ({"summary_dtype": "uint8"}, {"selection": "quest", "summary_dtype": "int8"}):
        with pytest.raises(ValueError, match="summary_dtype: expected None"):
            PagedCache(model.config, max_batch_size=1, max_seq_len=64, **options)
    with pytest.raises(ValueError, match="fraction: expected"):
        PagedCache(model.config, max_batch_size=1, max_seq_len=64, selection="quest", budget=0)
