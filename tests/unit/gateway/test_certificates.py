"""The certificate that a gateway makes for itself."""

import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from fanlight.contract.join_code import OWN_NAME
from services.gateway.adapters.certificates import authority_digest, own_certificate
from services.kernel.config import SettingsError

NOW = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
YEAR = datetime.timedelta(days=365)


def names_of(chain: Path) -> set[str]:
    leaf = x509.load_pem_x509_certificates(chain.read_bytes())[0]
    return {str(each.value) for each in leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value}


def test_a_gateway_makes_an_authority_and_a_certificate_for_its_owner_alone(tmp_path: Path) -> None:
    files = own_certificate(tmp_path, ["gateway.example", "10.0.0.7"], now=NOW)
    assert names_of(files.chain) >= {OWN_NAME, "localhost", "127.0.0.1", "gateway.example", "10.0.0.7"}
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.chain, files.key)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files.key.parent.iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(files.key.parent.stat().st_mode) == 0o700


def test_it_stays_the_same_until_it_ends_soon_and_the_authority_stays_even_then(tmp_path: Path) -> None:
    first = own_certificate(tmp_path, [], now=NOW)
    chain, digest = first.chain.read_bytes(), authority_digest(first.chain.read_bytes())
    assert own_certificate(tmp_path, [], now=NOW + YEAR / 2).chain.read_bytes() == chain
    later = own_certificate(tmp_path, [], now=NOW + 1.5 * YEAR).chain.read_bytes()
    assert later != chain
    assert authority_digest(later) == digest


def test_a_new_name_makes_a_new_certificate_of_the_same_authority(tmp_path: Path) -> None:
    before = authority_digest(own_certificate(tmp_path, [], now=NOW).chain.read_bytes())
    files = own_certificate(tmp_path, ["other.example"], now=NOW)
    assert "other.example" in names_of(files.chain)
    assert authority_digest(files.chain.read_bytes()) == before


def test_damaged_files_are_named(tmp_path: Path) -> None:
    files = own_certificate(tmp_path, [], now=NOW)
    files.chain.write_text("garbage")
    with pytest.raises(SettingsError, match="tls"):
        own_certificate(tmp_path, [], now=NOW)
    with pytest.raises(SettingsError, match="PEM"):
        authority_digest(b"garbage")
