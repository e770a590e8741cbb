"""QTALE+, a recipe: trained for fewer layers than it is used with, by what our measurements select.

What was measured stands in experiments/results/README.md, and the recipe in experiments/methods/qtale-plus.yaml.
"""

from qtale_lightning.routing.methods.qtale import QTALE


class QTALEPlus(QTALE):
    """QTALE's losses; the recipe says what they weigh."""

    name = "qtale-plus"
    title = "QTALE+"


METHOD = QTALEPlus()
