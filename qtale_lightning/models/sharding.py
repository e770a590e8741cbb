"""A frozen base spread over devices: every decoder layer sharded, by PyTorch's fully_shard (FSDP2).

FSDP2 shards weight by weight, so that bfloat16 base weights and float32 LoRA and routers may share a layer; FSDP1
flattens a layer into one tensor of one dtype, and can't hold them.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from qtale_lightning.models.modeling import RoutedForCausalLM


def shard(model: RoutedForCausalLM, mesh: DeviceMesh) -> None:
    """Shard the decoder layers over the devices of a mesh of one dimension, in place.

    Embeddings, norms and head stay whole on every device: they are frozen, so that nothing of them is exchanged, and
    the head may be tied to the embeddings.

    Raises:
        ValueError: They are trained, and so would drift apart.
    """
    layers = [parts(layer) for layer in model.model.layers]
    sharded = {id(weight) for layer in layers for part in layer for weight in part.parameters()}
    whole = {weight for weight in model.parameters() if id(weight) not in sharded}
    if any(weight.requires_grad for weight in whole):
        raise ValueError(
            "--trainer.strategy fsdp shards a frozen base: set --model.train_all to false, or take ddp"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # The stack as a whole looks ahead: a layer's weights are gathered while the one before it computes.
    fully_shard(model.model, mesh=mesh, ignored_params=whole)


def parts(layer: nn.Module) -> list[nn.Module]:
    """What a layer's weights are gathered for, together.

    Not the layer itself: fully_shard copies a data class among a module's arguments wherever it holds tensors with
    gradients, and what layers record in their Routing would be lost.
    """
    names = ("router", "stand_in", "self_attn", "mlp")
    return [part for name in names if (part := getattr(layer, name)) is not None]
