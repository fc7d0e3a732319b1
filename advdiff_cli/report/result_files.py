"""The result files that a report reads, checked against one schema for each kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, ValidationError, model_validator

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.errors import AdvdiffError

Number = Annotated[float, AllowInfNan(False), Field(ge=-1e6, le=1e6)]
Share = Annotated[float, AllowInfNan(False), Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=0, le=10**12)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Estimate(_Schema):
    """An accuracy, or a difference of two, with its interval."""

    value: Share
    low: Share
    high: Share

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("the value is outside its interval")
        return self


class Step(_Schema):
    """A recipe in the history of a set."""

    command: str
    parameters: dict[str, Any]


class EvaluatedSet(_Schema):
    """A set of `evaluate --json`."""

    data: str
    n: Count
    draws: Count
    accuracy: Estimate
    history: list[Step]


class Comparison(_Schema):
    """A paired comparison of `evaluate --json`."""

    first: str
    second: str
    n: Count


class Model(_Schema):
    """A model, by its fingerprint."""

    fingerprint: str


class Evaluation(_Schema):
    """The output of `evaluate --json`."""

    classifier: Model
    defense: dict[str, Any] | None
    sets: list[EvaluatedSet] = Field(min_length=1)
    comparisons: list[Comparison]


class SweepRow(_Schema):
    """A value of a sweep."""

    name: str
    value: Number
    unet_evaluations: Count
    standard: Estimate
    robust: Estimate
    undefended_robust: Estimate | None


class Sweep(_Schema):
    """The content of sweep.json."""

    over: Literal["t-star", "eps", "sampler-steps", "ddpm"]
    n: Count
    recipe: Step
    attack: dict[str, Any]
    attack_told: str
    rule: str
    chosen: str | None
    chosen_told: str | None
    undefended: Estimate
    rows: list[SweepRow] = Field(min_length=1)


class SuiteRow(_Schema):
    """An attack of a suite."""

    name: str
    kind: Literal["control", "black-box", "white-box", "curve", "check"]
    attack: dict[str, Any] | None
    accuracy: Estimate
    difference: Estimate


class Worst(_Schema):
    """The worst case of each patch over the attacks of a suite."""

    name: str
    accuracy: Estimate
    clean: Estimate
    difference: Estimate


class SanityCheck(_Schema):
    """A sanity check of a suite."""

    name: str
    status: Literal["pass", "warn", "fail"]
    reason: str


class Certified(Estimate):
    """What is proved in a suite."""

    l2: Number
    sigma: Number


class Suite(_Schema):
    """The content of robustness.json."""

    defense: dict[str, Any] | None
    certified: Certified | None
    n: Count
    draws: Count
    eps: Number
    recipe: Step
    rungs: list[SuiteRow] = Field(min_length=1)
    worst: Worst
    alarms: list[SanityCheck]


Kind = type[Evaluation] | type[Sweep] | type[Suite]
_MADE_BY: dict[Kind, str] = {
    Evaluation: "advdiff evaluate CLEAN ATTACKED -c ... --json",
    Sweep: "advdiff sweep",
    Suite: "advdiff robustness",
}


def read_result(path: Path, kind: Kind) -> JsonObject:
    """Read a result file.

    Raises:
        AdvdiffError: It is missing, or not what the command writes.
    """
    try:
        text = path.read_bytes()
    except OSError as e:
        raise AdvdiffError(f"{path}: {e.strerror}; make it with {_MADE_BY[kind]}") from None
    try:
        return kind.model_validate_json(text).model_dump()
    except ValidationError as e:
        problem = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise AdvdiffError(
            f"{path} is not a result of {_MADE_BY[kind]} ({where}: {problem['msg']}); make it again"
        ) from None


def read_results(paths: Sequence[tuple[str, Path]], kind: Kind) -> dict[str, JsonObject]:
    """Read named result files.

    Raises:
        AdvdiffError: As `read_result`, or a name is repeated.
    """
    found: dict[str, JsonObject] = {}
    for name, path in paths:
        if name in found:
            raise AdvdiffError(f"two results are called {name}; give each its own name")
        found[name] = read_result(path, kind)
    return found
