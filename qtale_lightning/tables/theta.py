"""What a table's declaration says of θ: numbers, or how each is found."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from qtale_lightning.results.fields import Fraction


class Declared(BaseModel):
    """A part of a declaration: of known keys, and for ever as it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GridRule(Declared):
    """θ chosen on calibration questions from the grid `--sweep.thresholds`."""

    rule: Literal["one-standard-error", "tolerance"]
    margin: Annotated[float, Field(gt=0, lt=1)] | None = None


class BudgetRule(Declared):
    """θ searched for an execution ratio: a number, or what the cell named `like` measures on the same precision, data
    and seed."""

    rule: Literal["budget", "layer-budget"]
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    like: str | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.budget is None) == (self.like is None):
            raise ValueError("give either 'budget' (an execution ratio) or 'like' (the name of a cell)")
        return self


def _kind(theta: Any) -> str:
    if isinstance(theta, list):
        return "list"
    rule = theta.get("rule") if isinstance(theta, dict) else getattr(theta, "rule", None)
    if rule is None and not isinstance(theta, dict):
        return "number"
    return "budget" if rule in ("budget", "layer-budget") else "grid"


Theta = Annotated[
    Annotated[Fraction, Tag("number")]
    | Annotated[list[Fraction], Field(min_length=1), Tag("list")]
    | Annotated[GridRule, Tag("grid")]
    | Annotated[BudgetRule, Tag("budget")],
    Discriminator(_kind),
]
LineTheta = float | GridRule | BudgetRule | None
