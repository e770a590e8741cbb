"""How a run spreads over devices: Lightning's strategies, and ``fsdp`` as PyTorch's FSDP2."""

from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from qtale_lightning.checkpoints import read_checkpoint
from qtale_lightning.models.adapters import check_trainable_state


class FSDP2Strategy(ModelParallelStrategy):
    """Shards a model over all devices of all nodes, as its ``configure_model`` says, and keeps ordinary checkpoints.

    Lightning's own ``fsdp`` is FSDP1, which can't mix the dtypes of a frozen base and of what is trained in it.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All processes share one copy of the sharded weights."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, which leaves out what is missing; refused here, as by the module's own loading.

        Raises:
            ValueError: The checkpoint is that of another model or configuration, or damaged.
        """
        saved = read_checkpoint(checkpoint_path, mmap=True)
        assert self.lightning_module is not None
        check_trainable_state(self.lightning_module, saved["state_dict"])
        return super().load_checkpoint(checkpoint_path, weights_only=True)  # whatever was asked


def count_devices(accelerator: Any, devices: Any) -> int:
    """Devices of this machine that Lightning takes for ``--trainer.devices``, such as auto, -1 or 0,2.

    Raises:
        ValueError: There are none of the kind, or not these.
    """
    try:
        return Fabric(accelerator=accelerator, devices=devices).world_size
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--trainer.devices {devices}, --trainer.accelerator {accelerator}: {error}"
        ) from error


def resolve_strategy(asked: Any) -> Any:
    """What the Trainer takes for ``--trainer.strategy``."""
    return FSDP2Strategy() if asked == "fsdp" else asked
