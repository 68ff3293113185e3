"""Authentication over real gRPC: only a bearer token that the called service accepts."""

import grpc
import grpc.aio
import pytest

from fanlight.preprocessor.v1 import preprocessor_pb2 as pb
from fanlight.preprocessor.v1 import preprocessor_pb2_grpc as pb_grpc
from services.kernel.config import CommonSettings
from services.kernel.grpc_server import RpcServer

SERVICE = "fanlight.preprocessor.v1.PreprocessorService"


class Servicer(pb_grpc.PreprocessorServiceServicer):
    async def Annotate(self, request, context):
        return pb.AnnotateResponse()

    async def ListAnnotators(self, request, context):
        return pb.ListAnnotatorsResponse()


@pytest.fixture
async def serve():
    running = []

    async def start(*, tokens=None, default=("right",)):
        server = RpcServer(
            CommonSettings(drain_grace_s=0),
            services={SERVICE: lambda s: pb_grpc.add_PreprocessorServiceServicer_to_server(Servicer(), s)},
            tokens=tokens or {},
            default_tokens=default,
        )
        port = server.bind("127.0.0.1:0")
        await server.start()
        running.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in running:
        await server.stop()


async def answer_to(address, *metadata):
    """The status that a call with this metadata gets."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            await pb_grpc.PreprocessorServiceStub(channel).Annotate(pb.AnnotateRequest(), metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("scheme", ["bearer", "Bearer", "BEARER"])
async def test_a_bearer_is_let_in_however_the_word_is_written(serve, scheme):
    assert await answer_to(await serve(), ("authorization", f"{scheme} right")) == grpc.StatusCode.OK


@pytest.mark.parametrize(
    "value",
    ["basic right", "token right", "digest right", "bearers right", "right", " right", "right bearer", "bearerright"],
)
async def test_the_right_token_under_any_other_scheme_or_none_is_refused(serve, value):
    assert await answer_to(await serve(), ("authorization", value)) == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("value", ["bearer right right", "bearer rightx", "bearer xright", "bearer RIGHT", "bearer"])
async def test_a_bearers_token_must_be_the_whole_one(serve, value):
    assert await answer_to(await serve(), ("authorization", value)) == grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_in_another_header_is_none(serve):
    assert await answer_to(await serve(), ("x-authorization", "bearer right")) == grpc.StatusCode.UNAUTHENTICATED


async def test_any_of_several_tokens_is_taken_and_no_mixture_of_them(serve):
    address = await serve(default=("first", "second"))
    answers = [await answer_to(address, ("authorization", f"bearer {t}")) for t in ("first", "second", "firstsecond")]
    assert answers == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED]


async def test_a_service_with_tokens_of_its_own_takes_no_others(serve):
    address = await serve(tokens={SERVICE: ("own",)}, default=("right",))
    assert await answer_to(address, ("authorization", "bearer own")) == grpc.StatusCode.OK
    assert await answer_to(address, ("authorization", "bearer right")) == grpc.StatusCode.UNAUTHENTICATED
