"""A gateway's own certificate authority and certificate, made where the operator gave none. Kept in the data folder.

Nodes trust this authority alone, by the digest in their join code, and check one fixed name, whatever address they
dial.
"""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fanlight.contract.join_code import OWN_NAME
from services.kernel.config import SettingsError

AUTHORITY_YEARS = 20
CERTIFICATE_DAYS = 730
# A certificate that ends sooner than this is made again when the gateway starts.
RENEW_BEFORE_DAYS = 365
# The clocks of nodes may lag behind ours.
BACKDATE = datetime.timedelta(days=1)
FOLDER = "tls"

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    # PEM: the certificate, then its authority's.
    chain: Path
    key: Path
    authority: Path


def own_certificate(data_dir: Path, names: Iterable[str], *, now: datetime.datetime) -> CertificateFiles:
    """Those of the data folder; what is missing, ends soon or lacks a name is made. SettingsError.

    `names`: host names and addresses by which clients call the gateway.
    """
    folder = data_dir / FOLDER
    files = CertificateFiles(
        chain=folder / "gateway.pem", key=folder / "gateway.key", authority=folder / "authority.pem"
    )
    wanted = sorted({OWN_NAME, "localhost", "127.0.0.1", "::1", *names})
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not files.authority.exists():
            _make_authority(files.authority, folder / "authority.key", now)
        if not _is_good(files, wanted, now):
            _make_certificate(files, folder / "authority.key", wanted, now)
    except OSError as error:
        raise SettingsError(f"{folder}: the gateway's certificate cannot be kept: {error.strerror or error}") from error
    except ValueError as error:
        raise SettingsError(
            f"{folder}: cannot be read as certificates and keys: {error}; move it away, then nodes join again"
        ) from error
    return files


def authority_digest(chain: bytes) -> str:
    """Hexadecimal sha256 of the DER of a PEM chain's last certificate, the one nearest to its root. SettingsError."""
    found = _PEM.findall(chain)
    if not found:
        raise SettingsError("the certificate chain has no PEM certificate")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[-1].decode())).hexdigest()


def _is_good(files: CertificateFiles, names: Sequence[str], now: datetime.datetime) -> bool:
    if not (files.chain.exists() and files.key.exists()):
        return False
    certificate = x509.load_pem_x509_certificates(files.chain.read_bytes())[0]
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    present = {str(each.value) for each in alternative}
    ends_in = certificate.not_valid_after_utc - now
    return ends_in > datetime.timedelta(days=RENEW_BEFORE_DAYS) and present >= set(names)


def _make_authority(file: Path, key_file: Path, now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fanlight gateway authority")])
    certificate = (
        _begun(name, name, key.public_key(), now, datetime.timedelta(days=365 * AUTHORITY_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    # The key first: an authority without its key would never be noticed.
    _write(key_file, _pem_of(key))
    _write(file, certificate.public_bytes(serialization.Encoding.PEM))


def _make_certificate(
    files: CertificateFiles, authority_key: Path, names: Sequence[str], now: datetime.datetime
) -> None:
    authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
    signing = serialization.load_pem_private_key(authority_key.read_bytes(), password=None)
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{authority_key.name} is not an elliptic curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fanlight gateway")])
    certificate = (
        _begun(name, authority.subject, key.public_key(), now, datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .sign(signing, hashes.SHA256())
    )
    _write(files.key, _pem_of(key))
    pem = serialization.Encoding.PEM
    _write(files.chain, certificate.public_bytes(pem) + authority.public_bytes(pem))


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all, for its owner alone."""
    partial = file.with_suffix(f"{file.suffix}.partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
