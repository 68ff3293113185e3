"""What the client certificate of a connection allows, with mutual TLS: a worker's is not a client's.

A certificate has its role in a SPIFFE id, `spiffe://TRUST-DOMAIN/fanlight/ROLE` with or without more behind it, or else
in its subject's organizational unit, `OU=ROLE`. ROLE is `worker`, `client` or `operator`. A worker's certificate lets a
node join without a code. Beside that a certificate replaces no token: it says which services a caller may use at all.
"""

import functools
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID

from fanlight.errors import PermissionDenied

PEM_KEY = "x509_pem_cert"
SUBJECT_LIMIT_CHARS = 512
# Certificates whose role is remembered; reading one takes a tenth of a millisecond.
REMEMBERED = 4_096
_FOLDER = "fanlight"


class Role(StrEnum):
    WORKER = "worker"
    CLIENT = "client"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCertificate:
    role: Role
    # The SPIFFE id, or else the certificate's subject.
    subject: str


def auth_context_of(der: bytes | None) -> Mapping[str, Iterable[bytes]]:
    """As gRPC's, of a connection that shows that certificate; None for a connection without one."""
    return {PEM_KEY: [ssl.DER_cert_to_PEM_cert(der).encode()]} if der else {}


def role_of(auth_context: Mapping[str, Iterable[bytes]]) -> Role | None:
    """Of the connection's certificate; None for a connection without one. PermissionDenied where it has no role."""
    found = certificate_of(auth_context)
    return found.role if found else None


def require_role(auth_context: Mapping[str, Iterable[bytes]], *allowed: Role) -> None:
    """PermissionDenied for a certificate of another role. Without mutual TLS there is none, and all pass."""
    role = role_of(auth_context)
    if role is not None and role not in allowed:
        raise PermissionDenied(
            f"your client certificate's role is {role}; this takes {' or '.join(allowed)}: connect with another one"
        )


def certificate_of(auth_context: Mapping[str, Iterable[bytes]]) -> PeerCertificate | None:
    """The connection's certificate, which its handshake has verified. As `role_of`.

    `auth_context`: what a call's context returns.
    """
    pem = next(iter(auth_context.get(PEM_KEY, ())), b"")
    return read_certificate(pem) if pem else None


@functools.lru_cache(maxsize=REMEMBERED)
def read_certificate(pem: bytes) -> PeerCertificate:
    """PermissionDenied where it has no role, or several."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        ids = _spiffe_ids(certificate)
        units = [
            str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        ]
    except ValueError as error:
        raise PermissionDenied("your client certificate cannot be read") from error
    by_id = {role for each in ids if (role := _role_in(each))}
    roles = by_id or {Role(each) for each in units if each in list(Role)}
    if len(roles) != 1:
        raise PermissionDenied(
            "your client certificate has no role, or several: it needs one SPIFFE id spiffe://DOMAIN/fanlight/ROLE or"
            " one OU=ROLE, where ROLE is worker, client or operator"
        )
    subject = ids[0] if ids else certificate.subject.rfc4514_string()
    if len(subject) > SUBJECT_LIMIT_CHARS or not subject.isprintable():
        raise PermissionDenied(f"your client certificate's subject must be printable, at most {SUBJECT_LIMIT_CHARS}")
    return PeerCertificate(role=roles.pop(), subject=subject)


def _spiffe_ids(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return [each for each in uris if each.startswith("spiffe://")]


def _role_in(spiffe_id: str) -> Role | None:
    parts = urlsplit(spiffe_id).path.split("/")[1:]
    return Role(parts[1]) if len(parts) > 1 and parts[0] == _FOLDER and parts[1] in list(Role) else None
