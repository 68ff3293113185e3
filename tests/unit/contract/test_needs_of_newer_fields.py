"""Fields that are newer than this side are found, wherever they are."""

import pytest
from google.protobuf.message import Message

from fanlight.common.v1.common_pb2 import ImageSource
from fanlight.contract.needs import REVISION, UnknownField, contract_revision, refuse_unknown_fields, unknown_fields
from fanlight.diffusion.v1.diffusion_pb2 import Control, GenerateRequest
from fanlight.errors import InvalidField
from fanlight.gateway.v1.gateway_pb2 import CreateJobRequest
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest

GENERATE, CONTROL = "fanlight.diffusion.v1.GenerateRequest", "fanlight.diffusion.v1.Control"


def with_field(message: Message, number: int, value: bytes = b"new") -> Message:
    """The message, read from bytes in which a field of that number comes last."""
    tag, key = number << 3 | 2, bytearray()
    while tag > 127:
        key.append(tag & 127 | 128)
        tag >>= 7
    key.append(tag)
    return type(message).FromString(message.SerializeToString() + bytes(key) + bytes([len(value)]) + value)


def test_a_message_of_this_contract_has_none():
    request = GenerateRequest(prompt="a cup", controls=[Control(image=ImageSource(data=b"image"))])
    request.controls[0].parameters.update({"low": 1})
    assert unknown_fields(request) == []
    refuse_unknown_fields(request)


def test_a_newer_field_is_found_at_the_top():
    request = with_field(with_field(with_field(GenerateRequest(prompt="a cup"), 2000), 999), 999)
    assert unknown_fields(request) == [
        UnknownField(path="", message_name=GENERATE, number=999),
        UnknownField(path="", message_name=GENERATE, number=2000),
    ]
    assert unknown_fields(request)[0].need == f"field:{GENERATE}:999"


def test_a_newer_field_is_found_below():
    control = with_field(Control(image=with_field(ImageSource(data=b"image"), 9)), 40)
    request = CreateJobRequest(generation=GenerateRequest(controls=[Control(), control]))
    assert [(each.field, each.message_name) for each in unknown_fields(request)] == [
        ("generation.controls[1].40", CONTROL),
        ("generation.controls[1].image.9", "fanlight.common.v1.ImageSource"),
    ]


def test_a_newer_field_outlives_being_sent_on():
    request = with_field(GenerateRequest(prompt="a cup"), 999)
    copy = GenerateRequest()
    copy.CopyFrom(request)
    copy.MergeFrom(GenerateRequest(seed=1))
    assert [each.number for each in unknown_fields(GenerateRequest.FromString(copy.SerializeToString()))] == [999]


def test_a_newer_field_is_refused_by_its_number():
    request = GenerateRequest(controls=[with_field(Control(), 40)])
    with pytest.raises(InvalidField, match=rf"^field 40 of {CONTROL} is newer") as caught:
        refuse_unknown_fields(request)

    assert caught.value.field == "controls[0].40"


def test_a_side_says_the_last_field_of_every_message_below():
    known = contract_revision(GenerateRequest, AnnotateRequest)
    assert known.revision == REVISION == 2
    last = {message.name: message.last_field for message in known.messages}
    assert list(last) == sorted(last)
    assert set(last) == {
        *(GENERATE, CONTROL, "fanlight.diffusion.v1.LoraUse", "fanlight.diffusion.v1.AnnotatorUse"),
        *("fanlight.preprocessor.v1.AnnotateRequest", "fanlight.common.v1.ImageSource", "fanlight.common.v1.Blob"),
    }
    assert last[GENERATE] == max(field.number for field in GenerateRequest.DESCRIPTOR.fields)
