"""nano-vllm on our kernels: a Qwen3 of random weights served from a checkout of github.com/GeeeekExplorer/nano-vllm.

    python tests/support/run_nano_vllm.py --source nano-vllm --rows 32 --prompts 100 1500 --new-tokens 128

The checkout is used as it is: our module stands in for flash_attn. The same prompts then go through gpu.serve. Greedy tokens (a temperature of 1e-5, as nano-vllm
has no zero) are compared with Transformers' SDPA on the same weights; they may part where rounding decides.
"""
from __future__ import annotations

import argparse
import atexit
import gc
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402
from bench.generate_ways import Batch, compare, reference_logits  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from gpu import flash_attn  # noqa: E402
from gpu.measure.environment import environment, write_json  # noqa: E402

TEMPERATURE = 1e-5
NEAR_TIE = 0.2  # share of the logits' standard deviation; bfloat16 shifted nano-vllm's by up to 0.06 on the CPU


def save_model(folder: Path, *, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 of random weights that are wide enough that greedy tokens vary, with a tokenizer of numbers.

    The model comes back as loaded from the folder: .to(torch.bfloat16) rounds the rotary frequencies too, which turns
    token 1,000 by up to 1.2 radians away from where engines have it and shifts logits by 0.2 to 0.5 of their deviation.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=8, head_dim=128, initializer_range=0.05,
                         max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16", bos_token_id=1,
                         eos_token_id=2, pad_token_id=0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"<{number}>": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<2>", unk_token="<0>").save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def serve(folder: Path, prompts: list[list[int]], new_tokens: int, *, eager: bool) -> tuple[torch.Tensor, float]:
    """(tokens [rows, new_tokens], tokens per second of the whole call)."""
    from nanovllm import LLM, SamplingParams

    # It captures a graph for every 16 rows up to max_num_seqs.
    llm = LLM(str(folder), enforce_eager=eager, gpu_memory_utilization=0.5, max_model_len=4096,
              max_num_seqs=-(-len(prompts) // 16) * 16)
    asked = SamplingParams(temperature=TEMPERATURE, max_tokens=new_tokens, ignore_eos=True)
    llm.generate(prompts[:2], asked, use_tqdm=False)
    start = time.perf_counter()
    found = llm.generate(prompts, asked, use_tqdm=False)
    seconds = time.perf_counter() - start
    llm.exit()
    atexit.unregister(llm.exit)  # which it registered, and which cannot be called twice
    return torch.tensor([output["token_ids"] for output in found]), len(prompts) * new_tokens / seconds


def serve_ours(folder: Path, prompts: list[list[int]], new_tokens: int, *, eager: bool) -> tuple[torch.Tensor, float]:
    """The same by gpu.serve."""
    from gpu.serve import LLM, SamplingParams
    from gpu.serve.llm import ServeOptions

    llm = LLM(folder, ServeOptions(max_batch=len(prompts), step_tokens=16384, prefix_cache="lru", max_context=4096,
                                   memory_fraction=0.5, graphs=not eager))
    asked = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    llm.generate(prompts[:2], asked)
    start = time.perf_counter()
    found = llm.generate(prompts, asked)
    seconds = time.perf_counter() - start
    return torch.tensor([one.tokens for one in found]), len(prompts) * new_tokens / seconds


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout, None where it is none."""
    told = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of nano-vllm")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs=2, default=(100, 1500), metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.source.resolve()))
    flash_attn.install()
    generator = torch.Generator().manual_seed(1)
    lens = torch.randint(args.prompts[0], args.prompts[1] + 1, (args.rows,), generator=generator).tolist()
    shared = torch.randint(3, 4096, (600,), generator=generator).tolist()  # a prefix, which nano-vllm caches
    prompts = [torch.randint(3, 4096, (length,), generator=generator).tolist() for length in lens]
    prompts[1::4] = [shared + prompt[:200] for prompt in prompts[1::4]]
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), layers=args.layers)
        tokens, speed = serve(Path(folder), prompts, args.new_tokens, eager=args.eager)
        own_tokens, own_speed = serve_ours(Path(folder), prompts, args.new_tokens, eager=args.eager)
    gc.collect()
    torch.cuda.empty_cache()
    model = model.cuda().eval()
    model.set_attn_implementation("sdpa")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device="cuda")
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device="cuda")
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False)[:, width:]
    batch = Batch(ids, mask, args.new_tokens)
    logits = partial(reference_logits, model, batch, expected.cpu())
    theirs, ours = (compare(found, expected.cpu(), logits, NEAR_TIE) for found in (tokens, own_tokens))
    for name, per_second, agreement in (("nano-vllm", speed, theirs), ("gpu.serve", own_speed, ours)):
        print(f"{name}, {args.rows} rows: {per_second:.0f} tokens/s, {agreement.same_rows} equal, "
              f"{agreement.near_ties} near ties, {len(agreement.wrong)} wrong {agreement.wrong}; margins, in standard "
              f"deviations: {', '.join(f'{margin:.3f}' for margin in sorted(agreement.margins))}")
    if args.json:
        write_json(args.json, {"environment": environment(), "nano_vllm_commit": commit_of(args.source), "nano_vllm": {
            "rows": args.rows, "new_tokens": args.new_tokens, "tokens_per_s": speed, "ours_tokens_per_s": own_speed,
            "same_rows": theirs.same_rows, "near_ties": theirs.near_ties, "wrong": len(theirs.wrong)}})
    return 1 if theirs.wrong or ours.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
