"""What is asked of a sweep over θ (``--sweep.…``), checked; nothing is measured for it."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, OpenUnitInterval

from qtale_lightning.values import Floats, ShareAboveZero, in_range

Rule = Literal["one-standard-error", "tolerance", "budget", "layer-budget"]


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures at each precision, and how it selects θ on held-out training questions.

    Args:
        thresholds: The grid of θ; 0.5 is D-LLM's, 0 executes everything. The budget rules don't use it.
        rule: one-standard-error: the fewest layers within one standard error of the grid's best accuracy. tolerance:
            the fewest layers whose accuracy isn't significantly below that of full execution (θ = 0) on the same
            questions. budget: the θ that executes this share of all layers. layer-budget: the same with a θ for each
            layer; it takes two passes more for every layer.
        budgets: Execution ratios for the budget rules, each of which gets its own θ, e.g. '[0.7,0.8]'.
        margin: Accuracy that the rule tolerance lets go, shown by the 95 % interval: 0.01 is one point. None: any loss
            that isn't significant, so the more of it, the fewer the questions.

    Raises:
        ValueError: An option has a value that can't be; the message names it.
    """

    thresholds: Floats[ClosedUnitInterval] = Floats((0.5, 0.3, 0.2, 0.1, 0.03, 0.005))  # noqa: RUF009 (a tuple)
    rule: Rule = "one-standard-error"
    budgets: Floats[ShareAboveZero] = Floats()  # noqa: RUF009
    margin: OpenUnitInterval | None = None

    def __post_init__(self) -> None:
        if not self.thresholds:
            raise ValueError("the threshold grid is empty: give at least one value (--sweep.thresholds)")
        in_range("sweep", SweepOptions.__init__, vars(self))
        if self.searches and not self.budgets:
            raise ValueError(
                f"--sweep.rule {self.rule} needs --sweep.budgets, execution ratios such as '[0.7,0.8]'"
            )

    @property
    def searches(self) -> bool:
        """Whether θ is searched for budgets, and not chosen from the grid."""
        return self.rule in ("budget", "layer-budget")

    def check_budgets(self, unrouted: float, why: str = "layers without a router") -> None:
        """Refuse budgets below the share of layers that executes always, and for which reason it does (ValueError)."""
        for budget in self.budgets if self.searches else ():
            if not budget >= unrouted:
                raise ValueError(
                    f"--sweep.budgets {budget} can't be reached: {why} are {unrouted:.3f} of all "
                    "(--model.start_layer, --model.reserved_tokens): give more"
                )

    def grid(self) -> list[float]:
        """θ to measure, descending; the rule `tolerance` needs full execution, 0, among them."""
        reference = {0.0} if self.rule == "tolerance" else set()
        return sorted({*self.thresholds, *reference}, reverse=True)
