"""One program that runs a text decoder, in a process of its own, timed on request: ours, or one that we compare with.

`python -m apps.bench.peer PROGRAM MODEL THREADS CONTEXT EXTRA` says that it is ready, then answers each line of JSON on
stdin with one on stdout. What is timed begins with token ids and ends with the likeliest next ones. The programs that
we compare with belong to no extra: they are used where a person has installed them.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quant.comparison.resident import resident


class Program(Protocol):
    """A decoder with a cache."""

    def read(self, ids: list[int]) -> int:
        """Read ids behind what is in the cache, and return the likeliest token behind them."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        ...


class EdgeOmni:
    def __init__(self, model: Path, threads: int, context: int, cache: Path):
        from runtime.engine import Engine
        from runtime.session import Options

        engine = Engine(model, Options(threads=threads, prepack_cache=cache))
        self.context, self.lm_head = engine.context(), engine.session("lm_head")

    def read(self, ids: list[int]) -> int:
        from runtime.prompt import Prompt

        nothing = np.empty((0, 0))
        self.context.append(Prompt(np.array(ids), nothing.astype(np.int64), nothing.astype(np.float32)))
        return int(self.lm_head.run(hidden=self.context.hidden())["logits"][0].argmax())

    def rewind(self, length: int) -> None:
        self.context.truncate(length)


class LlamaCpp:
    """By its C interface, which costs less than the Python class around it."""

    def __init__(self, model: Path, threads: int, context: int):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        self.quiet = quiet  # which the library calls later on
        self.model = llama_cpp.llama_model_load_from_file(bytes(model), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, context, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.context, f"llama.cpp cannot open {model}"
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def read(self, ids: list[int]) -> int:
        tokens = (self.lib.llama_token * len(ids))(*ids)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        assert status == 0, f"llama_decode returned {status}"
        scores = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(scores, (self.vocab_size,)).argmax())

    def rewind(self, length: int) -> None:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, length, -1)


class OnnxRuntimeGenAI:
    def __init__(self, model: Path, threads: int, context: int):
        import onnxruntime_genai  # pyright: ignore[reportMissingImports]

        onnxruntime_genai.disable_telemetry_events()
        config = onnxruntime_genai.Config(str(model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        opened = onnxruntime_genai.Model(config)
        settings = onnxruntime_genai.GeneratorParams(opened)
        settings.set_search_options(max_length=context, do_sample=False)
        self.generator, self.chosen = onnxruntime_genai.Generator(opened, settings), -1

    def read(self, ids: list[int]) -> int:
        """What it chose last it reads by itself when it chooses the next."""
        if ids != [self.chosen]:
            self.generator.append_tokens(np.array(ids, np.int32))
        self.generator.generate_next_token()
        self.chosen = int(self.generator.get_next_tokens()[0])
        return self.chosen

    def rewind(self, length: int) -> None:
        self.chosen = -1
        self.generator.rewind_to(length)


class Transformers:
    def __init__(self, model: Path, threads: int, context: int, dtype: str):
        import torch

        torch.set_num_threads(threads)
        from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

        from apps.bench.transformers_model import load

        self.torch, self.new_cache = torch, DynamicCache
        self.model = load(model, getattr(torch, dtype))
        self.cache = self.new_cache()

    def read(self, ids: list[int]) -> int:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def rewind(self, length: int) -> None:
        if length:
            self.cache.crop(length - self.cache.get_seq_length())  # so many fewer
        else:
            self.cache = self.new_cache()


def open_program(name: str, model: Path, threads: int, context: int, extra: str) -> Program:
    """`extra` is the cache of our packed weights, or the type that transformers computes in."""
    match name:
        case "edgeomni":
            return EdgeOmni(model, threads, context, Path(extra))
        case "llama.cpp":
            return LlamaCpp(model, threads, context)
        case "onnxruntime-genai":
            return OnnxRuntimeGenAI(model, threads, context)
        case "transformers":
            return Transformers(model, threads, context, extra)
    raise ValueError(name)


def answer(program: Program, rewind: int, ids: list[int], count: int) -> dict[str, Any]:
    """Rewind, then, timed, read ids and generate `count` tokens, of which reading gives the first."""
    program.rewind(rewind)
    wall, processor = time.perf_counter(), time.process_time()
    tokens = [program.read(ids)]
    while len(tokens) < count:
        tokens.append(program.read([tokens[-1]]))
    seconds = time.perf_counter() - wall, time.process_time() - processor
    return {"wall_ms": 1e3 * seconds[0], "cpu_ms": 1e3 * seconds[1], "tokens": tokens, "memory": resident()}


def serve(name: str, model: str, threads: str, context: str, extra: str) -> None:
    program = open_program(name, Path(model), int(threads), int(context), extra)
    replies = os.fdopen(os.dup(1), "w")  # libraries may print on stdout
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(program, **json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
