"""Parameters are filled in, checked, and named when they are wrong."""

from collections.abc import Callable

import pytest
from google.protobuf.struct_pb2 import Struct

from fanlight.contract import annotation
from fanlight.contract.annotation import check_struct, described, described_all, description, filled, plain
from fanlight.contract.parameters import Parameter, canonical, fill
from fanlight.errors import FanlightError, InvalidField, TooLarge
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest
from fanlight.preprocessor.v1.preprocessor_pb2 import Parameter as Description
from services.preprocessor.registry import installed

NAN, INFINITY = float("nan"), float("inf")

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


def of_bytes(size_bytes: int) -> Struct:
    made = struct({"x": "x" * 4_000})
    made.update({"x": "x" * (4_000 + size_bytes - made.ByteSize())})
    assert made.ByteSize() == size_bytes
    return made


def test_a_struct_has_a_limit():
    check_struct(of_bytes(4_096), field="parameters")
    with pytest.raises(TooLarge, match="has 4097 bytes; at most 4096") as caught:
        check_struct(of_bytes(4_097), field="parameters")

    assert caught.value.field == "parameters"


def nested(levels: int, wrap: Callable[[object], object]) -> Struct:
    """`levels` values in each other below `deep`."""
    deep: object = 1
    for _ in range(levels - 1):
        deep = wrap(deep)
    return struct({"deep": deep})


@pytest.mark.parametrize("wrap", [lambda value: {"a": value}, lambda value: [value]], ids=["structs", "lists"])
def test_values_are_nested_8_deep_at_most(wrap):
    check_struct(nested(8, wrap), field="parameters")
    for levels in (9, 60):
        with pytest.raises(InvalidField, match="nested; at most 8 levels") as caught:
            check_struct(nested(levels, wrap), field="parameters")
        assert caught.value.field == "parameters.deep"


def test_a_struct_has_512_values_at_most():
    check_struct(struct({"x": [True] * 511}), field="parameters")
    with pytest.raises(InvalidField, match="at most 512 values") as caught:
        check_struct(struct({"x": [True] * 511, "y": 1}), field="parameters")

    assert caught.value.field == "parameters"


def test_defaults_count_towards_the_limit():
    parameters = [*PARAMETERS, Parameter(name="text", default="")]
    given = of_bytes(4_050)
    given.fields["text"].CopyFrom(given.fields.pop("x"))
    check_struct(given, field="parameters")
    with pytest.raises(TooLarge, match="with its defaults; at most 4096") as caught:
        filled(given, parameters, field="parameters")

    assert caught.value.field == "parameters"


@pytest.mark.parametrize("parameter", PARAMETERS, ids=[each.name for each in PARAMETERS])
def test_a_parameter_is_described_and_read_again(parameter):
    assert described(description(parameter), field="annotators[0]") == parameter


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"default_value": {"number_value": NAN}}, "default_value"),
        ({"default_value": {"number_value": INFINITY}}, "default_value"),
        ({"default_value": {"number_value": -1}}, "default_value"),
        ({"default_value": {"number_value": 11}}, "default_value"),
        ({"minimum": NAN}, "minimum"),
        ({"minimum": -INFINITY}, "minimum"),
        ({"maximum": INFINITY}, "maximum"),
        ({"minimum": 8, "maximum": 7}, "maximum"),
        ({"name": ""}, "name"),
        ({"name": "n" * 257}, "name"),
        ({"description": "d" * 4_097}, "description"),
        ({"choices": [str(number) for number in range(257)]}, "choices"),
        ({"choices": ["soft", "c" * 257]}, "choices[1]"),
    ],
)
def test_a_parameter_that_no_request_could_follow_is_refused(change, field):
    message = description(Parameter(name="sigma", default=1.5, minimum=0, maximum=10))
    for name in change:
        message.ClearField(name)
    message.MergeFrom(Description(**change))
    with pytest.raises(FanlightError) as caught:
        described(message, field="parameters[0]")

    assert caught.value.field == f"parameters[0].{field}"
    assert caught.value.is_final


def test_a_default_that_is_no_choice_is_refused():
    message = description(Parameter(name="mode", default="loud", choices=("soft", "hard")))
    with pytest.raises(InvalidField, match="soft, hard") as caught:
        described(message, field="parameters[0]")

    assert caught.value.field == "parameters[0].default_value"


def test_an_annotators_parameters_are_read_in_order():
    messages = [description(each) for each in PARAMETERS]
    assert described_all(messages, field="parameters") == tuple(PARAMETERS)


def test_a_repeated_name_is_refused():
    messages = [description(each) for each in (*PARAMETERS, PARAMETERS[0])]
    with pytest.raises(InvalidField, match="'low' twice") as caught:
        described_all(messages, field="parameters")

    assert caught.value.field == "parameters[4].name"


def test_an_annotator_has_64_parameters_at_most():
    messages = [description(Parameter(name=f"p{number}", default=0)) for number in range(65)]
    assert len(described_all(messages[:64], field="parameters")) == 64
    with pytest.raises(InvalidField, match="65 entries; at most 64") as caught:
        described_all(messages, field="parameters")

    assert caught.value.field == "parameters"


def test_defaults_that_no_request_has_room_for_are_refused():
    messages = [description(Parameter(name=name, default="x" * 3_000)) for name in "ab"]
    with pytest.raises(TooLarge, match="at most 4096") as caught:
        described_all(messages, field="parameters")

    assert caught.value.field == "parameters"


def test_every_annotator_of_the_preprocessor_can_be_described():
    for annotator in installed():
        messages = [description(each) for each in annotator.all_parameters]
        assert described_all(messages, field="parameters") == tuple(annotator.all_parameters), annotator.id


def test_a_default_of_another_kind_is_refused():
    message = description(PARAMETERS[0])
    message.default_value.string_value = "100"
    with pytest.raises(InvalidField) as caught:
        described(message, field="parameters[0]")

    assert caught.value.field == "parameters[0].default_value"
