"""Settings come from the environment, and a wrong or unknown one is an error that names it."""

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.gateway.config import GatewaySettings
from services.kernel.config import (
    MIB,
    Address,
    CommonSettings,
    GatewayCommonSettings,
    SettingsError,
    drop_operator_secrets,
    load,
    refuse_unknown,
)


class OwnSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_GATEWAY_", frozen=True)

    grpc: Address = "127.0.0.1:50051"
    lease_ttl_s: float = Field(20.0, gt=0)
    prefix: str = Field("a", pattern="^[a-z]+$", max_length=3)
    name: str = Field("a", min_length=1)
    replicas: int = Field(1, lt=6)
    limit_bytes: int = Field(MIB, ge=MIB)


def test_defaults_need_no_environment(monkeypatch):
    monkeypatch.delenv("FANLIGHT_LOG_LEVEL", raising=False)

    assert load(CommonSettings).log_level == "info"


@pytest.mark.parametrize(
    ("name", "value"),
    [("FANLIGHT_GATEWAY_GRPC", "nowhere"), ("FANLIGHT_GATEWAY_GRPC", "::1:5"), ("FANLIGHT_GATEWAY_LEASE_TTL_S", "-1")],
)
def test_a_wrong_setting_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=name):
        load(OwnSettings)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FANLIGHT_DRAIN_GRACE_S", "soon", "must be a number"),
        ("FANLIGHT_DRAIN_GRACE_S", "-1", "must be at least 0"),
        ("FANLIGHT_LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_a_wrong_setting_says_what_would_be_right(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        load(CommonSettings)

    assert str(caught.value) == f"{name}: {words}"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GRPC", "nowhere", "must be HOST:PORT, such as 127.0.0.1:50051 or [::]:50051"),
        ("LEASE_TTL_S", "0", "must be above 0"),
        ("PREFIX", "a b", "must match ^[a-z]+$"),
        ("PREFIX", "abcd", "must have at most 3 characters"),
        ("NAME", "", "must have at least 1 characters"),
        ("REPLICAS", "1.5", "must be a whole number"),
        ("REPLICAS", "9" * 5_000, "must be a whole number of fewer digits"),
        ("REPLICAS", "6", "must be below 6"),
        ("LIMIT_BYTES", "5", "must be at least 1048576"),
    ],
)
def test_every_kind_of_limit_is_explained(monkeypatch, name, value, words):
    monkeypatch.setenv(f"FANLIGHT_GATEWAY_{name}", value)

    with pytest.raises(SettingsError) as caught:
        load(OwnSettings)

    assert str(caught.value) == f"FANLIGHT_GATEWAY_{name}: {words}"


def test_the_name_of_a_bucket_is_a_word(monkeypatch):
    monkeypatch.setenv("FANLIGHT_GATEWAY_NATS_PREFIX", "all.>")

    with pytest.raises(SettingsError, match="NATS_PREFIX: must match"):
        load(GatewaySettings)


@pytest.mark.parametrize("name", ["FANLIGHT_GATEWAY_LEASE_TLL_S", "FANLIGHT_LOGLEVEL"])
def test_an_unknown_setting_is_an_error(name):
    with pytest.raises(SettingsError, match=name):
        refuse_unknown(CommonSettings, OwnSettings, environ={name: "1"})


def test_an_unknown_setting_is_reported_with_the_nearest_known_one():
    with pytest.raises(
        SettingsError, match=r"FANLIGHT_GATEWAY_LEASE_TLL_S \(did you mean FANLIGHT_GATEWAY_LEASE_TTL_S\?"
    ):
        refuse_unknown(CommonSettings, OwnSettings, environ={"FANLIGHT_GATEWAY_LEASE_TLL_S": "1"})


@pytest.mark.parametrize("name", ["FANLIGHT_GATEWAY", "FANLIGHT_DIFFUSION_SLOTS", "FANLIGHT_LOG_LEVEL", "PATH"])
def test_known_names_and_those_of_other_services_pass(name):
    refuse_unknown(CommonSettings, OwnSettings, environ={name: "1"})


def test_a_token_comes_from_a_file(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("FANLIGHT_CLIENT_TOKEN_FILE", str(tmp_path / "token"))

    assert load(GatewayCommonSettings).token_of_clients() == "s3cret"


def test_an_empty_name_of_a_tokens_file_means_unset(monkeypatch):
    monkeypatch.setenv("FANLIGHT_WORKER_TOKEN_FILE", "")

    assert load(CommonSettings).token_of_workers() == ""


def test_a_worker_accepts_the_name_of_the_operators_token_and_never_reads_the_value(monkeypatch):
    monkeypatch.setenv("FANLIGHT_CLIENT_TOKEN", "s3cret")

    refuse_unknown(CommonSettings, OwnSettings, environ={"FANLIGHT_CLIENT_TOKEN": "s3cret"})
    assert not hasattr(load(CommonSettings), "client_token")


def test_what_belongs_to_the_operator_leaves_the_environment_and_only_tokens_are_named():
    kept = {
        "FANLIGHT_WORKER_TOKEN": "w",
        "FANLIGHT_GATEWAY": "127.0.0.1:1",
        "AWS_SECRET_ACCESS_KEY": "weights",
        "PATH": "/",
    }
    environ = kept | {
        "FANLIGHT_CLIENT_TOKEN": "s3cret",
        "FANLIGHT_CLIENT_TOKEN_FILE": "/run/secrets/client",
        "FANLIGHT_TOKEN": "s3cret",
        "FANLIGHT_TOKEN_FILE": "/run/secrets/token",
        "FANLIGHT_GATEWAY_WEBHOOK_SECRET": "whsec_",
        "FANLIGHT_GATEWAY_STORE": "nats://user:password@nats:4222",
    }

    named = drop_operator_secrets(environ)

    assert environ == kept
    assert named == ["FANLIGHT_CLIENT_TOKEN", "FANLIGHT_CLIENT_TOKEN_FILE", "FANLIGHT_TOKEN", "FANLIGHT_TOKEN_FILE"]


def test_a_token_never_shows_in_the_settings_text(monkeypatch):
    monkeypatch.setenv("FANLIGHT_CLIENT_TOKEN", "s3cret")

    assert "s3cret" not in repr(load(GatewayCommonSettings))


@pytest.mark.parametrize("name", ["CERT", "KEY", "CLIENT_CA", "CA"])
def test_a_file_for_tls_that_is_not_there_is_named(monkeypatch, name):
    monkeypatch.setenv(f"FANLIGHT_TLS_{name}_FILE", "none.pem")

    with pytest.raises(SettingsError, match=rf"^FANLIGHT_TLS_{name}_FILE: none\.pem is not a readable file"):
        load(CommonSettings)


@pytest.mark.parametrize("name", ["CLIENT_CA", "CA"])
@pytest.mark.parametrize("content", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_file_without_certificates_is_no_file_of_roots(monkeypatch, tmp_path, name, content):
    (tmp_path / "roots.pem").write_text(content)
    monkeypatch.setenv(f"FANLIGHT_TLS_{name}_FILE", str(tmp_path / "roots.pem"))

    with pytest.raises(SettingsError, match=rf"^FANLIGHT_TLS_{name}_FILE: .*roots\.pem has no PEM certificates"):
        load(CommonSettings)


def test_an_empty_name_of_a_tls_file_means_unset(monkeypatch):
    monkeypatch.setenv("FANLIGHT_TLS_CA_FILE", "")

    assert load(CommonSettings).tls_ca_file is None


@pytest.mark.parametrize("token", ["two\nlines", "t\u00f6ken"])
def test_a_token_that_no_header_takes_is_an_error(monkeypatch, tmp_path, token):
    monkeypatch.setenv("FANLIGHT_CLIENT_TOKEN", token)
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("FANLIGHT_WORKER_TOKEN_FILE", str(tmp_path / "token"))
    settings = load(GatewayCommonSettings)

    for read in (settings.token_of_clients, settings.token_of_workers):
        with pytest.raises(SettingsError, match="printable ASCII"):
            read()


def test_a_certificate_without_its_key_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "cert.pem").touch()
    monkeypatch.setenv("FANLIGHT_TLS_CERT_FILE", str(tmp_path / "cert.pem"))

    with pytest.raises(SettingsError, match="FANLIGHT_TLS_KEY_FILE go together"):
        load(CommonSettings)
