"""What is said of a value that does not fit: where, what was given, what may be given."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from hildanext.core.config import config, validate
from hildanext.core.errors import ConfigError


@config
class Spice:
    grams: float = Field(default=1.0, lt=5)
    names: tuple[str, ...] = ()


@config
class Dish:
    salt: float = Field(default=0.5, ge=0, le=1)
    heat: float | None = Field(default=None, gt=0, le=1)
    depth: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    portions: int | None = Field(default=None, ge=1)
    most: int = Field(default=3, ge=0, le=9)
    hot: bool = True
    name: str = "soup"
    kind: Literal["sweet", "sour"] | None = None
    level: Literal["off"] | Annotated[float, Field(ge=0, le=1)] = "off"
    source: str | list[str] = ""
    recipe: Path | None = None
    weights: list[float] = Field(default_factory=list)
    pair: tuple[int, int] = (1, 2)
    spice: Spice = Spice()
    spices: list[Spice] = Field(default_factory=list)
    counts: dict[str, int] = Field(default_factory=dict)
    at_least_one: list[int] = Field(default_factory=lambda: [1], min_length=1)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"salt": -0.5}, "salt: -0.5 is below 0, give 0 to 1"),
        ({"salt": 1.5}, "salt: 1.5 is above 1, give 0 to 1"),
        ({"salt": "abc"}, "salt: 'abc' is no number, give 0 to 1"),
        ({"salt": None}, "salt: null is no number, give 0 to 1"),
        ({"salt": float("nan")}, "salt: nan is no number, give 0 to 1"),
        ({"salt": "a" * 5000}, None),
        ({"heat": 0}, "heat: 0 is not above 0, give a number above 0 and at most 1, or null"),
        ({"depth": -1}, "depth: -1 is not above 0, give a number above 0"),
        ({"depth": float("inf")}, "depth: inf is not finite, give a number above 0"),
        ({"portions": 0}, "portions: 0 is below 1, give a whole number of at least 1, or null"),
        ({"portions": 1.5}, "portions: 1.5 is no whole number, give a whole number of at least 1, or null"),
        ({"most": 10}, "most: 10 is above 9, give a whole number from 0 to 9"),
        ({"hot": "warm"}, "hot: 'warm' is neither true nor false, give true or false"),
        ({"name": 3}, "name: 3 is no text, give text"),
        ({"kind": "bitter"}, "kind: 'bitter' is no choice, give 'sweet' or 'sour', or null"),
        ({"level": 7}, "level: 7 is above 1, give 'off' or 0 to 1"),
        ({"level": "on"}, "level: 'on' is no choice, give 'off' or 0 to 1"),
        ({"source": 3}, "source: 3 is no text, give text or a list of texts"),
        ({"source": [3]}, "source[0]: 3 is no text, give text"),
        ({"recipe": 3}, "recipe: 3 is no path, give a path, or null"),
        ({"weights": [1, "x"]}, "weights[1]: 'x' is no number, give a number"),
        ({"weights": 3}, "weights: 3 is no list, give a list of numbers"),
        ({"pair": [1, "x"]}, "pair[1]: 'x' is no whole number, give a whole number"),
        ({"pair": [1]}, "pair[1]: it is missing, give a whole number"),
        ({"spice": {"grams": 5}}, "spice.grams: 5 is not below 5, give a number below 5"),
        ({"spice": {"names": [1]}}, "spice.names[0]: 1 is no text, give text"),
        ({"spice": 3}, "spice: 3 is no JSON object, give a JSON object"),
        ({"spice": {"gram": 5}}, "unknown key 'spice.gram', did you mean 'grams'?"),
        ({"spices": [{}, {"grams": 9}]}, "spices[1].grams: 9 is not below 5, give a number below 5"),
        ({"counts": {"salt": "x"}}, "counts.salt: 'x' is no whole number, give a whole number"),
        ({"at_least_one": []}, "at_least_one: List should have at least 1 item after validation, not 0"),
        ({"salt": 2, "nmae": "x"}, "unknown key 'nmae', did you mean 'name'?; salt: 2 is above 1, give 0 to 1"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_what_does(section, says):
    with pytest.raises(ConfigError) as caught:
        validate(Dish, section, "dish")
    assert str(caught.value) == f"dish: {says}" if says else len(str(caught.value)) < 200
