"""gpu.calibrate.outside on the CPU: what it runs is right, what it writes is read, and what it writes is fitted."""
from dataclasses import replace

import numpy as np
import pytest
from paths import ROOT

from pkvsim.devices.device import get_device, load_device
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.fitting.fit_outside import ENGINE, _matrix_us, fit_outside, price_layers, read_layers
from pkvsim.fitting.outside_table import KernelTime, read_kernel_times, write_kernel_times
from pkvsim.models.presets import get_model
from pkvsim.outside.derive import outside_entry

torch = pytest.importorskip("torch")
HEAD = "kernel,kind,tokens,out_features,in_features,past,bytes,us\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    from gpu.calibrate.outside import main

    folder = tmp_path_factory.mktemp("outside")
    assert main(["--outside", "--device", "cpu", "-o", str(folder / "tiny.csv")]) == 0
    return folder


def test_a_run_on_the_cpu_writes_every_part(written):
    times = read_kernel_times(written / "tiny.csv")
    assert {t.kernel for t in times} == {"matrix", "attention", "elementwise", "sampling", "heat", "host"}
    assert sum(t.kernel == "matrix" for t in times) == 6 and sum(t.kernel == "attention" for t in times) == 4
    layers = read_layers(written / "tiny_layers.csv")
    assert [(t.rows, t.chunk, t.past) for t in layers] == [(2, 0, 0), (0, 8, 0), (0, 8, 16)]
    priced = price_layers(layers, get_model("llama-3.1-8b"), get_device("h200"), constants())
    assert (priced > 0).all()


def test_attention_that_is_timed_is_causal_attention():
    from gpu.calibrate.outside_attention import SDPA, Heads, chunk_attention, rows_attention

    torch.manual_seed(0)
    heads = Heads(4, 2, 16)
    attend = chunk_attention(6, 5, heads, layers=1, device="cpu", kernel=SDPA)
    k, v = (x[0].transpose(0, 1).float() for x in attend.__closure__[0].cell_contents[0])
    q = torch.randn(6, 4, 16).half()
    got = attend(0, q).float()
    for at in range(6):
        scores = torch.einsum("hd,thd->ht", q[at].float(), k[: 6 + at]) / 4
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), v[: 6 + at])
        assert torch.allclose(got[at], expected, atol=0.02)
    rows = rows_attention(3, 7, heads, layers=2, device="cpu", kernel=SDPA)
    assert rows(1, torch.randn(3, 4, 16).half()).shape == (3, 4, 16)


def test_a_layer_is_a_llama_layer():
    """Against the same layer written out, in float32."""
    from gpu.calibrate.outside import TINY_STACK
    from gpu.calibrate.outside_layers import Stack

    torch.manual_seed(0)
    stack = Stack(TINY_STACK, "cpu")
    x, cosine, sine = stack.inputs(5)
    got = stack.layer(0, x, cosine, sine, lambda _, q: q)
    into, out, gate_up, down = (w.float() for w in stack._weights[0])

    def norm(y):
        return y / (y.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    q = (norm(x.float()) @ into.t()).view(5, -1, 8)[:, :4]
    low, high = q[..., :4], q[..., 4:]
    turned = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)
    y = x.float() + turned.reshape(5, -1) @ out.t()
    gate, up = (norm(y) @ gate_up.t()).chunk(2, dim=1)
    expected = y + (torch.nn.functional.silu(gate) * up) @ down.t()
    assert torch.allclose(got.float(), expected, atol=0.05, rtol=0.02)


def test_what_does_not_run_is_noted_and_left_out():
    from gpu.calibrate.outside_layers import LayerShape, StackCell, stack_times

    said = []
    odd = LayerShape(hidden=32, mlp_width=64, query_heads=4, kv_heads=3, head_dim=8, layers=1)
    assert list(stack_times([StackCell(rows=2, context=4)], device="cpu", say=said.append, shape=odd)) == []
    assert len(said) == 1 and "left out StackCell(rows=2" in said[0]


def constants():
    return OutsideConstants(
        matrix_share=0.75, fp8_share=0.6, weight_share=0.9, matrix_us=4.0, half_rate_tokens=20.0, tile_tokens=64.0,
        wave_weight=0.6, roofline_power=5.0, attention_share=0.55, attention_us=8.0, attention_half_tokens=100.0,
        kernel_us=2.5, elementwise_share=0.8, all_reduce_us=9.0, all_reduce_share=0.5,
    )


def table(device, true):
    """Kernel times as these constants would give them, 2 % of noise."""
    generator = np.random.default_rng(0)
    times = [
        KernelTime("matrix", kind, tokens=tokens, out_features=out, in_features=into)
        for out, into in ((6144, 4096), (28672, 4096), (4096, 14336))
        for tokens in (1, 4, 16, 64, 256, 1024, 4096)
        for kind in ("16-bit", "fp8")
    ]
    times = [replace(t, us=_matrix_us(t, device, true)) for t in times]
    for chunk in (256, 1024, 4096):
        for past in (0, 4096, 32768):
            flops = 4 * 32 * 128 * (chunk * past + chunk * (chunk + 1) / 2)
            us = 8 + flops / (device.fp16_tflops * 0.55e6 * chunk / (chunk + 100))
            times.append(KernelTime("attention", "sdpa", tokens=chunk, past=past, us=us))
    for size in (10_000, 1_000_000, 100_000_000, 400_000_000):
        times.append(KernelTime("elementwise", "add", bytes=size, us=2.5 + size / (device.beta_gb_s * 800)))
        reduced = 9.0 + size / (device.link_gb_s * 500)
        times.append(KernelTime("all_reduce", "nccl", tokens=2, bytes=size, us=reduced))
    times += [KernelTime("heat", "16-bit", past=1500 * at, us=1500 * (1 if at < 40 else 1.3)) for at in range(100)]
    return [replace(t, us=t.us * float(np.exp(generator.normal(0, 0.02)))) for t in times]


def test_a_fit_finds_the_constants_of_a_table(tmp_path):
    device, true = get_device("h200"), constants()
    write_kernel_times(tmp_path / "times.csv", table(device, true))
    start = replace(true, matrix_share=0.6, weight_share=0.8, attention_share=0.4, kernel_us=1.0, all_reduce_us=5.0)
    times = read_kernel_times(tmp_path / "times.csv")
    fitted = fit_outside(device, times, start, source="times.csv", date="2026-11-29")
    entry = fitted.outside[ENGINE]
    c = entry.constants
    assert c.boost == pytest.approx(1.3, rel=0.03) and c.boost_ms == pytest.approx(120, rel=0.1)
    assert c.matrix_share * c.boost == pytest.approx(0.75, rel=0.05) and c.weight_share == pytest.approx(0.9, rel=0.05)
    assert c.attention_share == pytest.approx(0.55, rel=0.06) and c.kernel_us == pytest.approx(2.5, rel=0.1)
    assert c.all_reduce_us == pytest.approx(9, rel=0.1) and c.all_reduce_share == pytest.approx(0.5, rel=0.06)
    assert entry.status == "measured" and entry.basis["matrix_share"] == "measured" and entry.in_sample.mean_percent < 4
    (tmp_path / "mine.json").write_text(fitted.to_json())
    assert load_device(tmp_path / "mine.json").outside == fitted.outside


def test_whole_layers_from_kernel_times_alone():
    """38 layers of Llama-3.1-8B in PyTorch on an H200, no constant fitted to them: 5 % with their attention, which is
    priced by its time alone, and without."""
    results = ROOT / "examples" / "results"
    device, times = get_device("h200"), read_kernel_times(results / "h200_outside.csv")
    start = outside_entry(device, "vllm").constants
    fitted = fit_outside(device, times, start, source="h200_outside.csv", date="2026-11-29").outside[ENGINE].constants
    layers = read_layers(results / "h200_outside_layers.csv")
    attention, whole = (np.array([getattr(layer, name) for layer in layers]) for name in ("attention_us", "layer_us"))
    priced = price_layers(layers, get_model("llama-3.1-8b"), device, fitted)
    assert len(layers) == 38 and fitted == device.outside[ENGINE].constants
    assert np.abs(priced / (whole - attention) - 1).mean() < 0.05
    assert np.abs((priced + attention) / whole - 1).mean() < 0.03


def test_too_few_products_are_refused():
    with pytest.raises(ValueError, match="outside: expected at least 8 products"):
        fit_outside(get_device("h200"), [], constants(), source="none", date="2026-11-29")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected columns kernel"),
        (HEAD + "x,y,1,1,1,1,1,1\n", ":2: kernel: expected one of"),
        (HEAD + "heat,y,1,1,1,1,1,-1\n", ":2: us: expected a number"),
        (HEAD + "heat,y,z,1,1,1,1,1\n", ":2: expected numbers"),
    ],
)  # fmt: skip
def test_odd_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "odd.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_kernel_times(path)
