"""People who sign in at an OpenID Connect issuer: their tenant and role, by the claims of their token.

Which issuers are trusted for whom is in the operator's issuers' file, as `[[people]]`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from fanlight.contract.names import parse_scope
from fanlight.errors import InvalidField, Unauthenticated
from services.gateway.adapters.jwt_identity import (
    Fetch,
    IssuerKeys,
    TrustedIssuer,
    claim_values,
    fetcher,
    peek,
    subject_in,
    verified_claims,
)
from services.gateway.app.keys import VerifiedPerson
from services.gateway.domain.job import DEFAULT_TENANT
from services.gateway.domain.keys import KeyRole


class PeopleRule(TrustedIssuer):
    """An issuer of people's tokens. One `[[people]]` of the issuers' file."""

    # Their tenant; or the path of the claim that tells it, which must be one of `tenants`.
    tenant: str = ""
    tenant_claim: str = ""
    tenants: tuple[str, ...] = ()
    # The path of the claim that tells the role, a string or a list of them; and by role the values that give it.
    role_claim: str = Field(min_length=1)
    roles: Mapping[KeyRole, tuple[str, ...]] = Field(min_length=1)
    # The path of the claim that tells the person.
    subject: str = "sub"

    @model_validator(mode="after")
    def _is_narrow(self) -> "PeopleRule":
        if not self.issuer or not self.audience:
            raise ValueError("people need issuer and audience")
        if bool(self.tenant) == bool(self.tenant_claim) or bool(self.tenant_claim) != bool(self.tenants):
            raise ValueError("people need either tenant, or tenant_claim and tenants")
        for name in (self.tenant, *self.tenants):
            try:
                parse_scope(name or "unset", field="tenant")
            except InvalidField as error:
                raise ValueError(f"tenant {error.message}") from error
        if KeyRole.OPERATOR in self.roles and self.tenant != DEFAULT_TENANT:
            raise ValueError(f'operators need a [[people]] table of their own, with tenant = "{DEFAULT_TENANT}"')
        return self


class PeopleVerifier:
    """Verifies people's tokens; see `PersonVerifier`."""

    def __init__(
        self,
        rules: Sequence[PeopleRule],
        *,
        fetch_of: Callable[[TrustedIssuer], Fetch] = fetcher,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = [(rule, IssuerKeys(rule, fetch_of(rule), monotonic_s)) for rule in rules]

    async def verify_person(self, token: str) -> VerifiedPerson:
        header, claims = peek(token)
        refused: Unauthenticated | None = None
        for rule, keys in self._rules:
            if claims.get("iss") != rule.issuer:
                continue
            try:
                return _person(await verified_claims(token, str(header.get("kid", "")), rule, keys), rule)
            except Unauthenticated as error:
                refused = refused or error
        raise refused or Unauthenticated("this gateway does not trust the token's issuer for people")


def _person(claims: Mapping[str, Any], rule: PeopleRule) -> VerifiedPerson:
    """The widest role of those that the claims give."""
    values = claim_values(claims, rule.role_claim)
    role = next((role for role in KeyRole if values & set(rule.roles.get(role, ()))), None)
    if role is None:
        raise Unauthenticated(f"the token's claim {rule.role_claim} gives no role here; ask the operator")
    tenant = rule.tenant
    if not tenant:
        [*named] = claim_values(claims, rule.tenant_claim) & set(rule.tenants)
        if len(named) != 1:
            raise Unauthenticated(f"the token's claim {rule.tenant_claim} names no tenant here, or several")
        tenant = named[0]
    return VerifiedPerson(
        issuer=rule.name,
        subject=subject_in(claims, rule.subject),
        tenant=tenant,
        role=role,
        expire_s=float(claims["exp"]),
    )
