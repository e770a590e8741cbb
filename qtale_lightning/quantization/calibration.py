"""Calibration, layer by layer: every batch passes a layer before any passes the next one.

What a layer's search needs is summed while it runs and forgotten after it, so that beside the model only the
hidden states of the calibration tokens and one layer's sums are in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.batching import by_length
from qtale_lightning.quantization.mappings import DecoderLayer, decoder_layers, linear_shapes
from qtale_lightning.quantization.rtn import check_quantizable

BATCH_TOKENS = 1024  # padded tokens of a batch: a layer's activations are held for one batch at a time
MOMENT_ROWS = 4096  # tokens converted to float32 at a time while moments are summed

Batch = Mapping[str, Tensor]
"""Arguments of the model's forward: `input_ids`, shape `(B, T)`, and `attention_mask` where rows are padded."""


def padded_batches(
    sequences: Iterable[Sequence[int]], device: torch.device | str = "cpu", tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """Batches of sequences of similar length, padded on the right: at most `tokens` each, or one sequence."""
    rows = [torch.tensor(sequence, device=device) for sequence in sequences]
    return [padded([rows[i] for i in batch]) for batch in by_length([len(row) for row in rows], tokens)]


def padded(rows: Sequence[Tensor]) -> Batch:
    """A batch of token sequences, each of shape `(T,)`, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    ids = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens of a batch aren't padding, bool `(B, T)`."""
    ids = batch["input_ids"]
    return (
        batch["attention_mask"].bool()
        if "attention_mask" in batch
        else torch.ones_like(ids, dtype=torch.bool)
    )


@dataclass
class Moments:
    """Sums over the calibration tokens X of one input: G = XᵀX, shape `(in, in)`, and |x|, shape `(in,)`."""

    gram: Tensor
    abs_sum: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        """The sums over no token."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, inputs: Tensor) -> None:
        """Adds tokens, shape `(..., in)`, in float32."""
        for rows in inputs.reshape(-1, inputs.shape[-1]).split(MOMENT_ROWS):
            rows = rows.float()
            self.gram.addmm_(rows.T, rows)
            self.abs_sum.add_(rows.abs().sum(0))
            self.tokens += len(rows)


class _Recorder(nn.Module):
    """Stands in for all decoder layers, and keeps what the first of them would be called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((hidden_states, kwargs))
        return hidden_states


def every_nth(batches: Sequence[Batch], tokens: int) -> int:
    """One batch of how many has about so many padded tokens in all, at least one batch."""
    padded = sum(batch["input_ids"].numel() for batch in batches)
    return max(1, -(-padded // tokens))


def first_calls(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What a model's first decoder layer is called with for each batch: hidden states, and all other arguments.

    They are every later layer's arguments, too.
    """
    recorder = _Recorder()
    decoder: Any = model.get_submodule("model")
    layers = decoder.layers
    decoder.layers = nn.ModuleList([recorder])
    try:
        with torch.no_grad():
            for batch in batches:
                decoder(**batch, use_cache=False)
    finally:
        decoder.layers = layers
    hidden, arguments = [states for states, _ in recorder.calls], [kwargs for _, kwargs in recorder.calls]
    for kwargs in arguments:
        if hasattr(kwargs.get("routing"), "align"):
            kwargs["routing"].align = False  # a routed model must not repeat tokens that are counted here
    return hidden, arguments


def layer_by_layer(
    model: nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[DecoderLayer, Callable[..., list[Tensor]]]]:
    """Decoder layers in order, each with the function that runs it on all batches; call it once in each turn.

    It returns the hidden states after the layer, by batch. The model is never changed, so later layers see
    full-precision inputs, as in AutoAWQ; unless the function is given another module to run in the layer's place. Told
    not to advance, it only shows the layer to what watches it, and is to be called again.

    Args:
        model: a causal language model of a declared family in evaluation mode.
        batches: of calibration tokens.
    """
    hidden, arguments = first_calls(model, batches)
    for layer in decoder_layers(model):

        def run(module: nn.Module = layer.module, advance: bool = True) -> list[Tensor]:
            with torch.no_grad():
                for i, kwargs in enumerate(arguments):
                    after = module(hidden[i], **kwargs)
                    hidden[i] = after if advance else hidden[i]
            return hidden

        yield layer, run


def collect_moments(layer: DecoderLayer, run: Callable[[], object], min_tokens: int) -> dict[str, Moments]:
    """Runs a layer and sums the inputs of its linears, by the first linear that reads each input.

    Every token that reaches a linear counts: a routed layer that calls its linears for its executing tokens alone
    is measured on those.

    Raises:
        ValueError: a linear saw too few tokens, or NaN or infinity.
    """
    moments: dict[str, Moments] = {}

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            with plain_float32(inputs):
                if name not in moments:
                    moments[name] = Moments.zeros(inputs.shape[-1], inputs.device)
                moments[name].add(inputs)

        return hook

    firsts = [mapping.linears[0] for mapping in layer.architecture.mappings]
    with hooks(layer.linears[name].register_forward_pre_hook(accumulate(name)) for name in firsts):
        run()
    for name in firsts:
        seen = moments.get(name)
        check_tokens(layer.path(name), seen.tokens if seen else 0, min_tokens)
        if seen and not seen.gram.diagonal().isfinite().all():
            raise ValueError(
                f"the activations into {layer.path(name)} have NaN or infinity: check the model on these rows"
            )
    return moments


def check_tokens(name: str, tokens: int, min_tokens: int) -> None:
    """Raises ValueError where a linear's search would rest on too few tokens."""
    if tokens < max(min_tokens, 1):
        raise ValueError(
            f"{name} saw {tokens} calibration tokens, the search needs {max(min_tokens, 1)} or more: "
            "calibrate on more rows, or at a lower router threshold"
        )


def check_model(model: nn.Module, bits: Mapping[str, int], group_size: int) -> None:
    """Refuses, before any compute, a model that can't be quantized so.

    Raises:
        ValueError: the group size doesn't divide a width, bits are out of range or don't name the model's linears,
            a weight has NaN or infinity, or the model is in training mode.
    """
    shapes = linear_shapes(model)
    if shapes.keys() != bits.keys():
        raise ValueError(f"bits are given for other linears than the model's {len(shapes)}: {[*bits][:3]} …")
    for name, shape in shapes.items():
        check_quantizable({name: shape}, bits[name], group_size)
    for name in shapes:
        if not model.get_parameter(f"{name}.weight").isfinite().all():
            raise ValueError(
                f"the weights of {name} have NaN or infinity: check the checkpoint and the merge"
            )
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before the search")


@contextmanager
def hooks(handles: Any) -> Iterator[None]:
    """Registers hooks and takes them away again, whatever happens."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextmanager
def plain_float32(like: Tensor) -> Iterator[None]:
    """Float32 arithmetic on a tensor's device, whatever autocast or inference mode the caller runs in.

    Where the tensor is bfloat16, a CPU rounds the factors of matrix products to that, and sums in float32: three to
    four times as fast. Second moments of bfloat16 inputs lose nothing by it, an output error 1e-4 of its value.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # (made at run time)
    before = products.fp32_precision
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        products.fp32_precision = "bf16" if like.dtype == torch.bfloat16 else "ieee"
        try:
            yield
        finally:
            products.fp32_precision = before
