"""cuda_src/variant.cuh lists every constant that the host sets, and no other source has defaults of its own."""
from __future__ import annotations

import re

import numpy as np

from gpu.cache import append_variant
from gpu.inputs.block_tables import TableLayout
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import TILE_TOKENS, kernel_config, read_config
from gpu.selection.variant import selection_defines
from gpu.several.inbox import rank_config
from pkvsim import DecodeShape
from pkvsim.reference.rope import HALF, Rope

SHAPE = DecodeShape(4, 1, 128, 16)
TEXT = (SOURCE_DIR / "variant.cuh").read_text()


def test_every_constant_is_explained() -> None:
    rope = Rope(style=HALF, cos_sin=np.zeros((1, 128), np.float32))
    said = {
        *read_config(kernel_config(SHAPE, "float16", 90), 90).read_defines(),
        *kernel_config(SHAPE, "float16", 90).selected_defines(selected=True, page_lse=True),
        *TableLayout(int64=True, csr=True, last_page=True).defines(),
        *append_variant.defines(SHAPE, "float16", kv_dtype="int8", head_dim_v=64, rope=rope),
        *rank_config(SHAPE, "float16", 90, num_ranks=2, max_batch=1).defines(),
        *selection_defines(SHAPE, "float16", "mean_std", "softmax_mean"),
        "UNROLL",
        "PKV_RACECHECK",
    }
    said |= {option[2:].split("=")[0] for option in compile_options({}) if option.startswith("-D")}
    explained = set(re.findall(r"^// ([A-Z][A-Z0-9_]+)\s{2,}", TEXT, re.MULTILINE))
    assert explained == said


def test_defaults_are_given_in_one_place() -> None:
    for path in SOURCE_DIR.glob("*.cu*"):
        found = re.findall(r"#ifndef (\w+)", path.read_text())
        assert path.name == "variant.cuh" or not found, (path.name, found)


def test_a_tile_is_the_hosts() -> None:
    assert int(re.search(r"#define PKV_TILE (\d+)", TEXT)[1]) == TILE_TOKENS
