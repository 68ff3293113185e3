"""Platforms' proofs of identity: JSON Web Tokens, verified with the keys that their issuers publish (JWKS, RFC 7517).

SaladCloud's workload tokens, Kubernetes' service account tokens, and those of any OpenID Connect issuer. Which issuers
are trusted, and what their nodes may do, is in a file of the operator's.
"""

import asyncio
import functools
import hashlib
import json
import ssl
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jwt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fanlight.errors import Unauthenticated, Unavailable
from services.gateway.app.nodes import VerifiedIdentity
from services.gateway.domain.nodes import DEFAULT_POOL, Grant
from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

# Clocks of gateways, issuers and nodes may differ by this much.
LEEWAY_S = 300.0
# Keys are fetched again after this long, and at most this often for a key that is not known.
KEYS_LIFETIME_S, KEYS_COOLDOWN_S = 3_600.0, 30.0
# While the issuer is away, its last keys are trusted for this long.
KEYS_STALE_S = 86_400.0
FETCH_TIMEOUT_S = 10.0
DOCUMENT_LIMIT_BYTES = 256 * 1024
TOKEN_LIMIT_CHARS = 16 * 1024
ISSUERS_LIMIT = 32
SUBJECT_LIMIT_CHARS = 512
# Of the issuers' file: issuers of nodes' tokens, and of people's.
TABLES = frozenset({"issuer", "people"})
# Never symmetric ones, and never `none`.
ALGORITHMS = ("ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA")

SALADCLOUD_KEYS = "https://matrix-rest-api.salad.com/.well-known/workload-jwks.json"


class TrustedIssuer(BaseModel):
    """Whose tokens are believed, and where the keys that sign them are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    # The claim `iss`; needed except for SaladCloud.
    issuer: str = ""
    # The claim `aud`; one of these.
    audience: tuple[str, ...] = ()
    # Where the keys are; unset: the issuer's discovery document says it.
    keys_url: str = ""
    keys_file: Path | None = None
    ca_file: Path | None = None
    # Sent with requests to the issuer, as Kubernetes' API server wants it.
    token_file: Path | None = None
    # Claims that must have one of these values; a name with dots in it is one key, a path is written with `/`.
    claims: Mapping[str, tuple[str, ...]] = {}

    @property
    def default_keys_url(self) -> str:
        """Empty: the issuer's discovery document says it."""
        return ""

    @property
    def required_claims(self) -> Mapping[str, tuple[str, ...]]:
        return self.claims


class IssuerRule(TrustedIssuer):
    """An issuer of nodes' tokens, and what its nodes may do. One `[[issuer]]` of the issuers' file."""

    kind: Literal["oidc", "saladcloud", "kubernetes"] = "oidc"
    # SaladCloud: the organization's name, and the ids of its container groups whose nodes may join.
    organization: str = ""
    container_groups: tuple[str, ...] = ()
    # The path of the claim that tells the node.
    subject: str = ""
    # How many times one token can be exchanged: a machine's processes share it.
    token_uses: int = Field(4, ge=1, le=64)
    pool: str = Field(DEFAULT_POOL, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    labels: Mapping[str, str] = {}
    stages: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_narrow(self) -> "IssuerRule":
        """Any customer of a platform has tokens of its issuer: without these, any of them could join."""
        if self.kind == "saladcloud":
            if not self.organization or not self.container_groups:
                raise ValueError("saladcloud needs organization and container_groups")
        elif not self.issuer or not self.audience:
            raise ValueError(f"{self.kind} needs issuer and audience")
        if self.kind == "kubernetes" and not self.claims:
            raise ValueError('kubernetes needs claims, such as { "kubernetes.io/namespace" = ["fanlight"] }')
        return self

    @property
    def subject_path(self) -> str:
        return self.subject or {"saladcloud": "salad_machine_id", "kubernetes": "kubernetes.io/pod/uid"}.get(
            self.kind, "sub"
        )

    @property
    def default_keys_url(self) -> str:
        return SALADCLOUD_KEYS if self.kind == "saladcloud" else ""

    @property
    def required_claims(self) -> Mapping[str, tuple[str, ...]]:
        if self.kind != "saladcloud":
            return self.claims
        return {
            **self.claims,
            "salad_organization_name": (self.organization,),
            "salad_workload_id": self.container_groups,
        }

    @property
    def grant(self) -> Grant:
        return Grant(pool=self.pool, labels=tuple(sorted(self.labels.items())), stages=self.stages)


Rule = TypeVar("Rule", bound=TrustedIssuer)


def read_issuers(file: Path | None) -> Sequence[IssuerRule]:
    """Those of nodes. SettingsError that names the issuer and its wrong field."""
    return read_rules(file, "issuer", IssuerRule)


def read_rules(file: Path | None, table: str, rule: type[Rule]) -> Sequence[Rule]:
    """The `[[TABLE]]`s of the issuers' file. SettingsError; the file has no tables that are not known."""
    if file is None:
        return ()
    try:
        with file.open("rb") as source:
            document = tomllib.load(source)
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: is not TOML: {error}") from error
    if not document or not all(isinstance(each, list) for each in document.values()) or set(document) - TABLES:
        raise SettingsError(f"{file}: needs tables [[{']] or [['.join(sorted(TABLES))}]]")
    entries = document.get(table, [])
    if len(entries) > ISSUERS_LIMIT:
        raise SettingsError(f"{file}: has more than {ISSUERS_LIMIT} [[{table}]] tables")
    rules = [_rule(f"{file}: {table} {number}", entry, rule) for number, entry in enumerate(entries, 1)]
    if len({each.name for each in rules}) < len(rules):
        raise SettingsError(f"{file}: two of [[{table}]] have the same name")
    return rules


def _rule(where: str, entry: object, rule: type[Rule]) -> Rule:
    try:
        return rule.model_validate(entry)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"]))
        raise SettingsError(f"{where}: {field + ': ' if field else ''}{problem['msg']}") from error


Fetch = Callable[[str], bytes]


def fetcher(rule: TrustedIssuer) -> Fetch:
    """Reads a document of the issuer, with a limit of bytes and time. Blocks; OSError or ValueError."""
    context = ssl.create_default_context(cafile=str(rule.ca_file) if rule.ca_file else None)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))

    def fetch(url: str) -> bytes:
        if not url.startswith(("https://", "http://")):
            raise ValueError("must be an HTTP address")
        headers = {"Accept": "application/json"}
        if rule.token_file is not None:
            headers["Authorization"] = f"Bearer {rule.token_file.read_text().strip()}"
        with opener.open(urllib.request.Request(url, headers=headers), timeout=FETCH_TIMEOUT_S) as response:
            data: bytes = response.read(DOCUMENT_LIMIT_BYTES + 1)
        if len(data) > DOCUMENT_LIMIT_BYTES:
            raise ValueError(f"has more than {DOCUMENT_LIMIT_BYTES} bytes")
        return data

    return fetch


class IssuerKeys:
    """An issuer's public keys, cached; fetched again when they are old, or for a key id that is new."""

    def __init__(self, rule: TrustedIssuer, fetch: Fetch, monotonic_s: Callable[[], float]) -> None:
        self._rule, self._fetch, self._now_s = rule, fetch, monotonic_s
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_s = self._tried_s = float("-inf")
        # The id that the newest keys were fetched for, and that is not among them.
        self._absent = ""
        self._lock = asyncio.Lock()

    async def find(self, key_id: str) -> jwt.PyJWK:
        """Unauthenticated for a key that the issuer does not have.

        Unavailable while the issuer is away and has to be asked, or was asked too short a time before the key was new.
        """
        async with self._lock:
            age_s = self._now_s() - self._fetched_s
            is_wanted = key_id not in self._keys or age_s > KEYS_LIFETIME_S
            if is_wanted and self._now_s() - self._tried_s > KEYS_COOLDOWN_S:
                await self._refresh(key_id)
            if self._now_s() - self._fetched_s > KEYS_STALE_S:
                raise Unavailable(f"the keys of issuer {self._rule.name} cannot be read", retry_after_s=KEYS_COOLDOWN_S)
        found = self._keys.get(key_id)
        if found is None and key_id != self._absent:
            left_s = max(0.0, self._tried_s + KEYS_COOLDOWN_S - self._now_s())
            raise Unavailable(
                f"the token's key is new; the keys of issuer {self._rule.name} are read again in {left_s:.0f} s",
                retry_after_s=left_s,
            )
        if found is None:
            raise Unauthenticated(f"issuer {self._rule.name} has no key of this id; take a fresh token")
        return found

    async def _refresh(self, key_id: str) -> None:
        """Keeps the keys that it has where the issuer is away or answers nonsense. `key_id`: the key that is needed."""
        self._tried_s = self._now_s()
        try:
            keys = _keys_of(await asyncio.to_thread(self._document))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
            log.warning("issuer_keys_unreadable", issuer=self._rule.name, why=str(error)[:200])
            return
        self._keys, self._fetched_s = keys, self._tried_s
        self._absent = "" if key_id in keys else key_id

    def _document(self) -> bytes:
        if self._rule.keys_file is not None:
            return self._rule.keys_file.read_bytes()
        url = self._rule.keys_url or self._rule.default_keys_url
        if not url:
            discovery = json.loads(self._fetch(f"{self._rule.issuer.rstrip('/')}/.well-known/openid-configuration"))
            if discovery["issuer"] != self._rule.issuer:
                raise ValueError("the discovery document is of another issuer")
            url = discovery["jwks_uri"]
        return self._fetch(url)


def _keys_of(document: bytes) -> dict[str, jwt.PyJWK]:
    """Those for asymmetric signatures, by id. ValueError where there are none."""
    keys = {}
    for entry in json.loads(document)["keys"]:
        if entry.get("kty") not in ("EC", "RSA", "OKP") or entry.get("use", "sig") != "sig":
            continue
        key = jwt.PyJWK(entry)
        keys[str(entry.get("kid", ""))] = key
    if not keys:
        raise ValueError("it has no keys for signatures")
    return keys


class JwtVerifier:
    """Verifies tokens of the trusted issuers; see `IdentityVerifier`."""

    def __init__(
        self,
        rules: Sequence[IssuerRule],
        *,
        fetch_of: Callable[[IssuerRule], Fetch] = fetcher,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuers = [(rule, IssuerKeys(rule, fetch_of(rule), monotonic_s)) for rule in rules]

    async def verify(self, token: str) -> VerifiedIdentity:
        header, claims = peek(token)
        refused: Unauthenticated | None = None
        for rule, keys in self._issuers:
            if rule.issuer and claims.get("iss") != rule.issuer:
                continue
            try:
                return await self._verify(token, str(header.get("kid", "")), rule, keys)
            except Unauthenticated as error:
                refused = refused or error
        raise refused or Unauthenticated("this gateway does not trust the token's issuer")

    async def _verify(self, token: str, key_id: str, rule: IssuerRule, keys: IssuerKeys) -> VerifiedIdentity:
        claims = await verified_claims(token, key_id, rule, keys)
        subject = subject_in(claims, rule.subject_path)
        return VerifiedIdentity(
            proof=rule.name,
            subject=subject,
            grant=rule.grant,
            token_hash=hashlib.sha256(token.encode()).hexdigest(),
            token_expire_s=float(claims["exp"]) + LEEWAY_S,
            token_uses=rule.token_uses,
        )


async def verified_claims(token: str, key_id: str, rule: TrustedIssuer, keys: IssuerKeys) -> Mapping[str, Any]:
    """Those of a token that the issuer signed and that has what the rule requires. Unauthenticated, Unavailable."""
    key = await keys.find(key_id)
    try:
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[each for each in ALGORITHMS if each == key.algorithm_name],
            audience=list(rule.audience) or None,
            issuer=rule.issuer or None,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iat"], "verify_aud": bool(rule.audience)},
        )
    except jwt.PyJWTError as error:
        raise Unauthenticated(f"the token is not accepted: {_reason_of(error)}") from error
    for path, values in rule.required_claims.items():
        if claim_text(claims, path) not in values:
            raise Unauthenticated(f"the token's claim {path} is not one that issuer {rule.name} is trusted for")
    return claims


def subject_in(claims: Mapping[str, Any], path: str) -> str:
    """Who the token is of. Unauthenticated where the claim is missing, long or not printable."""
    subject = claim_text(claims, path)
    if not subject or len(subject) > SUBJECT_LIMIT_CHARS or not subject.isprintable():
        raise Unauthenticated(f"the token has no claim {path}, which tells whose it is")
    return subject


def peek(token: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The header and the claims, not verified: only to find whose keys to verify them with."""
    if len(token) > TOKEN_LIMIT_CHARS:
        raise Unauthenticated("the token is longer than any platform's")
    try:
        complete = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise Unauthenticated("this is not a JSON Web Token") from error
    return complete["header"], complete["payload"]


def claim_text(claims: Mapping[str, Any], path: str) -> str:
    """The string at the path; empty where there is none."""
    value = _claim(claims, path)
    return value if isinstance(value, str) else ""


def claim_values(claims: Mapping[str, Any], path: str) -> set[str]:
    """The string at the path, or the strings of its list; empty where there is none."""
    value = _claim(claims, path)
    return {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)}


def _claim(claims: Mapping[str, Any], path: str) -> object:
    """None where there is none. A key may contain `/` and `.`: the longest match wins."""
    if path in claims:
        return claims[path]
    for head in _heads(path):
        inner = claims.get(head)
        if isinstance(inner, Mapping):
            return _claim(inner, path[len(head) + 1 :])
    return None


@functools.cache
def _heads(path: str) -> Sequence[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _reason_of(error: jwt.PyJWTError) -> str:
    """A sentence of ours for what a node's owner can do something about."""
    known: dict[type[jwt.PyJWTError], str] = {
        jwt.ExpiredSignatureError: "it has expired; take a fresh one, and check the clocks",
        jwt.ImmatureSignatureError: "it is not valid yet; check the clocks",
        jwt.InvalidAudienceError: "it is for another audience",
        jwt.InvalidIssuerError: "it is of another issuer",
        jwt.InvalidSignatureError: "its signature is wrong",
    }
    return known.get(type(error), "it is malformed, or lacks exp or iat")
