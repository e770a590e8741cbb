"""Tables and figures from declarations: what is missing is run, every number is traceable."""

from qtale_lightning.tables.command import figures, table

__all__ = ["figures", "table"]
