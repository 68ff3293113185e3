"""Parameters are filled in, checked, and named when they are wrong."""

import pytest

from services.kernel.errors import InvalidField
from services.kernel.parameters import Parameter, canonical, fill

PARAMETERS = [
    Parameter(name="low", default=100, minimum=0, maximum=255),
    Parameter(name="sigma", default=1.5, minimum=0),
    Parameter(name="gray", default=False),
    Parameter(name="mode", default="soft", choices=("soft", "hard")),
]


def test_what_is_left_out_has_its_default():
    assert fill(PARAMETERS, {"low": 7.0}) == {"low": 7, "sigma": 1.5, "gray": False, "mode": "soft"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("low", 256, "0 to 255"),
        ("low", 1.5, "whole number"),
        ("low", True, "whole number"),
        ("sigma", -1, "0 or more"),
        ("sigma", float("nan"), "a number"),
        ("gray", 1, "true or false"),
        ("mode", "loud", "soft, hard"),
        ("hi", 1, "not known"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(name, value, message):
    with pytest.raises(InvalidField, match=message) as caught:
        fill(PARAMETERS, {name: value})

    assert caught.value.field == f"parameters.{name}"


def test_equal_values_have_one_canonical_text():
    assert canonical(fill(PARAMETERS, {"gray": True, "low": 3})) == canonical(
        fill(PARAMETERS, {"low": 3.0, "gray": True})
    )


def test_a_range_is_told_with_all_of_its_digits():
    parameter = Parameter(name="seed", default=0, minimum=0, maximum=2**32 - 1)
    with pytest.raises(InvalidField, match="must be 0 to 4294967295"):
        parameter.parse(2**32, field="seed")
