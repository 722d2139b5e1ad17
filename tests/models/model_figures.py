"""What each of the reference configs holds: parameters, stored bytes, cache per token, written out by hand.

`parameters`: of the language model, without prediction heads and vision towers; unless a comment says otherwise the
count of Transformers 5.24's class for the config, built on PyTorch's meta device. `narrow`: (weights, bits) of what is
stored in less than 16 bits, scales included. `kv`: bytes per token, 16-bit caches, sliding layers whole. `state`: bytes
of one sequence whatever its length. `published`: (figure, value, source), met within 0.5 %.
"""
from __future__ import annotations

from dataclasses import dataclass

FP8_BLOCK = 8 + 32 / 128**2  # a float32 scale per block of 128 x 128
NVFP4, MXFP4, INT4, MXFP8 = 4 + 8 / 16, 4 + 8 / 32, 4 + 16 / 32, 8 + 8 / 32
INDEX = 128 + 4  # an FP8 key of 128 and a float32 scale

CARD = "https://huggingface.co/{}, model card"
HUB = "https://huggingface.co/{}, safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    parameters: int
    kv: float
    narrow: tuple[tuple[int, float], ...] = ()
    state: int = 0
    published: tuple[tuple[str, float, str], ...] = ()
    unstated: bool = False  # the name says a type of weights that no field does: counted in 16 bits, and a note says so


def parameters(value: float, source: str) -> tuple[tuple[str, float, str], ...]:
    return (("parameters", value, source),)


def gqa(hidden: int, q: int, kv: int) -> int:
    """Weights of a layer's projections: query, key, value, output widths."""
    return hidden * (2 * q + 2 * kv)


DEEPSEEK_ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
DEEPSEEK_V3 = Figures(
    parameters=671_026_404_352,
    narrow=((61 * DEEPSEEK_ATTENTION + 3 * 3 * 7168 * 18432 + 58 * 257 * 3 * 7168 * 2048, FP8_BLOCK),),
    kv=61 * 576 * 2,
    published=(
        ("parameters", 671e9, "https://github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md"),
        ("kv", 70_272, "arXiv 2505.09343, table 1"),
        ("active", 36.7e9, "https://github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md"),
        # The checkpoint holds the prediction head and copies of embedding and LM head for it.
        ("checkpoint", 688_586_727_753 - 2 * 2 * 129280 * 7168, "its model.safetensors.index.json"),
    ),
)
GLM_ATTENTION = 6144 * 2048 + 2048 * 64 * 256 + 6144 * 576 + 512 * 64 * 448 + 64 * 256 * 6144
GLM_INDEX = 32 * 128 * 2048 + 128 * 6144
GLM_MLP = 3 * 3 * 6144 * 12288 + 75 * 257 * 3 * 6144 * 2048
GLM_5 = Figures(
    parameters=743_911_199_232,
    narrow=((78 * (GLM_ATTENTION + GLM_INDEX) + GLM_MLP, FP8_BLOCK),),
    kv=78 * (576 * 2 + INDEX),
    published=parameters(744e9, "https://glennklockwood.com/garden/GLM-5, after the GLM-5 report's table"),
)
MINIMAX_M2 = Figures(
    parameters=228_689_748_992,
    narrow=((62 * (gqa(3072, 6144, 1024) + 256 * 3 * 3072 * 1536), FP8_BLOCK),),
    kv=62 * 2 * 8 * 128 * 2,
    published=parameters(229e9, HUB.format("MiniMaxAI/MiniMax-M2.5")),
)
KIMI_K2 = Figures(
    parameters=1_026_408_209_408, narrow=((60 * 384 * 3 * 7168 * 2048, INT4),), kv=61 * 576 * 2,
)  # fmt: skip
QWEN3_30B = 30_532_122_624
QWEN3_32B = 32_762_123_264
QWEN3_32B_LAYERS = 64 * (gqa(5120, 8192, 1024) + 3 * 5120 * 25600)
LLAMA_70B = Figures(
    parameters=70_553_706_496, kv=80 * 2 * 8 * 128 * 2,
    published=parameters(70.55e9, HUB.format("meta-llama/Llama-3.1-70B")),
)  # fmt: skip
# A delta net's state in float32 and three tokens of its convolution in BF16.
QWEN35_STATE = 64 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 64 * 128) * 2
QWEN35_27B_STATE = 48 * (48 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 48 * 128) * 2)
SUPER_STATE = 40 * (128 * 64 * 128 * 4 + 3 * (128 * 64 + 2 * 8 * 128) * 2)
ULTRA_STATE = 48 * (256 * 64 * 128 * 4 + 3 * (256 * 64 + 2 * 8 * 128) * 2)
SUPER = Figures(parameters=120_668_687_360, kv=8 * 2 * 2 * 128 * 2, state=SUPER_STATE, unstated=True)
ULTRA = Figures(
    parameters=549_308_968_960, kv=12 * 2 * 2 * 128 * 2, state=ULTRA_STATE, unstated=True,
    published=parameters(550e9, CARD.format("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4")),
)  # fmt: skip
QWEN3_235B = Figures(
    parameters=235_093_634_560, kv=94 * 2 * 4 * 128 * 2,
    published=parameters(235e9, "arXiv 2505.09388, table 2"),
)  # fmt: skip
# DeepSeek-V4: attention in FP8 but for the compressors' projections; open windows of key and gate in float32.
V4_FLASH_ATTENTION = 43 * (4096 * 1024 + 1024 * 64 * 512 + 4096 * 512 + 2 * 8 * 1024 * 4096) + 21 * 64 * 128 * 1024
V4_FLASH_EXPERTS, V4_FLASH_SHARED = 43 * 256 * 3 * 4096 * 2048, 43 * 3 * 4096 * 2048
V4_CSA_STATE = 2 * 4 * 2 * 2 * 512 * 4 + 2 * 4 * 2 * 2 * 128 * 4
V4_HCA_STATE = 128 * 2 * 512 * 4
V4_FLASH_KV = 21 * (512 * 2 + INDEX) / 4 + 20 * 512 * 2 / 128
V4_PRO_KV = 30 * (512 * 2 + INDEX) / 4 + 31 * 512 * 2 / 128
V4_KV_SOURCE = "https://provide.ai/the-exact-kv-cache-usage-of-deepseek-v4/ (FP16, 1M tokens)"
V4_FLASH = Figures(
    parameters=284_332_230_231, kv=V4_FLASH_KV, state=21 * V4_CSA_STATE + 20 * V4_HCA_STATE,
    narrow=((V4_FLASH_ATTENTION + V4_FLASH_SHARED, 8.0), (V4_FLASH_EXPERTS, MXFP4)),
    published=(
        ("parameters", 284e9, CARD.format("deepseek-ai/DeepSeek-V4-Flash")),
        ("kv", 6.08 * 2**30 / 2**20, V4_KV_SOURCE),
        ("weight_bytes", 156.1e9, "https://huggingface.co/6ms/DeepSeek-V4-Flash-MXFP4-GGUF, the source's own types"),
    ),
)  # fmt: skip
V4_PRO_LAYER = 7168 * 1536 + 1536 * 128 * 512 + 7168 * 512 + 16 * 1024 * 4096 + 7168 * 16384 + 385 * 3 * 7168 * 3072
# Kimi K3: 69 delta and 24 latent layers, the first with a dense MLP; widths of the checkpoint's own tensors.
K3_KDA = 5 * 7168 * 12288 + 7168 * 128 + 128 * 12288 + 96 * 7168 + 3 * 12288 * 4 + 12288 + 96 + 128
K3_MLA = (
    7168 * 1536 + 1536 + 1536 * 96 * 192 + 7168 * 576 + 512 + 512 * 96 * 256 + 2 * 7168 * 96 * 128
)
K3_MOE = 896 * 3 * 3584 * 3072 + 896 * 7168 + 2 * 7168 * 3584 + 3584 + 3 * 7168 * 6144
K3 = 69 * K3_KDA + 24 * K3_MLA + 92 * K3_MOE + 3 * 7168 * 33792 + 93 * 6 * 7168 + 7168 + 2 * 163840 * 7168
M3_ATTENTION = 60 * gqa(6144, 8192, 512) + 57 * 6144 * (4 + 1) * 128

FIGURES: dict[str, Figures] = {
    "MiniMaxAI--MiniMax-M2.5": MINIMAX_M2,
    "MiniMaxAI--MiniMax-M2.7": MINIMAX_M2,
    "Qwen--Qwen3-0.6B": Figures(parameters=596_049_920, kv=28 * 2 * 8 * 128 * 2),
    "Qwen--Qwen3-1.7B": Figures(parameters=1_720_574_976, kv=28 * 2 * 8 * 128 * 2),
    "Qwen--Qwen3-235B-A22B": QWEN3_235B,
    "Qwen--Qwen3-30B-A3B-FP8": Figures(
        parameters=QWEN3_30B, kv=48 * 2 * 4 * 128 * 2,
        narrow=((48 * (gqa(2048, 4096, 512) + 128 * 3 * 2048 * 768), FP8_BLOCK),),
        published=parameters(30.5e9, CARD.format("Qwen/Qwen3-30B-A3B")),
    ),
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": Figures(
        parameters=QWEN3_32B, kv=64 * 2 * 8 * 128 * 2, narrow=((QWEN3_32B_LAYERS, 8),),
        published=parameters(32.8e9, CARD.format("Qwen/Qwen3-32B")),
    ),
    "Qwen--Qwen3-32B-FP8": Figures(
        parameters=QWEN3_32B, kv=64 * 2 * 8 * 128 * 2, narrow=((QWEN3_32B_LAYERS, FP8_BLOCK),),
        published=parameters(32.8e9, CARD.format("Qwen/Qwen3-32B")),
    ),
    "Qwen--Qwen3-8B": Figures(
        parameters=8_190_735_360, kv=36 * 2 * 8 * 128 * 2, published=parameters(8.19e9, HUB.format("Qwen/Qwen3-8B"))
    ),
    "Qwen--Qwen3-Coder-480B-A35B-Instruct": Figures(
        parameters=480_154_875_392, kv=62 * 2 * 8 * 128 * 2,
        published=parameters(480e9, CARD.format("Qwen/Qwen3-Coder-480B-A35B-Instruct")),
    ),
    "Qwen--Qwen3-VL-2B-Instruct": Figures(parameters=1_720_574_976, kv=28 * 2 * 8 * 128 * 2),
    "Qwen--Qwen3-VL-30B-A3B-Instruct": Figures(parameters=QWEN3_30B, kv=48 * 2 * 4 * 128 * 2),
    "Qwen--Qwen3-VL-32B-Thinking": Figures(parameters=QWEN3_32B, kv=64 * 2 * 8 * 128 * 2),
    "Qwen--Qwen3-VL-4B-Instruct": Figures(parameters=4_022_468_096, kv=36 * 2 * 8 * 128 * 2),
    "Qwen--Qwen3.5-122B-A10B": Figures(
        parameters=122_111_526_912, kv=12 * 2 * 2 * 256 * 2, state=36 * QWEN35_STATE,
        published=parameters(122e9, CARD.format("Qwen/Qwen3.5-122B-A10B")),
    ),
    "Qwen--Qwen3.5-27B": Figures(
        parameters=26_895_998_464, kv=16 * 2 * 4 * 256 * 2, state=QWEN35_27B_STATE,
        published=parameters(27e9, CARD.format("Qwen/Qwen3.5-27B")),
    ),
    "Qwen--Qwen3.5-397B-A17B": Figures(
        parameters=396_346_350_336, kv=15 * 2 * 2 * 256 * 2, state=45 * QWEN35_STATE,
        published=parameters(397e9, CARD.format("Qwen/Qwen3.5-397B-A17B")),
    ),
    # Transformers' Qwen2 on the same sizes; the prediction head is counted apart.
    "XiaomiMiMo--MiMo-7B-Base": Figures(parameters=7_622_619_136, kv=36 * 2 * 8 * 128 * 2),
    "blis--codellama-34b-instruct-hf": Figures(
        parameters=33_743_970_304, kv=48 * 2 * 8 * 128 * 2,
        published=parameters(33.7e9, HUB.format("codellama/CodeLlama-34b-Instruct-hf")),
    ),
    "blis--deepseek-v2-lite": Figures(
        parameters=15_706_484_224, kv=27 * 576 * 2,
        published=parameters(15.7e9, CARD.format("deepseek-ai/DeepSeek-V2-Lite")),
    ),
    "blis--llama-2-7b-hf": Figures(
        parameters=6_738_415_616, kv=32 * 2 * 32 * 128 * 2,
        published=parameters(6.74e9, HUB.format("meta-llama/Llama-2-7b-hf")),
    ),
    "blis--llama-3.1-70b-instruct": LLAMA_70B,
    "blis--llama-4-scout-17b-16e-instruct-fp8-dynamic": Figures(
        parameters=107_769_861_120, kv=48 * 2 * 8 * 128 * 2, narrow=((48 * 17 * 3 * 5120 * 8192, 8 + 32 / 5120),)
    ),
    "blis--mistral-nemo-instruct-2407": Figures(
        parameters=12_247_782_400, kv=40 * 2 * 8 * 128 * 2,
        published=parameters(12.25e9, HUB.format("mistralai/Mistral-Nemo-Instruct-2407")),
    ),
    "blis--qwen2.5-7b-instruct": Figures(
        parameters=7_615_616_512, kv=28 * 2 * 4 * 128 * 2,
        published=parameters(7.61e9, CARD.format("Qwen/Qwen2.5-7B-Instruct")),
    ),
    "blis--qwen3-14b": Figures(
        parameters=14_768_307_200, kv=40 * 2 * 8 * 128 * 2,
        published=parameters(14.8e9, CARD.format("Qwen/Qwen3-14B")),
    ),
    "blis--yi-34b": Figures(
        parameters=34_388_917_248, kv=60 * 2 * 8 * 128 * 2, published=parameters(34.4e9, HUB.format("01-ai/Yi-34B"))
    ),
    "deepseek-ai--DeepSeek-R1": DEEPSEEK_V3,
    "deepseek-ai--DeepSeek-V3": DEEPSEEK_V3,
    "deepseek-ai--DeepSeek-V4-Flash": V4_FLASH,
    "google--gemma-4-26B-A4B": Figures(
        parameters=25_233_141_760, kv=(25 * 2 * 8 * 256 + 5 * 2 * 2 * 512) * 2,
        published=(
            ("parameters", 25.2e9, CARD.format("google/gemma-4-26B-A4B")),
            ("active", 3.8e9, CARD.format("google/gemma-4-26B-A4B")),
        ),
    ),
    "meta-llama--Llama-4-Maverick-17B-128E-Instruct": Figures(
        parameters=400_711_848_960, kv=48 * 2 * 8 * 128 * 2,
        published=parameters(400e9, CARD.format("meta-llama/Llama-4-Maverick-17B-128E-Instruct")),
    ),
    "meta-llama--Meta-Llama-3.1-405B": Figures(
        parameters=405_853_388_800, kv=126 * 2 * 8 * 128 * 2,
        published=(
            ("parameters", 405e9, "arXiv 2407.21783"),
            ("kv", 516_096, "arXiv 2505.09343, table 1"),
        ),
    ),
    "meta-llama--Meta-Llama-3.1-70B": LLAMA_70B,
    "mistralai--Mixtral-8x22B-v0.1": Figures(
        parameters=140_620_634_112, kv=56 * 2 * 8 * 128 * 2,
        published=parameters(141e9, "https://mistral.ai/news/mixtral-8x22b"),
    ),
    "mistralai--Mixtral-8x7B-v0.1": Figures(
        parameters=46_702_792_704, kv=32 * 2 * 8 * 128 * 2,
        published=parameters(46.7e9, "https://mistral.ai/news/mixtral-of-experts"),
    ),
    "moonshotai--Kimi-K2.5": KIMI_K2,
    "moonshotai--Kimi-K3": Figures(
        parameters=K3, kv=24 * 576 * 2, narrow=((92 * 896 * 3 * 3584 * 3072, MXFP4),),
        state=69 * (96 * 128 * 128 * 4 + 3 * 3 * 96 * 128 * 2),
    ),
    "nvidia--DeepSeek-V3.2-NVFP4": Figures(
        parameters=671_877_929_216, kv=61 * (576 * 2 + INDEX), unstated=True
    ),
    "nvidia--DeepSeek-V4-Flash-NVFP4": Figures(
        parameters=284_332_230_231, kv=V4_FLASH_KV, state=V4_FLASH.state,
        narrow=((V4_FLASH_ATTENTION + V4_FLASH_SHARED, 8.0), (V4_FLASH_EXPERTS, NVFP4)),
        published=parameters(284e9, CARD.format("deepseek-ai/DeepSeek-V4-Flash")),
    ),
    "nvidia--GLM-5-NVFP4": Figures(parameters=743_911_199_232, kv=GLM_5.kv, unstated=True, published=GLM_5.published),
    "nvidia--GLM-5.1-NVFP4": Figures(
        parameters=743_911_199_232, kv=GLM_5.kv, narrow=((75 * 256 * 3 * 6144 * 2048, NVFP4),),
        published=GLM_5.published,
    ),
    "nvidia--Gemma-4-26B-A4B-NVFP4": Figures(
        parameters=25_233_141_760, kv=(25 * 2 * 8 * 256 + 5 * 2 * 2 * 512) * 2,
        narrow=((30 * 128 * 3 * 2816 * 704, NVFP4),),
        published=parameters(25.2e9, CARD.format("google/gemma-4-26B-A4B")),
    ),
    "nvidia--Gemma-4-31B-IT-NVFP4": Figures(
        parameters=30_697_345_280, kv=(50 * 2 * 16 * 256 + 10 * 2 * 4 * 512) * 2,
        narrow=((60 * 3 * 5376 * 21504, NVFP4),),
        published=parameters(30.7e9, CARD.format("google/gemma-4-31B")),
    ),
    "nvidia--Kimi-K2.6-NVFP4": KIMI_K2,  # NVFP4 takes as many bits as INT4 in groups of 32
    "nvidia--Kimi-K2.7-Code-NVFP4": KIMI_K2,
    # By the sum over its block_configs in modeling_decilm.py's rounding; 49 of 80 layers have attention.
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1": Figures(
        parameters=49_867_145_216, kv=49 * 2 * 8 * 128 * 2,
        published=parameters(49.9e9, HUB.format("nvidia/Llama-3_3-Nemotron-Super-49B-v1")),
    ),
    "nvidia--MiniMax-M2.5-NVFP4": Figures(
        parameters=228_689_748_992, kv=62 * 2 * 8 * 128 * 2, narrow=((62 * 256 * 3 * 3072 * 1536, NVFP4),),
        published=MINIMAX_M2.published,
    ),
    "nvidia--MiniMax-M3-NVFP4": Figures(
        parameters=426_174_565_632, kv=60 * 2 * 4 * 128 * 2 + 57 * 128 * 2,
        narrow=(
            (57 * 128 * 3 * 6144 * 3072, NVFP4),
            (M3_ATTENTION + 3 * 3 * 6144 * 12288 + 57 * 3 * 6144 * 3072, MXFP8),
        ),
        published=parameters(428e9, CARD.format("MiniMaxAI/MiniMax-M3") + " (vision of 0.87 B included)"),
    ),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Figures(
        parameters=31_577_937_344, kv=6 * 2 * 2 * 128 * 2,
        state=23 * (64 * 64 * 128 * 4 + 3 * (64 * 64 + 2 * 8 * 128) * 2),
        published=parameters(31.6e9, HUB.format("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")),
    ),
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8": SUPER,
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": SUPER,
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8": ULTRA,
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4": ULTRA,
    "nvidia--Nemotron-H-56B-Base-8K": Figures(
        parameters=56_324_350_464, kv=10 * 2 * 8 * 128 * 2,
        state=54 * (256 * 64 * 256 * 2 + 3 * (256 * 64 + 2 * 8 * 256) * 2),
    ),
    "nvidia--Qwen3-235B-A22B-NVFP4": Figures(
        parameters=235_093_634_560, kv=94 * 2 * 4 * 128 * 2, unstated=True, published=QWEN3_235B.published
    ),
    "nvidia--Qwen3.5-397B-A17B-NVFP4": Figures(
        parameters=396_346_350_336, kv=15 * 2 * 2 * 256 * 2, state=45 * QWEN35_STATE,
        narrow=((60 * 512 * 3 * 4096 * 1024, NVFP4),),
        published=parameters(397e9, CARD.format("nvidia/Qwen3.5-397B-A17B-NVFP4")),
    ),
    "nvidia--Qwen3.6-27B-NVFP4": Figures(
        parameters=26_895_998_464, kv=16 * 2 * 4 * 256 * 2, state=QWEN35_27B_STATE,
        narrow=(
            (64 * 3 * 5120 * 17408 + 248320 * 5120, NVFP4),
            (48 * 5120 * (10240 + 2 * 6144) + 16 * 5120 * (12288 + 2 * 1024 + 6144), 8),
        ),
        published=parameters(27e9, CARD.format("Qwen/Qwen3.6-27B")),
    ),
    "openai--gpt-oss-120b": Figures(
        parameters=116_829_156_672, kv=36 * 2 * 8 * 64 * 2, narrow=((36 * 128 * 3 * 2880 * 2880, MXFP4),),
        published=(
            ("parameters", 116.83e9, "arXiv 2508.10925, table 1"),
            ("active", 5.13e9, "arXiv 2508.10925, table 1"),
            ("weight_bytes", 60.8 * 2**30, "arXiv 2508.10925, table 1"),
        ),
    ),
    "openai--gpt-oss-20b": Figures(
        parameters=20_914_757_184, kv=24 * 2 * 8 * 64 * 2, narrow=((24 * 32 * 3 * 2880 * 2880, MXFP4),),
        published=(
            ("parameters", 20.91e9, "arXiv 2508.10925, table 1"),
            ("active", 3.61e9, "arXiv 2508.10925, table 1"),
            ("weight_bytes", 12.8 * 2**30, "arXiv 2508.10925, table 1"),
        ),
    ),
    "sgl-project--DeepSeek-V4-Pro-FP8": Figures(
        parameters=1_572_997_179_491, kv=V4_PRO_KV, state=30 * V4_CSA_STATE + 31 * V4_HCA_STATE,
        narrow=((61 * V4_PRO_LAYER + 30 * 64 * 128 * 1536, FP8_BLOCK),),
        published=(
            ("kv", 8.71 * 2**30 / 2**20, V4_KV_SOURCE),
            ("active", 49e9, CARD.format("deepseek-ai/DeepSeek-V4-Pro")),
        ),
    ),
    # As this config says it, all matrices in FP8; the published checkpoint excepts attention, which the file omits.
    "stepfun-ai--Step-3.7-Flash-FP8": Figures(
        parameters=195_845_000_000, kv=45 * 2 * 8 * 128 * 2,
        narrow=(
            (45 * (gqa(4096, 8192, 1024) + 64 * 4096) + 3 * 3 * 4096 * 11264 + 42 * 289 * 3 * 4096 * 1280, FP8_BLOCK),
        ),
        published=parameters(196e9, "https://recipes.vllm.ai, stepfun-ai/Step-3.7-Flash: language backbone"),
    ),
    "zai-org--GLM-5-FP8": GLM_5,
    "zai-org--GLM-5.1-FP8": GLM_5,
    "zai-org--GLM-5.2-FP8": Figures(
        parameters=743_377_000_704, kv=78 * 576 * 2 + 21 * INDEX,
        narrow=((78 * GLM_ATTENTION + 21 * GLM_INDEX + GLM_MLP, FP8_BLOCK),),
    ),
    "zai-org--GLM-5.2": Figures(
        parameters=743_377_000_704, kv=78 * 576 * 2 + 21 * INDEX,
        published=(
            ("checkpoint", 1507e9, "https://huggingface.co/Mapika/GLM-5.2-NVFP4, model card: with prediction head"),
        ),
    ),
}  # fmt: skip
