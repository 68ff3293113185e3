"""Which listeners have TLS, with which certificate, and what must be asked for by name."""

from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
from cryptography import x509

from fanlight.contract.join_code import OWN_NAME
from services.gateway.__main__ import _require_tokens
from services.gateway.adapters.encryption import Encryption, encryption_of
from services.gateway.config import GatewaySettings
from services.kernel.config import GatewayCommonSettings, SettingsError


def encrypted(folder: Path, *, common: dict[str, Any] | None = None, **settings: Any) -> Encryption:
    return encryption_of(GatewaySettings(data_dir=folder, **settings), GatewayCommonSettings(**(common or {})))


def certificate_at(found: Encryption, address: str) -> Path | None:
    settings = found.settings_of(address)
    assert (settings.tls_cert_file is None) == (settings.tls_key_file is None)
    return settings.tls_cert_file


def names_in(file: Path) -> set[str]:
    certificate = x509.load_pem_x509_certificates(file.read_bytes())[0]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(each.value) for each in names}


def test_on_loopback_nothing_is_encrypted_or_made(tmp_path: Path) -> None:
    found = encrypted(tmp_path)
    assert certificate_at(found, "127.0.0.1:50051") is None
    assert (found.authority, found.has_own_name) == ("", False)
    assert not list(tmp_path.iterdir())


def test_beyond_loopback_a_gateway_makes_its_own_certificate_for_its_names(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        found = encrypted(
            tmp_path, grpc="[::]:1", http="192.0.2.7:2", names="a.example, b.example", address="c.example:443"
        )
    chain = certificate_at(found, "[::]:1")
    assert chain is not None
    assert certificate_at(found, "192.0.2.7:2") == chain
    assert {"a.example", "b.example", "c.example", "192.0.2.7", OWN_NAME} <= names_in(chain)
    assert not {"::", ""} & names_in(chain)
    assert found.has_own_name
    assert len(found.authority) == 64
    assert logs[-1]["authority"] == str(tmp_path / "tls" / "authority.pem")


def test_what_listens_on_loopback_stays_plain_beside_what_does_not(tmp_path: Path) -> None:
    found = encrypted(tmp_path, http="0.0.0.0:2")
    assert certificate_at(found, "0.0.0.0:2") is not None
    assert certificate_at(found, "127.0.0.1:50051") is None
    # A node calls gRPC, which has no certificate that its code could name.
    assert (found.authority, found.has_own_name) == ("", False)


def test_plain_text_beyond_loopback_is_asked_for_by_name_and_warned_of(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        found = encrypted(tmp_path, grpc="0.0.0.0:1", common={"plain_text": True})
    assert certificate_at(found, "0.0.0.0:1") is None
    assert found.authority == ""
    assert [each["event"] for each in logs if each["log_level"] == "warning"] == ["plain_text_beyond_loopback"]


def test_gateways_over_one_store_are_not_started_with_certificates_that_differ(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="need one certificate"):
        encrypted(tmp_path, grpc="0.0.0.0:1", store="nats://n1:4222")
    encrypted(tmp_path, grpc="0.0.0.0:1", store="nats://n1:4222", common={"plain_text": True})


def operators(folder: Path, *names: str) -> dict[str, Path]:
    certificate = trustme.CA().issue_cert(*names)
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    return {"tls_cert_file": chain, "tls_key_file": key}


def test_the_operators_certificate_is_everywhere(tmp_path: Path) -> None:
    files = operators(tmp_path, "gateway.example")
    found = encrypted(tmp_path, grpc="0.0.0.0:1", common=files)
    for address in ("0.0.0.0:1", "127.0.0.1:8080"):
        assert certificate_at(found, address) == files["tls_cert_file"]
    assert len(found.authority) == 64
    assert not found.has_own_name
    assert not (tmp_path / "tls").exists()


def test_a_certificate_that_a_gateway_made_can_be_given_to_others(tmp_path: Path) -> None:
    first = encrypted(tmp_path, grpc="0.0.0.0:1")
    files = {"tls_cert_file": tmp_path / "tls" / "gateway.pem", "tls_key_file": tmp_path / "tls" / "gateway.key"}
    second = encrypted(tmp_path / "other", grpc="0.0.0.0:1", store="nats://n1:4222", common=files)
    assert (second.authority, second.has_own_name) == (first.authority, True)


def test_client_certificates_are_never_asked_for_in_plain_text(tmp_path: Path) -> None:
    roots = tmp_path / "ca.pem"
    roots.write_bytes(trustme.CA().cert_pem.bytes())
    found = encrypted(tmp_path, common={"tls_client_ca_file": roots})
    assert certificate_at(found, "127.0.0.1:50051") is not None
    with pytest.raises(SettingsError, match="FANLIGHT_PLAIN_TEXT is set"):
        encrypted(tmp_path, common={"tls_client_ca_file": roots, "plain_text": True})


def refused(common: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        _require_tokens(GatewaySettings(**settings), GatewayCommonSettings(**common))
    return str(raised.value)


def test_a_certificate_replaces_no_token(tmp_path: Path) -> None:
    roots = tmp_path / "ca.pem"
    roots.write_bytes(trustme.CA().cert_pem.bytes())
    assert "a certificate replaces no token" in refused({"tls_client_ca_file": roots})
    _require_tokens(
        GatewaySettings(grpc="0.0.0.0:1"), GatewayCommonSettings(tls_client_ca_file=roots, client_token="c")
    )


def test_beyond_loopback_clients_need_a_token_and_workers_no_shared_one() -> None:
    assert "FANLIGHT_CLIENT_TOKEN" in refused({}, grpc="0.0.0.0:1")
    assert "FANLIGHT_CLIENT_TOKEN" in refused({"worker_token": "w"})
    _require_tokens(GatewaySettings(grpc="0.0.0.0:1", http="0.0.0.0:2"), GatewayCommonSettings(client_token="c"))
