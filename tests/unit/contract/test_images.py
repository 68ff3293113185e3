"""Where the images of a message are, and what they are made of."""

import base64

import pytest

from fanlight.common.v1.common_pb2 import Blob, ImageSource
from fanlight.contract.images import check_source, data_of, image_at, images_of
from fanlight.diffusion.v1.diffusion_pb2 import Control, GenerateRequest
from fanlight.errors import InvalidField
from fanlight.gateway.v1.gateway_pb2 import CreateJobRequest, CreateJobsRequest
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest

DIGEST = f"sha256:{'a' * 64}"


def image(name: str) -> ImageSource:
    return ImageSource(data=name.encode())


def found_in(message) -> dict[str, bytes]:
    return {path: found.data for path, found in images_of(message)}


def test_every_image_that_is_set_is_found_with_its_path():
    controls = [Control(image=image("first")), Control(controlnet="inpaint"), Control(image=image("third"))]
    request = GenerateRequest(image=image("start"), controls=controls)

    assert found_in(request) == {"controls[0].image": b"first", "controls[2].image": b"third", "image": b"start"}
    assert not request.HasField("mask")
    assert not request.controls[1].HasField("image")


def test_images_are_found_in_what_encloses_a_request():
    annotation = CreateJobRequest(annotation=AnnotateRequest(image=image("photo")))
    generation = CreateJobRequest(generation=GenerateRequest(controls=[Control(image=image("edges"))]))

    assert found_in(CreateJobsRequest(requests=[annotation, generation])) == {
        "requests[0].annotation.image": b"photo",
        "requests[1].generation.controls[0].image": b"edges",
    }


def test_images_are_the_messages_themselves():
    request = GenerateRequest(image=image("start"))
    for _, found in images_of(request):
        found.CopyFrom(ImageSource(blob=Blob(digest=DIGEST)))

    assert request.image.blob.digest == DIGEST


def test_the_image_at_a_path_is_set_if_it_was_absent():
    request = GenerateRequest(controls=[Control(), Control()])
    image_at(request, "controls[1].image").data = b"edges"
    image_at(request, "mask")

    assert found_in(request) == {"controls[1].image": b"edges", "mask": b""}


def test_the_image_at_a_path_is_the_one_there():
    request = GenerateRequest(image=image("start"))
    assert image_at(request, "image").data == b"start"
    enclosing = CreateJobRequest()
    image_at(enclosing, "annotation.image").data = b"photo"
    assert enclosing.annotation.image.data == b"photo"


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "images", "prompt", "model", "controls", "controls[0]", "controls.image", "controls[1].image"),
        *("controls[-1].image", "controls[0].image.data", "image[0]", "image.", "controls[99999].image", "Image"),
        *("controls[0].parameters", "loras[0].model", "__class__"),
    ],
)
def test_a_path_that_is_none_is_refused(path):
    request = GenerateRequest(controls=[Control()])
    before = request.SerializeToString()
    with pytest.raises(InvalidField, match=r"leads to no image of fanlight\.diffusion\.v1\.GenerateRequest") as caught:
        image_at(request, path)

    assert caught.value.field == path
    assert request.SerializeToString() == before


@pytest.mark.parametrize(
    ("source", "data"),
    [
        (ImageSource(data=b"bytes"), b"bytes"),
        (ImageSource(url=f"data:image/png;base64,{base64.b64encode(b'bytes').decode()}"), b"bytes"),
        (ImageSource(url="DATA:,by%74es"), b"bytes"),
    ],
)
def test_bytes_come_as_they_are_or_in_a_url(source, data):
    assert data_of(source, "image") == data
    check_source(source, "image")


BROKEN = [
    (ImageSource(), "image", "give its bytes"),
    (ImageSource(data=b""), "image", "no bytes"),
    (ImageSource(url="data:,"), "image", "no bytes"),
    (ImageSource(url=""), "image.url", "data: URL"),
    (ImageSource(url="http://127.0.0.1/a.png"), "image.url", "nothing is fetched"),
    (ImageSource(url="data:image/png;base64"), "image.url", "comma"),
    (ImageSource(url="data:image/png;base64,a"), "image.url", "not base64"),
]


@pytest.mark.parametrize(("source", "field", "says"), BROKEN)
def test_a_source_without_bytes_is_refused(source, field, says):
    for ask in (data_of, check_source):
        with pytest.raises(InvalidField, match=says) as caught:
            ask(source, "image")
        assert caught.value.field == field


def test_a_blob_is_named_by_its_digest_and_has_no_bytes_here():
    check_source(ImageSource(blob=Blob(digest=DIGEST)), "image")
    with pytest.raises(InvalidField, match="is a blob"):
        data_of(ImageSource(blob=Blob(digest=DIGEST)), "image")
    with pytest.raises(InvalidField) as caught:
        check_source(ImageSource(blob=Blob(digest=DIGEST.upper())), "image")
    assert caught.value.field == "image.blob.digest"
