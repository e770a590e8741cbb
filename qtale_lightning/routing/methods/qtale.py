"""QTALE: D-LLM whose entropy loss keeps execution paths diverse, and whose θ is chosen after quantization."""

from qtale_lightning.routing.methods.dllm import DLLM


class QTALE(DLLM):
    """L = L_CE + λ1 · L_ratio + λ2 · L_entropy."""

    name = "qtale"
    title = "QTALE"
    weights = ("lambda_ratio", "lambda_entropy")


METHOD = QTALE()
