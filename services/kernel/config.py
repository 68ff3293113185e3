"""Settings from the environment: common ones are `FANLIGHT_*`, a service's own are `FANLIGHT_<SERVICE>_*`.

An unknown name with one of these prefixes is an error, because it is probably a typing mistake.
"""

import os
import ssl
from collections.abc import Iterator, Mapping, MutableMapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fanlight.channel import grpc_proxy, target_of
from fanlight.contract.limits import format_number

PREFIX = "FANLIGHT_"
# Each service refuses unknown names under its own prefix and ignores those of the others.
SERVICES = ("GATEWAY", "PREPROCESSOR", "DIFFUSION", "WEIGHTS", "WORKER")
# Read by the command line only.
CLIENT_NAMES = ("FANLIGHT_GATEWAY", "FANLIGHT_TOKEN", "FANLIGHT_TOKEN_FILE")
# Read by the gateway only. Other services accept the names, because older set-ups give them to every service.
OPERATOR_NAMES = ("FANLIGHT_CLIENT_TOKEN", "FANLIGHT_CLIENT_TOKEN_FILE")

MIB = 1024 * 1024


class ProcessEnd(Exception):
    """Ends the process with `exit_code`; the message is one line that says why and what to do."""

    exit_code = 1


class SettingsError(ProcessEnd):
    """A setting is wrong or unknown; the message names it and says what would be right."""

    exit_code = 2


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535 or (":" in host and not host.startswith("[")):
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:50051 or [::]:50051")
    return value


Address = Annotated[str, AfterValidator(_address)]


def _addresses(value: str) -> str:
    for each in value.split(","):
        _address(each)
    try:
        target_of(value)
    except ValueError as error:
        raise ValueError(f"{error}, such as 10.0.0.1:50051,10.0.0.2:50051") from error
    return value


# One address, or several of the same service separated by commas.
Addresses = Annotated[str, AfterValidator(_addresses)]


def _proxy(value: str) -> str:
    grpc_proxy(value, {})
    return value


def _readable(path: Path | None) -> Path | None:
    if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"{path} is not a readable file")
    return path


# An empty string means unset, as settings files often have it.
PemFile = Annotated[Path | None, BeforeValidator(lambda value: value or None), AfterValidator(_readable)]


def _roots(path: Path | None) -> Path | None:
    if path is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except ssl.SSLError as error:
            raise ValueError(f"{path} has no PEM certificates, or a damaged one") from error
    return path


# With certificates in it, which gRPC would otherwise miss at the first connection, in a log of its own.
RootsFile = Annotated[PemFile, AfterValidator(_roots)]
# A file that is read when the token in it is needed.
SecretFile = Annotated[Path | None, BeforeValidator(lambda value: value or None)]


class CommonSettings(BaseSettings):
    """The settings of every service. The operator's token is not among them: workers run on others' machines."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level of the log events that are written."
    )
    log_format: Literal["console", "json"] = Field("json", description="How log events are written.")
    worker_token: SecretStr | None = Field(None, description="The bearer token that workers must send.")
    worker_token_file: SecretFile = Field(None, description="A file with the worker token.")
    tls_cert_file: PemFile = Field(
        None,
        description="PEM certificate chain of the servers; a worker, client or command shows it to a gateway that asks"
        " for one. Unset: a gateway makes one of its own where it listens beyond loopback.",
    )
    tls_key_file: PemFile = Field(None, description="PEM private key of that certificate.")
    tls_client_ca_file: RootsFile = Field(None, description="PEM root certificates that clients must be signed by.")
    tls_ca_file: RootsFile = Field(
        None,
        description="PEM root certificates that a worker trusts. Unset: those of its join code, or else the system's.",
    )
    plain_text: bool = Field(
        False,
        description="Allows plain text beyond loopback: a gateway then listens without TLS where it has no certificate,"
        " and a worker or client calls without TLS where no roots are named. Others can read along.",
    )
    grpc_proxy: Annotated[str, AfterValidator(_proxy)] = Field(
        "",
        description="HTTP proxy of gRPC to addresses that are neither loopback nor private, or `off`. "
        "Empty: what `grpc_proxy`, `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` say.",
    )
    drain_grace_s: float = Field(30.0, ge=0, description="How long running calls may continue after SIGTERM.")
    lifeline_fd: int | None = Field(None, description="A pipe; when it closes, the process stops.")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("FANLIGHT_TLS_CERT_FILE and FANLIGHT_TLS_KEY_FILE go together: set both or none")
        return self

    @property
    def certificate(self) -> tuple[Path, Path] | None:
        """The files of the certificate chain and its key."""
        return (self.tls_cert_file, self.tls_key_file) if self.tls_cert_file and self.tls_key_file else None

    def token_of_workers(self) -> str:
        return secret_of(self.worker_token, self.worker_token_file)


class GatewayCommonSettings(CommonSettings):
    """The common settings and the operator's token, for the gateway alone."""

    client_token: SecretStr | None = Field(
        None, description="The bearer token that clients must send: the operator's. No worker needs it."
    )
    client_token_file: SecretFile = Field(None, description="A file with the client token.")

    def token_of_clients(self) -> str:
        return secret_of(self.client_token, self.client_token_file)


def drop_operator_secrets(environ: MutableMapping[str, str]) -> list[str]:
    """Take what belongs to the operator out of a worker's environment, so that no child process inherits it.

    Returns the names of the tokens among it; their values are not read.
    """
    tokens = sorted(name for name in environ if name in (*OPERATOR_NAMES, *CLIENT_NAMES) and "_TOKEN" in name)
    for name in [name for name in environ if name.startswith(f"{PREFIX}GATEWAY_")] + tokens:
        del environ[name]
    return tokens


def secret_of(value: SecretStr | None, file: Path | None) -> str:
    """The secret itself, or the file's only line; empty if neither is set.

    SettingsError for a file that cannot be read, and for a secret that does not fit into a header.
    """
    if value is not None:
        secret, place = value.get_secret_value(), "a token or secret"
    elif file is not None:
        secret, place = _read_secret(file), f"{file}: its content"
    else:
        return ""
    if not (secret.isascii() and secret.isprintable()):
        raise SettingsError(f"{place} must be printable ASCII, on one line")
    return secret


def _read_secret(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error


Settings = TypeVar("Settings", bound=BaseSettings)


def load(kind: type[Settings]) -> Settings:
    """The settings from the environment, or SettingsError with one line for each wrong one."""
    try:
        return kind()
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(kind, error))) from error


def _explain(kind: type[BaseSettings], error: ValidationError) -> Iterator[str]:
    prefix = kind.model_config.get("env_prefix", "")
    for problem in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"])
        words = describe_problem(problem)
        yield f"{prefix}{name.upper()}: {words}" if name else words


def names_of(kind: type[BaseSettings]) -> set[str]:
    prefix = kind.model_config.get("env_prefix", "")
    return {f"{prefix}{name}".upper() for name in kind.model_fields}


def refuse_unknown(*kinds: type[BaseSettings], environ: Mapping[str, str] = os.environ) -> None:
    """SettingsError if the environment has a FANLIGHT_ name that none of the kinds knows."""
    known = {*CLIENT_NAMES, *OPERATOR_NAMES}.union(*(names_of(kind) for kind in kinds))
    prefixes = {kind.model_config.get("env_prefix", "") for kind in kinds}
    foreign = tuple(f"{PREFIX}{name}_" for name in SERVICES if f"{PREFIX}{name}_" not in prefixes)
    unknown = sorted(
        name for name in environ if name.startswith(PREFIX) and name not in known and not name.startswith(foreign)
    )
    if unknown:
        names = ", ".join(f"{name}{_nearest(name, known)}" for name in unknown)
        raise SettingsError(f"unknown settings: {names}; docs/settings.md lists all settings")


def _nearest(name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.85)
    return f" (did you mean {near[0]}?)" if near else ""


_PROBLEMS = {
    "missing": "is missing",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def describe_problem(problem: Any) -> str:
    """What pydantic found wrong with a value, in our words, without the field's name.

    `problem`: one of a ValidationError's `errors()`.
    """
    kind = str(problem["type"])
    if kind.startswith(("datetime", "timezone")):
        return "must be a time such as 2026-01-31T12:00:00Z"
    limits = {
        name: format_number(each) if isinstance(each, int | float) else each
        for name, each in problem.get("ctx", {}).items()
    }
    return _PROBLEMS.get(kind, "cannot be read").format(**limits)
