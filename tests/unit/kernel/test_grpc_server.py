"""A server of ours over real gRPC on loopback: who may call, how errors leave, what health says."""

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fanlight.channel import MAX_MESSAGE_BYTES, open_channel
from fanlight.errors import InvalidField
from fanlight.preprocessor.v1 import preprocessor_pb2 as pb
from fanlight.preprocessor.v1 import preprocessor_pb2_grpc as pb_grpc
from services.kernel.config import MIB, CommonSettings, SettingsError
from services.kernel.grpc_server import RpcServer, is_loopback, require_tokens

SERVICE = "fanlight.preprocessor.v1.PreprocessorService"


class Servicer(pb_grpc.PreprocessorServiceServicer):
    async def ListAnnotators(self, request, context):
        raise ZeroDivisionError("a secret of the inside")

    async def Annotate(self, request, context):
        if request.annotator == "unknown":
            raise InvalidField("is not known", field="annotator")
        return pb.AnnotateResponse(image=request.image.data)


@pytest.fixture
async def serve():
    """Start a server with given settings and token; the address to dial."""
    running = []

    async def start(token="", address="127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES, **settings):
        server = RpcServer(
            CommonSettings(**{"drain_grace_s": 0, **settings}),
            services={SERVICE: lambda s: pb_grpc.add_PreprocessorServiceServicer_to_server(Servicer(), s)},
            tokens={},
            default_tokens=(token,) if token else (),
            max_message_bytes=max_message_bytes,
        )
        port = server.bind(address)
        await server.start()
        await server.set_serving(True)
        running.append(server)
        return f"localhost:{port}"

    yield start
    for server in running:
        await server.stop()


async def call(address, request=None, **channel):
    async with open_channel(address, **channel) as opened:
        stub = pb_grpc.PreprocessorServiceStub(opened)
        return await stub.Annotate(request or pb.AnnotateRequest(annotator="canny"), timeout=10)


async def code_of(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code()


async def test_the_right_token_is_let_in(serve):
    address = await serve(token="right")

    assert await call(address, token="right") == pb.AnnotateResponse()


@pytest.mark.parametrize("token", ["", "wrong", "righ"])
async def test_any_other_token_is_refused(serve, token):
    address = await serve(token="right")

    assert await code_of(call(address, token=token)) == grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open_and_knows_every_service_by_name(serve):
    async with open_channel(await serve(token="right")) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(serve):
    async with open_channel(await serve()) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for answer in stub.ServerReflectionInfo(iter(asked), timeout=10):
            assert SERVICE in {service.name for service in answer.list_services_response.service}


async def test_an_error_of_ours_names_the_field(serve):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(await serve(), pb.AnnotateRequest(annotator="unknown"))

    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "annotator: is not known"


async def test_an_unknown_exception_leaves_nothing_but_a_reference(serve):
    async with open_channel(await serve()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PreprocessorServiceStub(channel).ListAnnotators(pb.ListAnnotatorsRequest(), timeout=10)

    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        (b"\xff\xff\xff", "request: cannot be read"),
        (b"\x0a\x02\xc3\x28", "annotator: must be UTF-8"),
        (b"\x12\x04\x1a\x02\xc3\x28", "image.url: must be UTF-8"),
    ],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(serve, garbage, message):
    address = await serve()
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/Annotate")(garbage, timeout=10)

    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(message)
    assert await call(address) == pb.AnnotateResponse()


async def test_a_message_above_the_limit_is_refused_and_the_next_one_served(serve):
    address = await serve(max_message_bytes=MIB)
    large = pb.AnnotateRequest(annotator="canny")
    large.image.data = bytes(2 * MIB)

    assert await code_of(call(address, large)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call(address) == pb.AnnotateResponse()


async def test_tls_from_pem_files(serve, tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    for name, blob in {
        "key": issued.private_key_pem,
        "cert": issued.cert_chain_pems[0],
        "roots": authority.cert_pem,
    }.items():
        blob.write_to_path(str(tmp_path / name))

    address = await serve(tls_cert_file=tmp_path / "cert", tls_key_file=tmp_path / "key")

    assert await call(address, ca_file=tmp_path / "roots") == pb.AnnotateResponse()


@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.2"])
async def test_of_several_addresses_over_tls_the_certificate_must_have_the_first(serve, tmp_path, name):
    authority = trustme.CA()
    leaf = authority.issue_cert(name)
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    leaf.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = {"tls_cert_file": tmp_path / "cert.pem", "tls_key_file": tmp_path / "key.pem"}
    ports = [(await serve(**files)).rpartition(":")[2] for _ in range(2)]
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    if name == "127.0.0.1":
        await call(addresses, ca_file=tmp_path / "ca.pem")
    else:
        assert await code_of(call(addresses, ca_file=tmp_path / "ca.pem")) is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_and_key_of_two_are_a_settings_error(serve, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_pem.write_to_path(str(tmp_path / "key"))
    authority.issue_cert("localhost").cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))

    with pytest.raises(SettingsError, match="not a PEM certificate chain and its key"):
        await serve(tls_cert_file=tmp_path / "cert", tls_key_file=tmp_path / "key")


async def test_localhost_is_both_loopbacks(serve):
    address = await serve(address="[::]:0")
    port = address.rpartition(":")[2]

    for host in ("127.0.0.1", "[::1]"):
        assert await call(f"{host}:{port}") == pb.AnnotateResponse()


async def test_a_port_that_is_taken_is_a_settings_error(serve):
    address = (await serve()).replace("localhost", "127.0.0.1")

    with pytest.raises(SettingsError, match="cannot listen"):
        await serve(address=address)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "node.example:1"])
def test_off_loopback_needs_tokens(address):
    assert not is_loopback(address)
    with pytest.raises(SettingsError, match="FANLIGHT_CLIENT_TOKEN"):
        require_tokens(address, {"FANLIGHT_CLIENT_TOKEN": ""})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_none(address):
    require_tokens(address, {"FANLIGHT_CLIENT_TOKEN": ""})
