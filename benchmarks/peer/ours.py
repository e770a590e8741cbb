"""Ours, routed and at 4 bits, and Hugging Face's dense model: greedy, by the models' own forward.

Routers run in every layer and their time counts; their decisions are replaced, as in latency.py.
"""

import time
from typing import Any

import torch
from common import instructions
from latency import decisions, routed_model
from transformers import DynamicCache

from peer.serve import Engine, serve
from qtale_lightning.allocator import give_back, keep_freed_memory
from qtale_lightning.models import RoutedCache, Routing
from qtale_lightning.models.routing import OfUnits
from qtale_lightning.models.sources import load_base
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.lighter import lighten
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest


class PyTorch(Engine):
    """A model, its cache behind the context, and the routing of each step: none for Hugging Face's."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        torch.manual_seed(0)  # of the routers' weights
        self._dtype = getattr(torch, self.settings["decode"]["dtype"])
        self._model: Any = load_base(config["model"], config["path"], self._dtype).eval()
        self._cache: Any = DynamicCache()
        self._routings: list[OfUnits] = []
        self._whole: OfUnits | None = None
        first: dict[str, Any] = {}
        if (ratio := config["ratio"]) is not None:
            self._model = routed_model(self._model, config["model"])
            shapes = linear_shapes(self._model)
            quantize_model(self._model, round_to_nearest(uniform(shapes, 4, {}), config["group size"]))
            lighten(self._model, config["token bits"], config["head bits"])
            layers = self._model.config.num_hidden_layers
            self._routings = [decisions(ratio, layers, 1, 1, seed) for seed in range(self.warm + self.steps)]
            self._whole = decisions(ratio, layers, 1, len(self.prompt), 0)
            self._cache = RoutedCache()
            first = {"routing": Routing(threshold=0.0)}  # the context executes every layer
        give_back()  # what the weights were made of: many of these processes run side by side
        ids = torch.tensor([self.context])
        logits = self._model(ids, past_key_values=self._cache, use_cache=True, **first).logits
        self._first = logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def decode(self) -> tuple[float, list[int]]:
        self._rewind()
        token, tokens, started = self._first, [self._first.item()], 0.0
        for step in range(self.warm + self.steps):
            if step == self.warm:
                started = time.perf_counter()
            extra = {"routing": Routing(forced=self._routings[step])} if self._routings else {}
            logits = self._model(token, past_key_values=self._cache, use_cache=True, **extra).logits
            # NumPy's, of float32, as for the peers: PyTorch's takes 0.1 ms, and of bfloat16 0.5.
            tokens.append(int(logits[0, -1].float().numpy().argmax()))
            token = torch.tensor([[tokens[-1]]])
        return time.perf_counter() - started, tokens

    @torch.inference_mode()
    def read(self) -> float:
        ids = torch.tensor([self.prompt])
        started = time.perf_counter()
        extra = {} if self._whole is None else {"routing": Routing(forced=self._whole)}
        self._model(ids, use_cache=True, logits_to_keep=1, **extra).logits.argmax(-1).item()
        return time.perf_counter() - started

    def instructions(self) -> str:
        return instructions()

    def _rewind(self) -> None:
        """Forget what came after the context, which executed every layer; what lies behind its end is overwritten."""
        length = len(self.context)
        if isinstance(self._cache, DynamicCache):
            if extra := self._cache.get_seq_length() - length:
                self._cache.crop(-extra)
            return
        self._cache.seen = length
        for layer in self._cache.layers:
            layer.lengths = (length,)


if __name__ == "__main__":
    keep_freed_memory()
    # Not in inference mode, in which weights have no version: routers would be multiplied in float32, and nothing that
    # isn't quantized laid into huge pages.
    with torch.no_grad():
        serve(PyTorch)
