"""JSON to messages: every mistake is named by its whole path."""

from typing import Any

import pytest

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.http.bodies import parse_json
from services.gateway.http.json_messages import fill, to_json

GENERATE = "type.googleapis.com/fanlight.diffusion.v1.GenerateRequest"
STRUCT = "type.googleapis.com/google.protobuf.Struct"


def filled(value: object) -> gateway_pb2.CreateJobRequest:
    message = gateway_pb2.CreateJobRequest()
    fill(message, value)
    return message


def test_a_whole_request_is_read_and_written_back() -> None:
    value = {
        "request_id": "order-17",
        "priority": -3,
        "generation": {
            "prompt": "häuser, 家",
            "seed": "18446744073709551615",
            "guidance_scale": 4.5,
            "controls": [
                {"annotator": "canny", "parameters": {"low": 10.0, "gray": True}, "image": {"data": "AAEC"}},
                {"image": {"blob": {"digest": "sha256:00"}}, "start": 0.0},
            ],
        },
    }
    message = filled(value)
    control = message.generation.controls[0]
    assert (message.generation.prompt, message.generation.seed) == ("häuser, 家", 18446744073709551615)
    assert (control.image.data, control.parameters["low"], control.parameters["gray"]) == (b"\0\1\2", 10.0, True)
    assert filled(to_json(message)) == message


def test_what_is_not_set_is_left_out_only_where_that_means_something() -> None:
    shown = to_json(filled({"generation": {"prompt": "x"}}))
    assert shown["generation"]["controls"] == []
    assert shown["generation"]["negative_prompt"] == ""
    assert "seed" not in shown["generation"]
    assert "annotation" not in shown


def test_names_in_camel_case_and_64_bit_numbers_are_taken_too() -> None:
    message = filled({"requestId": "a", "generation": {"negativePrompt": "b", "seed": 7}})
    assert (message.request_id, message.generation.negative_prompt, message.generation.seed) == ("a", "b", 7)


def test_null_is_as_if_it_were_not_there() -> None:
    assert filled({"generation": {"steps": None, "prompt": "x"}, "annotation": None}).WhichOneof("work") == "generation"


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ([], "body"),
        ("text", "body"),
        (None, "body"),
        ({"promt": "x"}, "promt"),
        ({"generation": {"promt": "x"}}, "generation.promt"),
        ({"generation": {"controls": [{}, {"image": {"nope": 1}}]}}, "generation.controls[1].image.nope"),
        ({"generation": []}, "generation"),
        ({"generation": "x"}, "generation"),
        ({"generation": {"controls": {}}}, "generation.controls"),
        ({"generation": {"controls": [5]}}, "generation.controls[0]"),
        ({"generation": {"controls": [None]}}, "generation.controls[0]"),
        ({"generation": {"steps": "many"}}, "generation.steps"),
        ({"generation": {"steps": -1}}, "generation.steps"),
        ({"generation": {"steps": 1.5}}, "generation.steps"),
        ({"generation": {"steps": True}}, "generation.steps"),
        ({"generation": {"seed": 1 << 64}}, "generation.seed"),
        ({"generation": {"prompt": 5}}, "generation.prompt"),
        ({"generation": {"prompt": "\ud800"}}, "generation.prompt"),
        ({"generation": {"guidance_scale": "much"}}, "generation.guidance_scale"),
        ({"generation": {"controls": [{"parameters": 5}]}}, "generation.controls[0].parameters"),
        ({"annotation": {"image": {"data": "abcde"}}}, "annotation.image.data"),
        ({"annotation": {"image": {"data": "AAEC", "url": "data:,"}}}, "annotation.image.url"),
        ({"generation": {}, "annotation": {}}, "annotation"),
        ({"priority": 1e300}, "priority"),
        ({"request": 5}, "request"),
        ({"request": {"value": "x"}}, "request.@type"),
        ({"request": {"@type": 5}}, "request.@type"),
        ({"request": {"@type": "type.googleapis.com/fanlight.diffusion.v1.None"}}, "request.@type"),
        ({"request": {"@type": GENERATE, "controls": [{"nope": 1}]}}, "request.controls[0].nope"),
        ({"request": {"@type": STRUCT, "value": 5}}, "request"),
        ({"generation": {}, "request": {"@type": GENERATE}}, "request"),
        ({"generation": {"negativePrompt": "a", "negative_prompt": "a"}}, "generation.negative_prompt"),
        ({"requestId": None, "request_id": "a"}, "request_id"),
        ({"generation": {"embeddings": "a"}}, "generation.embeddings"),
        ({"generation": {"embeddings": ["a", None]}}, "generation.embeddings[1]"),
        ({"generation": {"embeddings": ["a", "b", 5]}}, "generation.embeddings[2]"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(value: object, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        filled(value)
    assert caught.value.field == field


def test_a_request_of_any_stage_is_read_by_its_type_and_written_back() -> None:
    message = filled({"request": {"@type": GENERATE, "prompt": "x", "image": {"data": "AAEC"}, "seed": 3}})
    request = diffusion_pb2.GenerateRequest()
    assert message.request.Unpack(request)
    assert (request.prompt, request.image.data, request.seed) == ("x", b"\0\1\2", 3)
    assert filled(to_json(message)) == message


@pytest.mark.parametrize(
    ("value", "field", "near"),
    [
        ({"generation": {"prommpt": "x"}}, "generation.prommpt", r"did you mean prompt or prompt_syntax\?"),
        (
            {"generation": {"negativ_prompt": "x"}},
            "generation.negativ_prompt",
            r"did you mean negative_prompt or prompt\?",
        ),
        ({"generation": {"Negative_Prompt": "x"}}, "generation.Negative_Prompt", "did you mean negative_prompt"),
        ({"generation": {"controls": [{"imge": {}}]}}, "generation.controls[0].imge", r"did you mean image\?"),
        ({"generatoin": {}}, "generatoin", r"did you mean generation\?"),
    ],
)
def test_an_unknown_field_is_answered_with_near_ones(value: object, field: str, near: str) -> None:
    with pytest.raises(InvalidField, match=near) as caught:
        filled(value)
    assert caught.value.field == field


def test_an_unknown_field_that_is_near_to_none_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidField, match="the fields are model, pipeline, prompt, negative_prompt"):
        filled({"generation": {"xyzzy": "x"}})


def nested(levels: int, kind: type = dict) -> Any:
    deep: Any = 1
    for _ in range(levels):
        deep = {"a": deep} if kind is dict else [deep]
    return deep


def test_a_list_of_names_keeps_all_of_them_in_order() -> None:
    assert list(filled({"generation": {"embeddings": ["b", "a", "b"]}}).generation.embeddings) == ["b", "a", "b"]


@pytest.mark.parametrize("levels", [25, 47, 48, 200, 900])
@pytest.mark.parametrize("kind", [dict, list])
def test_parameters_nested_without_end_are_refused(levels: int, kind: type) -> None:
    for body, field in (
        ({"annotation": {"parameters": {"a": nested(levels, kind)}}}, "annotation.parameters"),
        (
            {"generation": {"controls": [{"made_by": {"parameters": {"a": nested(levels, kind)}}}]}},
            "generation.controls[0].made_by.parameters",
        ),
        ({"request": {"@type": STRUCT, "value": {"a": nested(levels, kind)}}}, "request"),
    ):
        with pytest.raises(InvalidField, match="nested more than 24 levels deep") as caught:
            filled(body)
        assert caught.value.field == field


def test_requests_within_requests_are_refused() -> None:
    deep: Any = {"@type": GENERATE}
    for _ in range(400):
        deep = {"@type": "type.googleapis.com/fanlight.gateway.v1.CreateJobRequest", "request": deep}
    with pytest.raises(InvalidField, match="nested") as caught:
        filled({"request": deep})
    assert caught.value.field == "request"


@pytest.mark.parametrize("kind", [dict, list])
def test_what_is_taken_is_read_again_from_its_bytes(kind: type) -> None:
    message = filled({"generation": {"controls": [{"made_by": {"parameters": {"a": nested(23, kind)}}}]}})
    listed = gateway_pb2.ListJobsResponse(jobs=[gateway_pb2.Job(generation=message.generation)])
    assert gateway_pb2.ListJobsResponse.FromString(listed.SerializeToString()) == listed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "line 1 column 2"),
        (b'{"a": 1} x', "not JSON"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{"a": "\xc3("}', "not UTF-8 at byte 7"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "1e999 is not a number"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, "not JSON that we accept"),
    ],
)
def test_invalid_json_is_refused_with_its_place(data: bytes, words: str) -> None:
    with pytest.raises(InvalidField, match=words) as caught:
        parse_json(data, field="body")
    assert caught.value.field == "body"
