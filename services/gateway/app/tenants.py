"""Callers: the tenant that a token belongs to, and what it may see of others. Knows no transport."""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fanlight.contract.names import DEFAULT_SCOPE, parse_scope
from fanlight.errors import InvalidField, NotFound, PermissionDenied
from services.gateway.domain.job import DEFAULT_TENANT, Job
from services.gateway.domain.workers import WorkerStatus
from services.kernel.config import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    # Also the scope of its blobs.
    tenant: str
    # Sees every tenant's jobs and blobs.
    is_operator: bool = False

    def scope_of(self, named: str, *, field: str) -> str:
        """The scope that a request names; `default` is the caller's own. NotFound for another tenant's."""
        if named in (DEFAULT_SCOPE, self.tenant):
            return self.tenant
        if not self.is_operator:
            raise NotFound("there is no such scope; leave it out for your own", field=field)
        return named

    def without_secrets(self, status: WorkerStatus) -> WorkerStatus:
        """A worker's status as the caller may see it: tenants do not see the tasks."""
        return status if self.is_operator else replace(status, tasks=())

    def require_operator(self, what: str) -> None:
        """PermissionDenied for a tenant."""
        if not self.is_operator:
            raise PermissionDenied(f"{what} is for the operator alone: send the token of FANLIGHT_CLIENT_TOKEN")

    def sees(self, job: Job) -> bool:
        return self.is_operator or (job.tenant == self.tenant and job.check is None)


OPERATOR = Caller(tenant=DEFAULT_TENANT, is_operator=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    name: str
    token: str = field(repr=False)
    # Signs its webhooks; empty for the gateway's secret.
    webhook_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Callers:
    """By token. Without any tokens every caller is the operator."""

    tokens: Mapping[str, Caller] = field(default_factory=dict, repr=False)

    def and_workers(self, tokens: Sequence[str]) -> "Callers":
        """With the workers' tokens as well, which act as the operator."""
        return Callers({**dict.fromkeys(tokens, OPERATOR), **self.tokens})

    def of_token(self, token: str) -> Caller | None:
        """None for an unknown token."""
        if not self.tokens:
            return OPERATOR
        found = None
        # Compares all of them, so that the time taken reveals nothing.
        for known, caller in self.tokens.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = caller
        return found

    def of_authorization(self, header: str) -> Caller | None:
        """By the value of the header `authorization`."""
        kind, _, token = header.partition(" ")
        return self.of_token(token.strip() if kind.lower() == "bearer" else "")


def callers_of(operator_token: str, tenants: Sequence[Tenant]) -> Callers:
    tokens = {each.token: Caller(tenant=each.name) for each in tenants}
    return Callers(tokens | ({operator_token: OPERATOR} if operator_token else {}))


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
