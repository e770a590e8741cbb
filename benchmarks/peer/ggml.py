"""llama.cpp and ik_llama.cpp by their C functions, without the Python classes above them.

A step is one `llama_decode` and NumPy's argmax over the engine's own buffer of logits; nothing is copied. The two
libraries' functions differ in a few places, which stand in two subclasses.
"""

import ctypes
import importlib
import json
import time
from typing import Any

import numpy as np

from peer.serve import Engine, serve

ROOM = 8  # tokens of the cache behind the last one


class Ggml(Engine):
    """Either library; a model and a context for decoding and for prompts, or one of each where settings agree."""

    module: str

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.c = importlib.import_module(self.module)
        self.library()
        self.c.llama_backend_init()
        self.file = config["file"].encode()
        self._models: dict[str, Any] = {}
        self._contexts: dict[str, Any] = {}
        self._decoding, self._reading = (self._context(self.settings[name]) for name in ("decode", "prompt"))
        first = self._array(self.context)
        self._one = self._array([0])
        self.forget(self._decoding, 0)
        self._run(self._decoding, first, 0)
        self._first = self._best(self._decoding)

    def library(self) -> None:
        """Declare what the bindings leave out."""

    def model_options(self, settings: dict[str, Any]) -> Any:
        """Those of a model."""
        raise NotImplementedError

    def context_options(self, settings: dict[str, Any]) -> Any:
        """Those of a context."""
        raise NotImplementedError

    def batch(self, tokens: Any, position: int) -> Any:
        """A batch of one sequence's tokens from a position on."""
        raise NotImplementedError

    def forget(self, context: Any, position: int) -> None:
        """Drop what the cache holds from a position on."""
        raise NotImplementedError

    def decode(self) -> tuple[float, list[int]]:
        self.forget(self._decoding, len(self.context))
        tokens, started = [self._first], 0.0
        for step in range(self.warm + self.steps):
            if step == self.warm:
                started = time.perf_counter()
            self._one[0] = tokens[-1]
            self._run(self._decoding, self._one, len(self.context) + step)
            tokens.append(self._best(self._decoding))
        return time.perf_counter() - started, tokens

    def read(self) -> float:
        tokens = self._array(self.prompt)
        self.forget(self._reading, 0)
        started = time.perf_counter()
        self._run(self._reading, tokens, 0)
        self._best(self._reading)
        return time.perf_counter() - started

    def instructions(self) -> str:
        on = [part.split("=") for part in self.system_info().replace("CPU :", "|").split("|") if "=" in part]
        names = [name.strip().split(":")[-1].strip() for name, value in on if value.strip() == "1"]
        return " ".join(name for name in names if name.startswith(("AVX", "FMA", "AMX", "NEON", "SVE")))

    def system_info(self) -> str:
        """The library's own line about what it was compiled for."""
        return str(self.c.llama_print_system_info().decode())

    def _context(self, settings: dict[str, Any]) -> Any:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._contexts:
            options = self.model_options(settings)
            which = bytes(options).hex()
            if which not in self._models:
                self._models[which] = self.c.llama_model_load_from_file(self.file, options)
            if not self._models[which]:
                raise RuntimeError(f"{self.file.decode()} could not be loaded")
            options = self.context_options(settings)
            options.n_ctx = max(len(self.prompt), len(self.context) + self.warm + self.steps) + ROOM
            options.n_batch, options.n_ubatch = len(self.prompt), settings["ubatch"]
            options.n_threads = options.n_threads_batch = settings["threads"]
            self._contexts[key] = self.c.llama_init_from_model(self._models[which], options)
            vocabulary = self.c.llama_model_get_vocab(self._models[which])
            self._size = self.c.llama_vocab_n_tokens(vocabulary)
        return self._contexts[key]

    def _array(self, tokens: list[int]) -> Any:
        return (ctypes.c_int32 * len(tokens))(*tokens)  # batches hold no reference to it

    def _run(self, context: Any, tokens: Any, position: int) -> None:
        if status := self.c.llama_decode(context, self.batch(tokens, position)):
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self, context: Any) -> int:
        logits = self.c.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._size,)).argmax())


class LlamaCpp(Ggml):
    """llama.cpp, as llama-cpp-python binds it."""

    module = "llama_cpp.llama_cpp"

    def library(self) -> None:
        self._quiet = self.c.llama_log_callback(lambda level, text, data: None)
        self.c.llama_log_set(self._quiet, None)

    def model_options(self, settings: dict[str, Any]) -> Any:
        options = self.c.llama_model_default_params()
        options.use_extra_bufts = settings["repack"]
        options.load_mode = self.c.LLAMA_LOAD_MODE_MMAP if settings["mmap"] else self.c.LLAMA_LOAD_MODE_NONE
        return options

    def context_options(self, settings: dict[str, Any]) -> Any:
        options = self.c.llama_context_default_params()
        options.flash_attn_type = int(settings["flash attention"])
        return options

    def batch(self, tokens: Any, position: int) -> Any:
        return self.c.llama_batch_get_one(tokens, len(tokens))

    def forget(self, context: Any, position: int) -> None:
        self.c.llama_memory_seq_rm(self.c.llama_get_memory(context), 0, position, -1)


class IkLlamaCpp(Ggml):
    """ik_llama.cpp, as ik-llama-cpp-python binds it, and what it leaves unbound."""

    module = "ik_llama_cpp._ctypes_api"

    def library(self) -> None:
        self._library = self.c._lib
        self._library.llama_batch_get_one.restype = self.c.llama_batch
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._library.llama_batch_get_one.argtypes = [pointer, *[ctypes.c_int32] * 3]
        self._library.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 3]
        self._library.llama_print_system_info.restype = ctypes.c_char_p

    def model_options(self, settings: dict[str, Any]) -> Any:
        options = self.c.llama_model_default_params()
        options.repack_tensors, options.use_mmap = settings["repack"], settings["mmap"]
        options.merge_qkv, options.flash_attn = settings["merged qkv"], settings["flash attention"]
        return options

    def context_options(self, settings: dict[str, Any]) -> Any:
        options = self.c.llama_context_default_params()
        options.flash_attn = settings["flash attention"]
        return options

    def batch(self, tokens: Any, position: int) -> Any:
        return self._library.llama_batch_get_one(tokens, len(tokens), position, 0)

    def forget(self, context: Any, position: int) -> None:
        self._library.llama_kv_cache_seq_rm(context, 0, position, -1)

    def system_info(self) -> str:
        return str(self._library.llama_print_system_info().decode())


def make(config: dict[str, Any]) -> Engine:
    """The library that the configuration names."""
    return {"llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp}[config["library"]](config)


if __name__ == "__main__":
    serve(make)
