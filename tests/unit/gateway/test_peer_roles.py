"""Roles of client certificates, as the handshake of a real connection shows them."""

import datetime
from collections.abc import Sequence

import grpc
import grpc.aio
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fanlight.errors import PermissionDenied
from services.gateway.app.peer_roles import PeerCertificate, Role, certificate_of, read_certificate, role_of


def certificate(*, uris: Sequence[str] = (), units: Sequence[str] = (), name: str = "box") -> bytes:
    """PEM, signed by itself: who signed it is checked by the handshake."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    attributes += [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, each) for each in units]
    subject = x509.Name(attributes)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
    )
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(each) for each in uris])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("role", list(Role))
def test_the_role_is_in_the_spiffe_id_or_the_organizational_unit(role: Role) -> None:
    spiffe_id = f"spiffe://example.org/fanlight/{role}/rack-1"
    assert read_certificate(certificate(uris=[spiffe_id])) == PeerCertificate(role=role, subject=spiffe_id)
    by_unit = read_certificate(certificate(units=["Berlin", role]))
    assert by_unit.role is role
    assert "CN=box" in by_unit.subject


def test_the_spiffe_id_wins_over_the_organizational_unit() -> None:
    pem = certificate(uris=["spiffe://example.org/fanlight/worker"], units=["operator"])
    assert read_certificate(pem).role is Role.WORKER


@pytest.mark.parametrize(
    "pem",
    [
        certificate(),
        certificate(units=["Operator"]),
        certificate(units=["worker", "client"]),
        certificate(uris=["spiffe://example.org/fanlight"]),
        certificate(uris=["spiffe://example.org/other/fanlight/worker"]),
        certificate(uris=["spiffe://example.org/fanlight/root"]),
        certificate(uris=["https://example.org/fanlight/operator"]),
        certificate(uris=["spiffe://a/fanlight/worker", "spiffe://a/fanlight/client"]),
        certificate(name="operator"),
    ],
)
def test_a_certificate_without_one_role_is_refused_with_what_it_needs(pem: bytes) -> None:
    with pytest.raises(PermissionDenied, match="OU=ROLE"):
        read_certificate(pem)


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(PermissionDenied, match="cannot be read"):
        read_certificate(b"nonsense")


async def test_a_calls_context_has_the_certificate_of_its_connection() -> None:
    authority = trustme.CA()
    found: list[PeerCertificate | None] = []

    async def look(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        found.append(certificate_of(context.auth_context()))
        return b""

    server = grpc.aio.server()
    handlers = {"Look": grpc.unary_unary_rpc_method_handler(look)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", handlers),))
    own = authority.issue_cert("localhost")
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    roots = authority.cert_pem.bytes()
    secure = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair], roots, require_client_auth=True))
    plain = server.add_insecure_port("localhost:0")
    await server.start()
    mine = authority.issue_cert("box", organization_unit_name="worker")
    credentials = grpc.ssl_channel_credentials(roots, mine.private_key_pem.bytes(), mine.cert_chain_pems[0].bytes())
    async with grpc.aio.secure_channel(f"localhost:{secure}", credentials) as channel:
        await channel.unary_unary("/a.B/Look")(b"", timeout=20)
    async with grpc.aio.insecure_channel(f"localhost:{plain}") as channel:
        await channel.unary_unary("/a.B/Look")(b"", timeout=20)
    await server.stop(None)
    assert found[0] is not None
    assert found[0].role is Role.WORKER
    assert found[1] is None
    assert role_of({}) is None
