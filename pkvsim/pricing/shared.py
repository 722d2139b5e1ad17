"""What steps cost whose rows read their common pages once: constants of such reads, relative to a route's own."""
from __future__ import annotations

from typing import NamedTuple

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import RouteModel
from pkvsim.devices.route_options import reads_by_warpgroups
from pkvsim.options import AttentionOptions
from pkvsim.pricing.constants import PARTIAL_ELEMENT_BYTES
from pkvsim.schedule.costs import SHARED_COLUMNS, SharedCosts, default_shared_costs
from pkvsim.shapes import DecodeShape

FLOPS = 2  # of a multiplication and its addition
ROW_COLUMNS = 4  # of a member's KV head, for which SharedPrices.row is stated
# What mma.sync reaches of the dense FP16 peak on GPUs whose peak takes newer instructions, by major compute capability:
# 62 % on Hopper (measured on an H100 in https://arxiv.org/abs/2402.13499, 2024-02-21); of Blackwell's GPUs for data
# centres that is an assumption. Elsewhere mma.sync gives the peak.
MMA_SYNC_SHARES = {9: 0.62, 10: 0.62}


class SharedPrices(NamedTuple):
    """Constants of the balanced route's shared reads, which hold on every GPU as far as they are relative.

    efficiency: share of what the SMs' mma.sync gives that a read's products reach, of wgmma those of 64 columns,
    whether a read has as many or not. weights: what making a weight of a logit takes, in products. start, read, row: in
    RouteModel.segment_us: what a step with reads takes more before its first and after its last task; the end of a part
    of a read, for 64 columns; merging the output of a member's KV head, for ROW_COLUMNS columns, half of it for each.
    state: in the time in which a CTA reads it alone, what each state of such an output adds. share: what a CTA gets of
    the bandwidth in a read while all together ask for more than there is, of what one that reads a row's own tokens
    gets. (Why it is less is an assumption: a read waits for all keys and then all values of 64 tokens at a time, so it
    asks for less at once.)
    """

    efficiency: float
    weights: float
    start: float
    read: float
    row: float
    state: float
    share: float


# Of reads by mma.sync. Fitted by pkvsim.fitting.fit_shared, with weights and share held at these, to seven cells with
# heads of 128 of one H200 (2026-11-29, tests/fitting/h200_shared_by_warps.json): off by 2.4 % in the mean; by 5.4 % on
# each cell that a fit to the others has not seen. Heads of 64, whose kernel spills registers, take a tenth more. For
# other GPUs it is an assumption.
PRICES = SharedPrices(efficiency=0.332, weights=0.0, start=39.3, read=0.784, row=1.814, state=0.0005, share=1.0)
# Of reads by wgmma, by
#   bench_shared.py --fit results/h200_shared{,_steps,_drawn,_plans}.json
# in examples/: of the 69 measurements of one H200 (2026-11-29), of 33 steps by one plan or two, that save enough to be
# read together. Off by 3.2 % in the mean and 10.9 % at most, by 4.8 % in the mean of the steps of the half that
# each half's fit has not seen, and by 3.9 % of 118 later measurements of kernels that plan otherwise.
WARPGROUP_PRICES = SharedPrices(
    efficiency=0.9916, weights=441.3, start=14.73, read=2.349, row=0.7605, state=6.576, share=0.4709
)  # fmt: skip

# How fast all CTAs read what another row has read before, which they find in L2 in part, over what memory gives: fitted
# to the same steps of one H200 with every row reading for itself.
REREAD_SPEEDUP = 2.0
# A group's reads after its first find the prefix in L2 where it takes no more than so much of that. Were all to find
# it, prices fitted to the steps above would be off by 18 instead of 10 % where 256 rows share 2K.
REREAD_L2_SHARE = 0.6


def apart_gb_s(bandwidth_gb_s: float, kv_bytes: float, distinct_bytes: float) -> float:
    """What memory and L2 give together where rows with pages in common read kv_bytes apart, of distinct_bytes."""
    again = max(0.0, kv_bytes - distinct_bytes)
    return bandwidth_gb_s * kv_bytes / (distinct_bytes + again / REREAD_SPEEDUP) if kv_bytes > 0 else bandwidth_gb_s


class ReadPrices(NamedTuple):
    """The same of one layer on one GPU."""

    start_us: float
    read_us: float  # of the end of a part of a read, for each column
    read_gb_s: float  # of KV that one CTA keeps up with in a read
    row_us: float  # of merging an output
    state_us: float  # of each state of it
    read_share: float  # as SharedPrices.share
    again_bytes: float  # of a prefix of all KV heads, up to which a group's later reads find it in L2


def again_bytes(device: DeviceSpec) -> float:
    """Of a prefix of all KV heads, up to which a group's later reads find it in L2."""
    return REREAD_L2_SHARE * device.l2_mib * 2**20


def by_warpgroups(device: DeviceSpec, shape: DecodeShape, options: AttentionOptions) -> bool:
    """Whether the GPU's reads for several rows are by wgmma."""
    return reads_by_warpgroups(
        head_dim=shape.head_dim, v_head_dim=options.value_dim(shape), page_size=shape.page_size,
        kv_dtype=options.kv_dtype, compute_capability=device.compute_capability,
    )  # fmt: skip


def shared_costs_of(
    device: DeviceSpec, shape: DecodeShape, batch_size: int, options: AttentionOptions
) -> SharedCosts:  # fmt: skip
    """What the engine weighs on a GPU for a batch of so many rows."""
    columns = options.query_shape(shape).group_size
    warpgroups = by_warpgroups(device, shape, options)
    return default_shared_costs(
        batch_size * columns, row_columns=columns, value_dim=options.value_dim(shape), by_warpgroups=warpgroups
    )


def read_prices(
    model: RouteModel, device: DeviceSpec, shape: DecodeShape, options: AttentionOptions, costs: SharedCosts,
    prices: SharedPrices | None = None,
) -> ReadPrices:  # fmt: skip
    """Prices of the reads of a layer whose kernel reads for costs.columns columns; by those of the GPU's instructions
    if none are given."""
    columns, value_dim = options.query_shape(shape).group_size, options.value_dim(shape)
    if by_warpgroups(device, shape, options):
        prices = WARPGROUP_PRICES if prices is None else prices
        served, mma_tflops = -(-costs.columns // SHARED_COLUMNS) * SHARED_COLUMNS, device.fp16_tflops
    else:
        prices = PRICES if prices is None else prices
        served = costs.columns // columns * columns
        mma_tflops = device.fp16_tflops * MMA_SYNC_SHARES.get(device.compute_capability[0], 1.0)
    flops = FLOPS * served * (shape.head_dim + value_dim + prices.weights)  # of a token
    cta_tflops = prices.efficiency * mma_tflops / (device.num_sms * max(1.0, model.ctas_per_sm))
    state_bytes = columns * (2 + value_dim) * PARTIAL_ELEMENT_BYTES
    return ReadPrices(
        start_us=prices.start * model.segment_us,
        read_us=prices.read * model.segment_us / SHARED_COLUMNS,
        read_gb_s=cta_tflops * 1e3 / flops * options.kv_token_bytes(shape),
        row_us=prices.row * model.segment_us * (1 + columns / ROW_COLUMNS) / 2,
        state_us=prices.state * state_bytes / (model.cta_read_gb_s * 1e3),
        read_share=prices.share,
        again_bytes=again_bytes(device),
    )
