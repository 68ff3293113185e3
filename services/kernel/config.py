"""Settings from the environment. Common ones are `FANLIGHT_*`, a service's own `FANLIGHT_<SERVICE>_*`.

A name that starts right and means nothing is an error: it is a typing mistake that would go unseen.
"""

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fanlight.channel import target_of
from services.kernel.invalid import in_our_words

PREFIX = "FANLIGHT_"
# Each service refuses what it does not know under its own prefix and leaves the others' alone.
SERVICES = ("GATEWAY", "PREPROCESSOR", "DIFFUSION", "WEIGHTS", "WORKER")
# Read by the command line only.
CLIENT_NAMES = ("FANLIGHT_GATEWAY", "FANLIGHT_TOKEN", "FANLIGHT_TOKEN_FILE")

MIB = 1024 * 1024


class SettingsError(Exception):
    """A setting is wrong or unknown; the message names it and says what would be right."""


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535 or (":" in host and not host.startswith("[")):
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:50051 or [::]:50051")
    return text


Address = Annotated[str, AfterValidator(_address)]


def _addresses(text: str) -> str:
    for each in text.split(","):
        _address(each)
    try:
        target_of(text)
    except ValueError as error:
        raise ValueError(f"{error}, such as 10.0.0.1:50051,10.0.0.2:50051") from error
    return text


# One, or several of the same service with commas between.
Addresses = Annotated[str, AfterValidator(_addresses)]


def _readable(path: Path | None) -> Path | None:
    if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"{path} is no file that can be read")
    return path


# An empty text is none, as files of settings often leave it.
PemFile = Annotated[Path | None, BeforeValidator(lambda value: value or None), AfterValidator(_readable)]


class CommonSettings(BaseSettings):
    """What every service takes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    log_format: Literal["console", "json"] = Field("json", description="How log events are written.")
    client_token: SecretStr | None = Field(None, description="What clients must send as a bearer token.")
    client_token_file: Path | None = Field(None, description="A file with the clients' token.")
    worker_token: SecretStr | None = Field(None, description="What workers must send as a bearer token.")
    worker_token_file: Path | None = Field(None, description="A file with the workers' token.")
    tls_cert_file: PemFile = Field(None, description="PEM certificate chain of the servers.")
    tls_key_file: PemFile = Field(None, description="PEM private key of the servers.")
    tls_client_ca_file: PemFile = Field(None, description="PEM roots that clients must be signed by.")
    tls_ca_file: PemFile = Field(None, description="PEM roots that a worker trusts a gateway by.")
    max_message_bytes: int = Field(64 * MIB, ge=MIB, description="Largest gRPC message that is taken.")
    drain_grace_s: float = Field(30.0, ge=0, description="How long running calls may take on SIGTERM.")
    lifeline_fd: int | None = Field(None, description="A pipe whose end tells that the starting process died.")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("FANLIGHT_TLS_CERT_FILE and FANLIGHT_TLS_KEY_FILE go together")
        return self

    def token_of_clients(self) -> str:
        return secret_of(self.client_token, self.client_token_file)

    def token_of_workers(self) -> str:
        return secret_of(self.worker_token, self.worker_token_file)


def secret_of(value: SecretStr | None, file: Path | None) -> str:
    """The secret itself, or the file's only line; empty where neither is set.

    SettingsError for a file that cannot be read, and for what no header takes.
    """
    if value is not None:
        secret, place = value.get_secret_value(), "a token or secret"
    elif file is not None:
        secret, place = _text_of(file), f"{file}: what is in it"
    else:
        return ""
    if not (secret.isascii() and secret.isprintable()):
        raise SettingsError(f"{place} must be printable ASCII, on one line")
    return secret


def _text_of(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error


Settings = TypeVar("Settings", bound=BaseSettings)


def load(kind: type[Settings]) -> Settings:
    """The settings in force, or SettingsError with one line for each that is wrong."""
    try:
        return kind()
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(kind, error))) from error


def _explain(kind: type[BaseSettings], error: ValidationError) -> Iterator[str]:
    prefix = kind.model_config.get("env_prefix", "")
    for problem in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"])
        words = in_our_words(problem)
        yield f"{prefix}{name.upper()}: {words}" if name else words


def names_of(kind: type[BaseSettings]) -> set[str]:
    prefix = kind.model_config.get("env_prefix", "")
    return {f"{prefix}{name}".upper() for name in kind.model_fields}


def refuse_unknown(*kinds: type[BaseSettings], environ: Mapping[str, str] = os.environ) -> None:
    """SettingsError when the environment has a FANLIGHT_ name that none of the kinds knows."""
    known = set(CLIENT_NAMES).union(*(names_of(kind) for kind in kinds))
    prefixes = {kind.model_config.get("env_prefix", "") for kind in kinds}
    foreign = tuple(f"{PREFIX}{name}_" for name in SERVICES if f"{PREFIX}{name}_" not in prefixes)
    unknown = sorted(
        name for name in environ if name.startswith(PREFIX) and name not in known and not name.startswith(foreign)
    )
    if unknown:
        told = ", ".join(f"{name}{_nearest(name, known)}" for name in unknown)
        raise SettingsError(f"unknown settings: {told}; docs/settings.md lists those there are")


def _nearest(name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.85)
    return f" (is {near[0]} meant?)" if near else ""
