"""Who decides how many visual tokens a request's images are worth, as data."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel


class FixedPolicyConfig(StrictModel):
    """Every request gets the same budget; one that asks for another is refused."""

    type: Literal["fixed"] = "fixed"
    visual_tokens: int = Field(ge=1)
    """The budget."""


class RequestPolicyConfig(StrictModel):
    """A request says: `visual_tokens`, or `detail` low (the smallest budget), high (the largest) or auto."""

    type: Literal["request"] = "request"
    auto: int | None = Field(default=None, ge=1)
    """Budget of requests that leave it open; null: the largest."""


class LoadPolicyConfig(StrictModel):
    """As `request`, but what is left open falls and rises so that a latency objective holds."""

    type: Literal["load"] = "load"
    measure: Literal["total", "first_token"] = "total"
    """What the objective is about: the whole request, or the time to its first token."""
    objective_s: float = Field(default=1.0, gt=0)
    """Latency that `quantile` of the requests should stay below, seconds."""
    quantile: float = Field(default=0.95, gt=0, lt=1)
    """Share of the requests."""
    floor: int | None = Field(default=None, ge=1)
    """Smallest budget it may give; null: the smallest that is served.

    A registered version that was put to gates is served only if they accepted it.
    """
    window_s: float = Field(default=5.0, gt=0)
    """How far back latencies count, seconds."""
    lower_after_s: float = Field(default=0.5, gt=0)
    """Shortest time between two steps down, seconds."""
    raise_after_s: float = Field(default=5.0, gt=0)
    """Time that the load must have been low before a step up, seconds; doubled each time that a step up had to be taken back."""
    raise_below: float = Field(default=0.6, gt=0, lt=1)
    """Share of the objective that counts as low load."""


class InputPolicyConfig(StrictModel):
    """As `request`, but what is left open is chosen by image and question, with a predictor that `parcelray analyze adaptive` fitted."""

    type: Literal["input"] = "input"
    predictor: str = Field(min_length=1)
    """Folder of the predictor, on every node."""
    price: float | None = Field(default=None, ge=0)
    """Chance of a right answer that one visual token must buy; null: the predictor's own."""
    floor: int | None = Field(default=None, ge=1)
    """Smallest budget it may give: one that the promotion gate accepted; null: the smallest that is served."""


BudgetPolicyConfig = Annotated[
    FixedPolicyConfig | RequestPolicyConfig | LoadPolicyConfig | InputPolicyConfig, Field(discriminator="type")
]


class ServedBudgets(StrictModel):
    """The budgets of an endpoint."""

    offered: tuple[int, ...] = (16, 64, 256)
    """Visual tokens per image that requests may have; each is warmed up before the endpoint is ready, and is a label of the metrics."""
    policy: BudgetPolicyConfig = RequestPolicyConfig()
    """Who chooses among them."""

    @model_validator(mode="after")
    def _check(self) -> "ServedBudgets":
        if not self.offered or any(budget < 1 for budget in self.offered) or len(set(self.offered)) < len(self.offered):
            raise ValueError(
                f"offered {list(self.offered)} are not different token counts from 1 on; write for example [16, 64,"
                " 256]"
            )
        named = {"visual_tokens", "auto", "floor"} & type(self.policy).model_fields.keys()
        for name in sorted(named):
            value = getattr(self.policy, name)
            if value is not None and value not in self.offered:
                raise ValueError(
                    f"{name} of the policy is {value}, which is not offered; legal:"
                    f" {', '.join(map(str, sorted(self.offered)))}"
                )
        return self
