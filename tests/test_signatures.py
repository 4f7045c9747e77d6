"""Options from signatures: names, types, choices and bounds are checked, and said in one line."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, Field

from tvbases_hf.errors import ParameterError
from tvbases_hf.options import checked, options_of


def _even(value: int | None) -> int | None:
    if value is not None and value % 2:
        raise ParameterError(f"seats come in pairs; got {value}")
    return value


def example(
    first: int,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share that is kept")] = 0.2,
    consensus: Annotated[Literal["mean", "sum"], Field(description="how they agree")] = "mean",
    rank: Annotated[float | str | None, Field(description="a rule")] = None,
    steps: Annotated[int, Field(ge=1, description="steps")] = 10,
    flag: Annotated[bool, Field(description="a switch")] = True,
    seats: Annotated[int | None, AfterValidator(_even), Field(description="of a table")] = None,
    hidden: float = 0.0,
) -> None:
    """What the tests declare."""


OPTIONS = options_of(example)


def test_options_are_the_described_keyword_parameters_in_their_order() -> None:
    assert list(OPTIONS) == ["density", "consensus", "rank", "steps", "flag", "seats"]
    assert [option.default for option in OPTIONS.values()] == [0.2, "mean", None, 10, True, None]
    assert OPTIONS["density"].help == "share that is kept"
    assert OPTIONS["density"].bounds == "above 0 and at most 1"
    assert OPTIONS["consensus"].choices == ("mean", "sum")
    assert OPTIONS["rank"].kinds == (float, str)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"density": 1}, {"density": 1.0}),
        ({"steps": 3.0}, {"steps": 3}),
        ({"rank": "energy:0.9"}, {"rank": "energy:0.9"}),
        ({"rank": 0.5}, {"rank": 0.5}),
        ({"seats": 4, "flag": False}, {"seats": 4, "flag": False}),
        ({}, {}),
    ],
)
def test_what_fits_is_kept(given: dict[str, object], kept: dict[str, object]) -> None:
    found = checked("example", OPTIONS, given)
    assert found == kept
    assert all(type(found[name]) is type(value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"densty": 0.5}, r"densty is no option of example \(did you mean density\?\); it has density, consensus"),
        ({"density": 2}, r"density of example \(share that is kept\) must be a number, above 0 and at most 1; got 2"),
        ({"density": 0.0}, "above 0"),
        ({"density": True}, "must be a number"),
        ({"density": "0.5"}, "must be a number"),
        ({"density": float("nan")}, "above 0"),
        ({"consensus": "men"}, r"must be mean or sum \(did you mean mean\?\); got 'men'"),
        ({"steps": 1.5}, "must be a whole number, at least 1"),
        ({"steps": True}, "must be a whole number"),
        ({"flag": 1}, "true or false"),
        ({"seats": 3}, "^seats come in pairs; got 3$"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message) as refused:
        checked("example", OPTIONS, given)
    assert "\n" not in str(refused.value)


def test_a_schema_holds_type_bounds_choices_and_default() -> None:
    density = OPTIONS["density"].schema()
    assert density == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "description": "share that is kept",
        "default": 0.2,
    }
    assert OPTIONS["consensus"].schema()["enum"] == ["mean", "sum"]
