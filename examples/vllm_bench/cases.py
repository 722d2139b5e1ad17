"""What bench_vllm measures: shapes, in groups that one prefill serves, and the model and processes they run on."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Prompt lengths of the first 32 requests of Azure's code trace (AzureLLMInferenceTrace_code.csv, November 2023,
# https://github.com/Azure/AzurePublicDataset, CC-BY).
AZURE = (4808, 3180, 110, 7433, 34, 374, 6985, 34, 1145, 201, 137, 7427, 1555, 3893, 1827, 394, 675, 7436, 158, 6587,
         763, 1556, 5108, 159, 458, 2464, 4009, 1632, 2567, 730, 5108, 2569)

# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "initializer_range": 0.02, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
# The shape of the model that --check makes; its weights are drawn so that logits differ well beyond rounding.
SMALL = {key: value for key, value in LLAMA_8B.items() if key != "rope_scaling"} | {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 8192,
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One line of the table: so many rows of the group's prompts, the first ones, decode."""

    name: str
    rows: int
    reference_ms: float | None = None  # FlashAttention 3 of vLLM 0.24.0 on an H200, before this backend


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that are prefilled once, and the shapes measured on them: each drops rows of the one before it."""

    name: str
    prompts: tuple[int, ...]  # tokens of each
    shapes: tuple[Shape, ...]
    shared_tokens: int = 0  # of those the first ones, which are the same in all prompts


GROUPS = (
    Group("1.2K", (1100,) * 128, (Shape("128 x 1.2K", 128, 10.95), Shape("32 x 1.2K", 32, 6.39),
                                  Shape("8 x 1.2K", 8, 5.27), Shape("1 x 1.2K", 1, 4.91))),
    Group("32.8K", (32700,) * 8, (Shape("8 x 32.8K", 8, 12.9), Shape("6 x 32.8K", 6, 13.1),
                                  Shape("4 x 32.8K", 4, 8.89))),
    Group("azure", AZURE, (Shape("32 x azure", 32),)),
    Group("8.3K", (8250,) * 32, (Shape("32 x 8.3K", 32, 13.2), Shape("8 x 8.3K", 8, 7.00))),
    Group("120K", (120000,), (Shape("1 x 120K", 1, 8.60),)),
)
# Of engines with prefix caching, whose rows then have the same blocks; and as long rows that share nothing.
SHARED_GROUPS = (
    Group("8K shared", (8704,) * 32, (Shape("32 x (8K shared + 512)", 32), Shape("16 x (8K shared + 512)", 16)), 8192),
    Group("8K apart", (8704,) * 32, (Shape("32 x 8.7K apart", 32), Shape("16 x 8.7K apart", 16))),
)
BLOCK_TOKENS = 16  # vLLM's default
CAPTURED = (1, 2, 4, *range(8, 129, 8))  # batch sizes of CUDA graphs: vLLM's own, up to our largest
CAPTURED_FOR_TOKENS = (1, 2, 4, 8, 16)  # enough for the rows of --check
CAPTURED_FOR_SHARED = (1, 2, 4, 8, 16, 24, 32)  # and of SHARED_GROUPS
KV_BYTES = 100 << 30  # of the cache: what the 11 served cases need, most of it for 16 x 32.8K
KV_BYTES_FOR_TOKENS = 2 << 30  # so that engines that are compared start side by side
KV_BYTES_FOR_MIX = 24 << 30  # so little that a mix of lengths has rows preempted


def label(backend: str, kv_cache_dtype: str = "auto", *, vllm_append: bool = False, shared_prefixes: bool = False,
          cascade: bool = False) -> str:
    """What an engine is called in tables and lines."""
    own = backend if kv_cache_dtype == "auto" else f"{backend} {kv_cache_dtype}"
    return own + " vLLM's append" * vllm_append + " shared prefixes" * shared_prefixes + " cascade" * cascade


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does: one backend with one type of cache, its model, and where results go.

    Times are those of time.monotonic(), which processes of a machine share.
    """

    backend: str
    kv_cache_dtype: str
    model: str
    results: str  # JSON, written anew after every shape, case and check
    groups: tuple[str, ...] = ()
    steps: int = 60
    until: float = math.inf  # the time after which nothing more is begun
    limit_s: float = math.inf  # from its start on, after which nothing more is begun either
    eager: bool = False
    tokens: bool = False  # greedy tokens and log-probabilities in place of times
    requests: str = ""  # a CSV file of requests, served after the groups
    cases: tuple[str, ...] = ()  # of that file
    cases_until: float = math.inf  # the time after which no case is begun
    mix_s: float = 0.0  # seconds of requests of drawn lengths, after everything else
    seed: int = 0  # of these
    kv_bytes: int = KV_BYTES  # of the cache
    vllm_append: bool = False  # CUSTOM with vLLM's kernel that stores keys and values, also in captured steps
    prefix_caching: bool = False
    shared_prefixes: bool = False  # CUSTOM with the option that reads them once
    cascade: bool = False  # FLASH_ATTN with vLLM's cascade attention allowed, on the one runner of vLLM that has it
    plain: bool = False  # an engine that starts as vLLM starts it, in a new process
    grace_s: float = 25.0  # to end after `until`, before the job is killed
    title: str = ""  # of a model that is not Llama-3.1-8B's shape

    @property
    def name(self) -> str:
        own = label(self.backend, self.kv_cache_dtype, vllm_append=self.vllm_append,
                    shared_prefixes=self.shared_prefixes, cascade=self.cascade)
        return f"{self.title} {own}" if self.title else own

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        given = json.loads(path.read_text())
        return cls(**given | {name: tuple(given[name]) for name in ("groups", "cases")})


def write_model(folder: Path, config: Mapping[str, object]) -> Path:
    """A folder with a config.json and nothing else, which vLLM fills with dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_plugin(folder: Path) -> Path:
    """A folder that, on PYTHONPATH, makes every Python process see our entry point as an installed one.

    importlib.metadata reads entry points of every *.dist-info beside the packages of sys.path, so that vLLM's own
    start of its plug-ins finds it in each process, whether spawned or forked.
    """
    info = folder / "persistentkv_working_tree-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: persistentkv-working-tree\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\npersistentkv = gpu.drop_ins.vllm.plugin:register\n")
    return folder


def environment(plugin: Path) -> dict[str, str]:
    """Environment variables of processes that measure: offline, engines in the process, the working tree's packages."""
    path = [str(plugin), str(ROOT), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
             "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
             "FLASHINFER_DISABLE_VERSION_CHECK": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return quiet | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def engine_arguments(job: Job) -> dict[str, object]:
    """Arguments of vllm.LLM for a job.

    The cache's bytes are given, so that no engine measures a GPU's memory while another process uses it.
    """
    given: dict[str, object] = {
        "model": job.model, "skip_tokenizer_init": True, "enable_prefix_caching": job.prefix_caching, "seed": 0,
        "attention_backend": job.backend, "kv_cache_dtype": job.kv_cache_dtype, "dtype": "bfloat16",
        "max_num_batched_tokens": 2048, "max_num_seqs": 256, "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": job.kv_bytes, "enforce_eager": job.eager,
        "load_format": "auto" if job.tokens else "dummy", "kernel_config": {"enable_flashinfer_autotune": False},
    }
    if job.tokens:
        given |= {"max_logprobs": 20, "gpu_memory_utilization": 0.02, "max_num_seqs": max(CAPTURED_FOR_TOKENS)}
    if job.shared_prefixes:
        given["additional_config"] = {"persistentkv": {"shared_prefixes": True}}
    if job.cascade:
        given["disable_cascade_attn"] = False
    if not job.eager:
        sizes = CAPTURED_FOR_TOKENS if job.tokens else CAPTURED_FOR_SHARED if job.prefix_caching else CAPTURED
        given["compilation_config"] = {"cudagraph_capture_sizes": list(sizes)}
    if job.backend == "FLASHINFER":
        given["dtype"] = "float16"
    return given
