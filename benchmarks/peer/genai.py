"""OpenVINO GenAI's `LLMPipeline` on the CPU, greedy."""

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from peer.serve import Engine, serve

# What oneDNN says of itself where a product runs; it listens to ONEDNN_MAX_CPU_ISA, OpenVINO's own kernels don't.
PRODUCT = """
import numpy, openvino
from openvino import opset13 as ops
x = ops.parameter([4, 64])
y = ops.matmul(x, ops.constant(numpy.ones((64, 64), numpy.float32)), False, False)
openvino.compile_model(openvino.Model([y], [x]), "CPU")([numpy.ones((4, 64), numpy.float32)])
"""


class GenAI(Engine):
    """A pipeline for decoding and one for prompts, or one for both where settings agree.

    Decoding is timed by the pipeline's own time stamps of tokens, since a call always reads its prompt first.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._model = config["file"]
        self._pipelines: dict[str, Any] = {}
        self._decoding, self._reading = (self._pipeline(self.settings[name]) for name in ("decode", "prompt"))

    def decode(self) -> tuple[float, list[int]]:
        result = self._generate(self._decoding, self.context, 1 + self.warm + self.steps)
        times = result.perf_metrics.raw_metrics.m_new_token_times
        return (times[-1] - times[self.warm]) / 1e3, list(result.tokens[0])

    def read(self) -> float:
        started = time.perf_counter()
        self._generate(self._reading, self.prompt, 1)
        return time.perf_counter() - started

    def instructions(self) -> str:
        command = [sys.executable, "-c", PRODUCT]
        out = subprocess.run(
            command, env=os.environ | {"ONEDNN_VERBOSE": "1"}, capture_output=True, text=True
        )
        found = re.search(r"isa:(.+)", out.stdout)
        return f"oneDNN: {found.group(1) if found else '?'}; its own kernels: all there are"

    def _pipeline(self, settings: dict[str, Any]) -> Any:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._pipelines:
            options: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
            if options["ATTENTION_BACKEND"] == "PA":
                scheduler = openvino_genai.SchedulerConfig()
                scheduler.enable_prefix_caching = False  # a prompt that was read before is to be read again
                options["scheduler_config"] = scheduler
            self._pipelines[key] = openvino_genai.LLMPipeline(self._model, "CPU", **options)
        return self._pipelines[key]

    @staticmethod
    def _generate(pipeline: Any, tokens: list[int], count: int) -> Any:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = count, True, False
        return pipeline.generate(openvino.Tensor(np.array([tokens], dtype=np.int64)), options)


if __name__ == "__main__":
    serve(GenAI)
