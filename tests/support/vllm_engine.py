"""What bench_vllm's processes use of vLLM, without vLLM: an engine that hands out tokens and computes nothing.

The folder of a model says what goes wrong: `fails` does not start, `hangs` never does, `short` ends requests a token
early, `silent` cannot be asked for tokens, and `uncached` gives every row blocks of its own. Of backend CUSTOM alone,
`swaps` takes a token that is less likely by 1.0, and `off` is off by 0.5 in every log-probability.
"""
from __future__ import annotations

import json
import time
import types
from collections import deque
from pathlib import Path
from types import SimpleNamespace

from paths import ROOT


class Engine:
    """vllm.LLMEngine with asynchronous scheduling: outputs come a step late, and prompts are prefilled in chunks."""

    def __init__(self, model: str = "model", most_tokens: int = 131_072) -> None:
        self.left, self.owed, self.queue = {}, {}, deque()
        self.most_tokens, self.short, self.caches = most_tokens, model == "short", model != "uncached"
        self.prompts: dict[str, list[int]] = {}
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=Scheduler(self)))
        self.layer = SimpleNamespace(impl=SimpleNamespace(forward=lambda *args, **kwargs: kwargs["output"]))
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(async_scheduling=True),
            compilation_config=SimpleNamespace(cudagraph_mode="FULL_AND_PIECEWISE",
                                               static_forward_context={"layer": self.layer}))

    def add_request(self, row: str, prompt: dict, params: SimpleNamespace) -> None:
        assert row not in self.left and min(prompt["prompt_token_ids"]) >= 0
        assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.most_tokens
        self.prompts[row] = prompt["prompt_token_ids"]
        self.left[row], self.owed[row] = len(prompt["prompt_token_ids"]), params.max_tokens - self.short

    def abort_request(self, rows: list[str]) -> None:
        for row in rows:
            self.left.pop(row, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list:
        room, made = 2048, []
        for row, left in self.left.items():
            taken = min(left, room) if left else 1
            room -= taken
            self.left[row] -= taken if left else 0
            if not self.left[row] and taken and self.owed[row]:
                self.owed[row] -= 1
                made.append((row, not self.owed[row]))
        self.queue.append(made)
        if len(self.queue) < 2:
            return []
        made = [(row, last) for row, last in self.queue.popleft() if row in self.left]
        for row, last in made:
            if last:
                del self.left[row]
        return [SimpleNamespace(request_id=row, finished=last, outputs=[SimpleNamespace(token_ids=[7])])
                for row, last in made]


class Scheduler:
    """What is read of an engine's: running requests, and the ids of their blocks of 16 tokens, equal where all tokens
    up to a block's end are."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.kv_cache_manager = engine, self

    @property
    def running(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(request_id=row) for row in self.engine.left]

    def get_block_ids(self, row: str) -> tuple[list[int]]:
        ids, tokens = [0 if self.engine.caches else hash(row)], self.engine.prompts[row]
        for begin in range(0, len(tokens), 16):
            ids.append(hash((ids[-1], *tokens[begin:begin + 16])))
        return (ids[1:],)


class LLM:
    def __init__(self, *, model: str, **given: object) -> None:
        self.model = Path(model).name
        self.ours = given.get("attention_backend") == "CUSTOM"
        if self.model == "fails":
            raise ValueError("no kernel image is available")
        if self.model == "hangs":
            time.sleep(60)
        self.llm_engine = Engine(self.model)

    def generate(self, prompts: list[dict], params: SimpleNamespace) -> list[SimpleNamespace]:
        if self.model == "silent":
            raise RuntimeError("engine is dead")
        off = 0.5 * (self.ours and self.model == "off")
        places = [{7: SimpleNamespace(logprob=-0.4 - off), 8: SimpleNamespace(logprob=-1.4 - off)}] * params.max_tokens
        tokens = [7] * params.max_tokens
        if self.ours and self.model == "swaps":
            tokens[5] = 8
        one = SimpleNamespace(token_ids=tokens, logprobs=places)
        return [SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[one]) for prompt in prompts]


def modules() -> dict[str, types.ModuleType]:
    """vLLM's modules by name, with what bench_vllm reads and replaces."""
    own = {
        "vllm": {"LLM": LLM, "SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
        "vllm.config": {"AttentionConfig": type("AttentionConfig", (), {}), "CacheConfig": type("CacheConfig", (), {}),
                        "VllmConfig": type("VllmConfig", (), {"compute_hash": lambda self: str(self.additional_config),
                                                              "use_v2_model_runner": True})},
        "vllm.model_executor": {}, "vllm.model_executor.models": {},
        "vllm.model_executor.models.registry": {"_LazyRegisteredModel": type("Lazy", (), {})},
        "vllm.v1": {}, "vllm.v1.worker": {}, "vllm.v1.worker.gpu_worker": {"warmup_kernels": lambda *args: None},
    }
    made = {name: types.ModuleType(name) for name in own}
    for name, members in own.items():
        vars(made[name]).update(members)
        above, _, last = name.rpartition(".")
        if above:
            setattr(made[above], last, made[name])
    return made


def write_packages(folder: Path) -> Path:
    """A folder whose `vllm` is this module's, and whose `torch` sees no GPU: what new processes import."""
    texts = {"vllm": "import sys, vllm_engine\nmade = vllm_engine.modules()\nvars(sys.modules['vllm']).update("
                     "{k: v for k, v in vars(made.pop('vllm')).items() if k[:2] != '__'})\nsys.modules.update(made)\n",
             "torch": "class cuda:\n    is_available = staticmethod(lambda: False)\n"}
    for name, text in texts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


def python_path(folder: Path) -> str:
    return f"{write_packages(folder)}:{ROOT / 'tests' / 'support'}"


def write_checked_model(folder: Path) -> Path:
    """A folder that the tokens of `LLM.generate` can be asked of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 4096}))
    return folder
