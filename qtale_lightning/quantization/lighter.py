"""Inference at less precision than a model is stored in: tokens in 8 bits, and the head's weights in 8 or 4."""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import pad

from qtale_lightning import cpu
from qtale_lightning.quantization.int4 import BLOCK_INPUTS
from qtale_lightning.quantization.linear import ActivationBits, QuantizedLinear
from qtale_lightning.quantization.rtn import Scheme, quantize
from qtale_lightning.watch import note_change

HeadBits = Literal[16, 8, 4]

HEAD_GROUP_SIZE = 32
"""Inputs of the head that share a scale: its outputs are compared with each other, so that its errors count."""


class _Head(QuantizedLinear):
    """A head of any number of outputs: kernels take sixteens of them, whose last ones are then left out."""

    vocabulary: int

    @classmethod
    def rounded(cls, head: nn.Linear, bits: int) -> "_Head":
        """A head's weights, rounded to nearest."""
        more = -head.out_features % cpu.LANES
        weight = pad(head.weight.detach().float(), (0, 0, 0, more))
        bias = None if head.bias is None else pad(head.bias.detach(), (0, more))
        made = cls.of(quantize(weight, Scheme(bits, HEAD_GROUP_SIZE)), bits, "tight", bias)
        assert isinstance(made, cls)
        made.vocabulary = head.out_features
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(..., V)`` from ``(..., in)``."""
        return super().forward(x)[..., : self.vocabulary]


def lighten(model: nn.Module, activation_bits: ActivationBits = 16, head_bits: HeadBits = 16) -> None:
    """Let a loaded model compute at less precision, for speed; 16 leaves a thing as it is.

    Nothing that the paper's figures are measured with: benchmarks/README.md has what both cost. The head is rounded to
    nearest; embeddings that are tied to it keep their precision. Made for inference: a model with another head can't be
    saved.

    Args:
        model: A causal language model of transformers.
        activation_bits: Of tokens in products with quantized weights: 8 rounds them, in blocks of 32 inputs.
        head_bits: Of the head's weights.

    Raises:
        ValueError: A width isn't a multiple of 32, no weights are quantized that could be multiplied with tokens in
            8 bits, or the head is quantized already.
    """
    head = model.get_submodule("lm_head")
    if head_bits != 16:
        if not isinstance(head, nn.Linear):
            raise ValueError(f"the head is quantized already: load the model again for {head_bits} bits")
        _check_width("lm_head", head.in_features)
        model.set_submodule("lm_head", _Head.rounded(head, head_bits))
    quantized = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    if activation_bits == 8 and not quantized:
        raise ValueError("tokens in 8 bits are multiplied with quantized weights, and this model has none")
    for name, linear in quantized.items():
        _check_width(name, linear.in_features)
        linear.activation_bits = activation_bits
    note_change()


def lightened(model: nn.Module) -> dict[str, int]:
    """What `lighten` has changed, as a row of results says it in its protocol; nothing where all is at 16 bits."""
    head = model.get_submodule("lm_head")
    found = {"head_bits": head.bits} if isinstance(head, QuantizedLinear) else {}
    tokens = {part.activation_bits for part in model.modules() if isinstance(part, QuantizedLinear)} - {16}
    return found | ({"activation_bits": tokens.pop()} if tokens else {})


def _check_width(name: str, width: int) -> None:
    if width % BLOCK_INPUTS:
        raise ValueError(
            f"{name} has {width} inputs: computing it in 8 or 4 bits takes a multiple of {BLOCK_INPUTS}"
        )
