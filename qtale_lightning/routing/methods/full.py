"""Every layer executes: LoRA alone, the model that all others are compared with."""

from qtale_lightning.routing.method import Method


class Full(Method):
    """No routers, no losses beside L_CE."""

    name = "full"
    title = "full"


METHOD = Full()
