"""One file a method: each has a ``METHOD``, which ``qtale_lightning.routing`` finds."""
