"""Callers: the tenant that a token belongs to, and what it may see of others. Knows no transport."""

import base64
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from pathlib import Path
from typing import Protocol

from fanlight.contract.names import DEFAULT_SCOPE, is_reference, parse_scope
from fanlight.errors import InvalidField, NotFound, PermissionDenied
from services.gateway.domain.job import DEFAULT_TENANT, Job
from services.gateway.domain.keys import RIGHTS, KeyRole, Right
from services.gateway.domain.workers import WorkerStatus
from services.kernel.config import SettingsError

# A token with less could be guessed.
TOKEN_MIN_CHARS, TOKEN_MIN_DIFFERENT = 16, 6
# Roles that see figures alone, and of the whole fleet where they are the operator's own.
_FIGURES = frozenset({KeyRole.METRICS, KeyRole.SCALER})


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    # Also the scope of its blobs.
    tenant: str
    # A tenant's token in the settings is its admin's.
    role: KeyRole = KeyRole.ADMIN
    # Empty for a token of the settings.
    key_id: str = ""

    @property
    def is_operator(self) -> bool:
        """Sees every tenant's jobs and blobs."""
        return self.role is KeyRole.OPERATOR

    @property
    def sees_fleet(self) -> bool:
        """Sees figures of all tenants together."""
        return self.is_operator or (self.tenant == DEFAULT_TENANT and self.role in _FIGURES)

    @property
    def name(self) -> str:
        """For logs."""
        return self.key_id or self.tenant

    def require(self, right: Right) -> None:
        """PermissionDenied for a role that does not have it."""
        if right not in RIGHTS[self.role]:
            having = " or ".join(role for role in KeyRole if right in RIGHTS[role])
            raise PermissionDenied(f"the role {self.role} does not let you {right}; use a key of the role {having}")

    def scope_of(self, named: str, *, field: str) -> str:
        """The scope that a request names; `default` is the caller's own. NotFound for another tenant's."""
        if named in (DEFAULT_SCOPE, self.tenant):
            return self.tenant
        if not self.is_operator:
            raise NotFound("there is no such scope; leave it out for your own", field=field)
        return named

    def without_secrets(self, status: WorkerStatus) -> WorkerStatus:
        """A worker's status as the caller may see it.

        Tenants see neither the tasks nor what others' tasks left behind: models by reference, and what failed.
        """
        if self.is_operator:
            return status
        held = ("vram_models", "ram_models", "disk_models", "unfetched_models")
        ids = {each: frozenset(filterfalse(is_reference, getattr(status.worker, each))) for each in held}
        return replace(status, worker=replace(status.worker, **ids), tasks=(), avoided=())  # type: ignore[arg-type]  # by name

    def sees(self, job: Job) -> bool:
        return self.is_operator or (job.tenant == self.tenant and job.check is None)

    def counts(self, job: Job) -> bool:
        """Whether the job is in the figures that the caller sees."""
        return self.sees_fleet or self.sees(job)


OPERATOR = Caller(tenant=DEFAULT_TENANT, role=KeyRole.OPERATOR)


class KeyLookup(Protocol):
    def caller_of(self, token: str) -> Caller | None: ...

    def is_closed(self, tenant: str) -> bool:
        """Whether the tenant is being deleted: nobody acts for it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    name: str
    token: str = field(repr=False)
    # Signs its webhooks; empty for the gateway's secret.
    webhook_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Callers:
    """By token of the settings, or by key. Without any tokens every caller is the operator."""

    tokens: Mapping[str, Caller] = field(default_factory=dict, repr=False)
    keys: KeyLookup | None = None

    def of_token(self, token: str) -> Caller | None:
        """None for an unknown token."""
        if not self.tokens:
            return OPERATOR
        found = None
        # Compares all of them, so that the time taken reveals nothing.
        for known, caller in self.tokens.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = caller
        if self.keys is None:
            return found
        if found is None:
            return self.keys.caller_of(token)
        return None if self.keys.is_closed(found.tenant) else found

    def of_authorization(self, header: str) -> Caller | None:
        """By the value of the header `authorization`."""
        return self.of_token(token_of(header))


def token_of(header: str) -> str:
    """The token in the value of the header `authorization`, bearer or basic; empty where there is none.

    Of the two halves of basic the password is the token, or the name where there is no password.
    """
    kind, _, value = header.partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return value
    if kind.lower() != "basic":
        return ""
    try:
        name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except ValueError:
        return ""
    return password or name


def callers_of(operator_token: str, tenants: Sequence[Tenant], keys: KeyLookup | None = None) -> Callers:
    tokens = {each.token: Caller(tenant=each.name) for each in tenants}
    return Callers(tokens | ({operator_token: OPERATOR} if operator_token else {}), keys)


def check_tokens(tokens: Mapping[str, str]) -> None:
    """By what they are called. SettingsError for one that can be guessed, and for one that is used twice."""
    seen: dict[str, str] = {}
    for name, token in tokens.items():
        if not token:
            continue
        if len(token) < TOKEN_MIN_CHARS or len(set(token)) < TOKEN_MIN_DIFFERENT:
            raise SettingsError(
                f"{name}: can be guessed; take at least {TOKEN_MIN_CHARS} random characters, as `openssl rand -hex 32`"
                " prints"
            )
        if token in seen:
            raise SettingsError(f"{name}: must be another one than {seen[token]}")
        seen[token] = name


def read_tenants(file: Path | None) -> list[Tenant]:
    """Lines of NAME TOKEN and optionally a webhook secret; `#` begins a comment. SettingsError."""
    if file is None:
        return []
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    words = [(number, line.partition("#")[0].split()) for number, line in enumerate(lines, 1)]
    tenants = [_tenant(f"{file}, line {number}", *each) for number, each in words if each]
    for what, values in (("name", [each.name for each in tenants]), ("token", [each.token for each in tenants])):
        if len(set(values)) < len(values):
            raise SettingsError(f"{file}: two tenants have the same {what}")
    return tenants


def _tenant(where: str, name: str, token: str = "", secret: str = "", *more: str) -> Tenant:
    if not token or more:
        raise SettingsError(f"{where}: must be a name, a token and optionally a webhook secret")
    try:
        parse_scope(name, field="name")
    except InvalidField as error:
        raise SettingsError(f"{where}: the name {error.message}") from error
    if name == DEFAULT_TENANT:
        raise SettingsError(f"{where}: {DEFAULT_TENANT} is the operator's, whose token is FANLIGHT_CLIENT_TOKEN")
    return Tenant(name=name, token=token, webhook_secret=secret)
