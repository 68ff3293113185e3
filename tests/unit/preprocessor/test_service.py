"""PreprocessorService over real gRPC on loopback."""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator

import grpc.aio
import numpy as np
import pytest
from google.protobuf import struct_pb2
from PIL import Image

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.errors import FanlightError, InvalidField, NotFound, ResourceExhausted, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2 as pb
from fanlight.preprocessor.v1 import preprocessor_pb2_grpc as pb_grpc
from services.kernel.config import MIB, CommonSettings
from services.kernel.errors_wire import from_rpc_error
from services.kernel.grpc_server import RpcServer
from services.kernel.images import ImageLimits
from services.preprocessor.annotator import Annotator
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import Registry, core
from services.preprocessor.service import PreprocessorService
from services.worker.admission import Admission
from tests.fakes.annotators import PATIENCE_S, Gate
from tests.fakes.broken_images import huge_png
from tests.fakes.synthetic_images import decoded, encoded, saved, scene

LIMITS = ImageLimits(size_bytes=MIB // 2, pixels=4_000_000, side_px=5_000)
NAME = "fanlight.preprocessor.v1.PreprocessorService"


def _palette() -> Image.Image:
    """With a transparent color."""
    image = Image.fromarray(scene(40, 30)).quantize(8)
    image.info["transparency"] = 0
    return image


# Encoded images that are valid but unusual, and the size of their control images.
UNUSUAL = {
    "1 x 1": (encoded(scene(1, 1)), (1, 1)),
    "1 x 5000": (encoded(scene(1, 5000)), (1, 5000)),
    "16 bits": (saved(Image.fromarray(scene(40, 30)[:, :, 0].astype(np.uint16) * 257), "PNG"), (40, 30)),
    "CMYK": (saved(Image.fromarray(scene(40, 30)).convert("CMYK"), "JPEG"), (40, 30)),
    "animated": (
        saved(Image.fromarray(scene(40, 30)), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
        (40, 30),
    ),
    "palette with transparency": (saved(_palette(), "PNG", transparency=0), (40, 30)),
    "broken EXIF": (saved(Image.fromarray(scene(40, 30)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), (40, 30)),
}


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def _fragile(image: np.ndarray) -> np.ndarray:
    """Fails with an unexpected error on narrow images."""
    if image.shape[1] < 16:
        raise RuntimeError("secret")
    return image


@pytest.fixture
def service(gate) -> Iterator[PreprocessorService]:
    """One slot, and one call that may wait."""
    engine = AnnotationEngine(threads=1, limits=LIMITS)
    admission = Admission(slots=1, waiting_limit=1)
    fragile = Annotator(id="fragile", description="Breaks on narrow images", apply=_fragile)
    registry = Registry([*core(), gate.annotator(), fragile])
    yield PreprocessorService(registry, engine, admission, limits=LIMITS, max_message_bytes=MIB)
    gate.opened.set()
    engine.close()


@pytest.fixture
async def stub(service, gate) -> AsyncIterator[pb_grpc.PreprocessorServiceStub]:
    """Messages have at most 1 MiB."""
    server = RpcServer(
        CommonSettings(drain_grace_s=0),
        services={NAME: lambda rpc: pb_grpc.add_PreprocessorServiceServicer_to_server(service, rpc)},
        tokens={},
        default_tokens=(),
        max_message_bytes=MIB,
    )
    port = server.bind("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield pb_grpc.PreprocessorServiceStub(channel)
    gate.opened.set()
    await server.stop()


def request(annotator: str = "canny", data: bytes | None = None, **fields: object) -> pb.AnnotateRequest:
    image = common_pb2.ImageSource(data=encoded(scene()) if data is None else data)
    return pb.AnnotateRequest(**{"annotator": annotator, "image": image, **fields})


def parameters(**values: object) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


async def error_of(stub: pb_grpc.PreprocessorServiceStub, asked: pb.AnnotateRequest) -> FanlightError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Annotate(asked, timeout=PATIENCE_S)
    return from_rpc_error(raised.value)


async def test_every_annotator_is_listed_with_its_description(stub):
    listed = await stub.ListAnnotators(pb.ListAnnotatorsRequest())
    canny = listed.annotators[0]
    assert (canny.id, canny.deterministic, canny.loaded, canny.weight_bytes) == ("canny", True, True, 0)
    assert (canny.device, canny.license, list(canny.controlnets)) == ("cpu/uint8", "Apache-2.0", ["canny"])
    low, _, gray, *_ = canny.parameters
    assert list(canny.aliases) == ["Canny", "canny_edge"]
    assert [each.name for each in canny.parameters][3:] == ["detect_resolution", "resize_mode", "short_side_px"]
    assert (low.kind, low.default_value.number_value, low.minimum, low.maximum) == (
        pb.Parameter.KIND_INTEGER,
        100,
        0,
        2040,
    )
    assert gray.kind == pb.Parameter.KIND_BOOLEAN
    assert gray.default_value.WhichOneof("kind") == "bool_value"
    assert not gray.HasField("minimum")


async def test_every_listed_annotator_takes_its_listed_defaults(stub, gate):
    gate.opened.set()
    listed = await stub.ListAnnotators(pb.ListAnnotatorsRequest())
    for annotator in listed.annotators:
        struct = struct_pb2.Struct()
        for parameter in annotator.parameters:
            struct.fields[parameter.name].CopyFrom(parameter.default_value)
        explicit = await stub.Annotate(request(annotator.id, parameters=struct))
        implicit = await stub.Annotate(request(annotator.id))
        assert explicit.image == implicit.image


async def test_an_image_becomes_a_control_image(stub):
    answer = await stub.Annotate(request("invert"))
    assert np.array_equal(decoded(answer.image), 255 - scene())
    assert (answer.media_type, answer.width_px, answer.height_px) == ("image/png", 192, 128)
    assert [span.name for span in answer.spans] == ["waiting", "decode", "annotate", "encode"]
    assert all(span.duration_s >= 0 for span in answer.spans)


async def test_an_image_may_be_a_data_url(stub):
    url = "data:image/png;base64," + base64.b64encode(encoded(scene())).decode()
    answer = await stub.Annotate(request(image=common_pb2.ImageSource(url=url)))
    assert answer.image == (await stub.Annotate(request())).image


async def test_parameters_and_size_are_used(stub):
    plain = await stub.Annotate(request())
    tuned = await stub.Annotate(request(parameters=parameters(low_threshold=20, high_threshold=60, gray=True)))
    assert tuned.image != plain.image
    small = await stub.Annotate(request(width_px=64, height_px=32))
    assert (small.width_px, small.height_px) == (64, 32)
    assert decoded(small.image).shape == (32, 64, 3)


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"annotator": "openpose"}, NotFound, "annotator"),
        ({"annotator": ""}, InvalidField, "annotator"),
        ({"annotator": "x" * 100_000}, TooLarge, "annotator"),
        ({"parameters": parameters(low_threshold=-1)}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold=100.5)}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold="100")}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold=True)}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold=None)}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold=[1])}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold={"a": 1})}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold=float("nan"))}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(low_threshold=1e300)}, InvalidField, "parameters.low_threshold"),
        ({"parameters": parameters(gray=1)}, InvalidField, "parameters.gray"),
        ({"parameters": parameters(seed=1)}, InvalidField, "parameters.seed"),
        ({"annotator": "shuffle", "parameters": parameters(seed=2**32)}, InvalidField, "parameters.seed"),
        ({"width_px": 64}, InvalidField, "height_px"),
        ({"width_px": 8, "height_px": 64}, InvalidField, "width_px"),
        ({"width_px": 64, "height_px": 8_193}, InvalidField, "height_px"),
        ({"width_px": 5_001, "height_px": 64}, TooLarge, "width_px"),
        ({"width_px": 2_048, "height_px": 2_048}, TooLarge, "width_px"),
        ({"image": None}, InvalidField, "image"),
        ({"image": common_pb2.ImageSource(data=b"")}, InvalidField, "image"),
        ({"image": common_pb2.ImageSource(data=b"no image")}, InvalidField, "image"),
        ({"image": common_pb2.ImageSource(data=encoded(scene())[:5_000])}, InvalidField, "image"),
        ({"image": common_pb2.ImageSource(data=huge_png())}, TooLarge, "image"),
        ({"image": common_pb2.ImageSource(data=bytes(MIB // 2 + 1))}, TooLarge, "image"),
        ({"image": common_pb2.ImageSource(url="http://127.0.0.1:1/")}, InvalidField, "image.url"),
        ({"image": common_pb2.ImageSource(blob=common_pb2.Blob(digest=f"sha256:{0:064}"))}, InvalidField, "image.blob"),
    ],
)
async def test_a_wrong_request_names_its_field_and_the_next_one_works(stub, fields, kind, field):
    error = await error_of(stub, request(**fields))
    assert (type(error), error.field) == (kind, field)
    assert (await stub.Annotate(request())).image


async def test_a_field_newer_than_the_workers_contract_is_refused_by_its_number(stub):
    # A varint of field 31, and one of field 30 in the image.
    for newer, number in (
        (pb.AnnotateRequest.FromString(request().SerializeToString() + b"\xf8\x01\x01"), "field 31 of"),
        (request(image=common_pb2.ImageSource.FromString(b"\xf0\x01\x01")), "field 30 of"),
    ):
        error = await error_of(stub, newer)
        assert isinstance(error, InvalidField)
        assert number in error.message


async def test_a_control_image_too_large_for_a_response_is_refused_with_advice(stub):
    noise = np.random.RandomState(0).randint(0, 256, (700, 700, 3)).astype(np.uint8)
    photo = saved(Image.fromarray(noise), "JPEG", quality=40)
    error = await error_of(stub, request("invert", photo))
    assert isinstance(error, TooLarge)
    assert "width_px" in error.message
    assert (await stub.Annotate(request("invert", photo, width_px=300, height_px=300))).image


async def test_too_many_waiting_calls_get_a_time_to_retry(stub, gate):
    running = asyncio.create_task(_annotate(stub))
    assert await asyncio.to_thread(gate.started.acquire, True, PATIENCE_S)
    waiting = [asyncio.create_task(_annotate(stub)) for _ in range(2)]
    refused, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        refused.pop().result()
    error = from_rpc_error(raised.value)
    assert isinstance(error, ResourceExhausted)
    assert error.retry_after_s
    gate.opened.set()
    assert (await running).image
    done, _ = await asyncio.wait(waiting, timeout=PATIENCE_S)
    assert len([task for task in done if task.exception() is None]) == 1


async def _annotate(stub: pb_grpc.PreprocessorServiceStub) -> pb.AnnotateResponse:
    return await stub.Annotate(request("gated"), timeout=PATIENCE_S)


async def test_a_call_that_its_client_cancels_frees_its_slot(stub, gate):
    call = stub.Annotate(request("gated"), timeout=PATIENCE_S)
    task = asyncio.ensure_future(call)
    assert await asyncio.to_thread(gate.started.acquire, True, PATIENCE_S)
    call.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await stub.Annotate(request(), timeout=PATIENCE_S)).image


def wanted(annotator: str, **fields: object) -> pb.RequestedAnnotation:
    return pb.RequestedAnnotation(annotator=annotator, **fields)


async def many(stub: pb_grpc.PreprocessorServiceStub, *annotations: pb.RequestedAnnotation, data: bytes | None = None):
    image = common_pb2.ImageSource(data=encoded(scene()) if data is None else data)
    asked = pb.AnnotateManyRequest(image=image, annotations=annotations)
    return [answer async for answer in stub.AnnotateMany(asked, timeout=PATIENCE_S)]


async def test_one_image_is_annotated_in_several_ways_each_as_if_alone(stub):
    answers = await many(stub, wanted("canny"), wanted("invert", width_px=32, height_px=16), wanted("inpaint"))
    by_index = {each.index: each.answer for each in answers}
    assert sorted(by_index) == [0, 1, 2]
    assert by_index[0].image == (await stub.Annotate(request("canny"))).image
    assert (by_index[1].width_px, by_index[1].height_px) == (32, 16)
    assert by_index[2].device == "cpu/uint8"


async def test_several_annotators_take_one_data_url(stub):
    data = encoded(scene())
    image = common_pb2.ImageSource(url=f"data:image/png;base64,{base64.b64encode(data).decode()}")
    asked = pb.AnnotateManyRequest(image=image, annotations=[wanted("canny"), wanted("inpaint")])
    answers = [answer async for answer in stub.AnnotateMany(asked, timeout=PATIENCE_S)]
    by_index = {each.index: each.answer.image for each in answers}
    assert by_index == {each.index: each.answer.image for each in await many(stub, wanted("canny"), wanted("inpaint"))}


async def test_answers_come_as_they_are_ready(stub, gate):
    image = common_pb2.ImageSource(data=encoded(scene()))
    asked = pb.AnnotateManyRequest(image=image, annotations=[wanted("invert"), wanted("gated")])
    call = stub.AnnotateMany(asked, timeout=PATIENCE_S)
    first = await call.read()
    assert (first.index, first.answer.width_px) == (0, 192)
    gate.opened.set()
    assert (await call.read()).index == 1


async def test_an_unexpected_failure_is_reported_in_its_place_and_ends_no_other(stub):
    answers = await many(stub, wanted("fragile"), wanted("canny"), data=encoded(scene(8, 8)))
    by_index = {each.index: each for each in answers}
    assert (by_index[0].failure.reason, by_index[0].failure.part) == ("ANNOTATOR_FAILED", "annotator:fragile")
    assert "secret" not in by_index[0].failure.message
    assert by_index[1].answer.image


async def test_an_image_is_decoded_for_several_annotators_only_in_a_slot(stub, gate):
    running = asyncio.create_task(_annotate(stub))
    assert await asyncio.to_thread(gate.started.acquire, True, PATIENCE_S)
    calls = [asyncio.create_task(many(stub, wanted("canny"))) for _ in range(2)]
    refused, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        refused.pop().result()
    assert isinstance(from_rpc_error(raised.value), ResourceExhausted)
    gate.opened.set()
    assert (await running).image
    assert (await waiting.pop())[0].answer.image


async def test_a_client_that_goes_away_between_two_answers_leaves_nothing_behind(service, gate):
    image = common_pb2.ImageSource(data=encoded(scene()))
    asked = pb.AnnotateManyRequest(image=image, annotations=[wanted("invert"), wanted("gated"), wanted("gated")])
    answers = service.AnnotateMany(asked, None)
    assert (await anext(answers)).index == 0
    closing = asyncio.create_task(answers.aclose())
    await asyncio.sleep(0)
    gate.opened.set()
    await closing
    assert (await service.Annotate(request(), None)).image


async def test_a_failure_is_reported_in_its_place_and_ends_no_other(stub):
    noise = np.random.RandomState(0).randint(0, 256, (700, 700, 3)).astype(np.uint8)
    photo = saved(Image.fromarray(noise), "JPEG", quality=40)
    answers = await many(stub, wanted("invert"), wanted("canny"), data=photo)
    by_index = {each.index: each for each in answers}
    assert by_index[0].failure.reason == "TOO_LARGE"
    assert by_index[1].answer.image


@pytest.mark.parametrize(
    ("annotations", "kind", "field"),
    [
        ([], InvalidField, "annotations"),
        ([wanted("canny")] * 33, TooLarge, "annotations"),
        ([wanted("canny"), wanted("nonsense")], NotFound, "annotations[1].annotator"),
        ([wanted("canny", parameters=parameters(f=3))], InvalidField, "annotations[0].parameters.f"),
        ([wanted("canny", width_px=64)], InvalidField, "annotations[0].height_px"),
    ],
)
async def test_wrong_annotations_are_refused_before_anything_is_done(stub, annotations, kind, field):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await many(stub, *annotations)
    error = from_rpc_error(raised.value)
    assert (type(error), error.field) == (kind, field)


async def test_data_that_is_not_an_image_ends_the_call(stub):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await many(stub, wanted("canny"), data=b"no image")
    assert from_rpc_error(raised.value).field == "image"


async def test_other_services_names_are_accepted(stub):
    assert (await stub.Annotate(request("canny_edge"))).image == (await stub.Annotate(request("canny"))).image


@pytest.mark.parametrize("annotator", [each.id for each in core()])
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
async def test_unusual_images_keep_their_size(stub, annotator, name):
    data, size = UNUSUAL[name]
    answer = await stub.Annotate(request(annotator, data), timeout=PATIENCE_S)
    assert (answer.width_px, answer.height_px) == size
    assert decoded(answer.image).shape == (size[1], size[0], 3)
