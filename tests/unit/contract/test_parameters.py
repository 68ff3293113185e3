"""Parameters are filled in, checked, and named when they are wrong."""

import pytest
from google.protobuf.struct_pb2 import Struct

from fanlight.contract import annotation
from fanlight.contract.annotation import check_struct, described, description, filled, plain
from fanlight.contract.parameters import Parameter, canonical, fill
from fanlight.errors import InvalidField, TooLarge
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest

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


def test_a_range_is_printed_with_all_of_its_digits():
    parameter = Parameter(name="seed", default=0, minimum=0, maximum=2**32 - 1)
    with pytest.raises(InvalidField, match="must be 0 to 4294967295"):
        parameter.parse(2**32, field="seed")


def struct(values) -> Struct:
    made = Struct()
    made.update(values)
    return made


def test_values_travel_filled_and_equal_ones_as_equal_bytes():
    one, other = (
        filled(struct(given), PARAMETERS, field="parameters")
        for given in ({"gray": True, "low": 3}, {"low": 3.0, "gray": True})
    )
    assert plain(one) == {"low": 3, "sigma": 1.5, "gray": True, "mode": "soft"}
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)


def test_a_wrong_value_of_a_request_is_named():
    request = AnnotateRequest(annotator="canny", parameters=struct({"low": 256}))
    with pytest.raises(InvalidField, match="0 to 255") as caught:
        annotation.check_parameters(request, PARAMETERS)

    assert caught.value.field == "parameters.low"


@pytest.mark.parametrize("value", [None, [1], {"a": 1}])
def test_what_no_parameter_takes_is_refused(value):
    with pytest.raises(InvalidField, match="must be a whole number"):
        filled(struct({"low": value}), PARAMETERS, field="parameters")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), [1, float("nan")], {"a": {"b": float("inf")}}])
def test_a_number_that_json_has_none_for_is_refused(value):
    with pytest.raises(InvalidField, match="finite") as caught:
        check_struct(struct({"low": value}), field="parameters")

    assert caught.value.field == "parameters.low"


def test_a_struct_has_a_limit():
    check_struct(struct({"x": "x" * 4000}), field="parameters")
    with pytest.raises(TooLarge, match="at most 4096"):
        check_struct(struct({"x": "x" * 4096}), field="parameters")


@pytest.mark.parametrize("parameter", PARAMETERS, ids=[each.name for each in PARAMETERS])
def test_a_parameter_is_described_and_read_again(parameter):
    assert described(description(parameter), field="annotators[0]") == parameter


def test_a_default_of_another_kind_is_refused():
    message = description(PARAMETERS[0])
    message.default_value.string_value = "100"
    with pytest.raises(InvalidField) as caught:
        described(message, field="parameters[0]")

    assert caught.value.field == "parameters[0].default_value"
