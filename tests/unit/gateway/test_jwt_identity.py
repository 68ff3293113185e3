"""Platforms' tokens, in the forms in which the platforms issue them, from issuers that the tests make."""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fanlight.errors import Unauthenticated, Unavailable
from services.gateway.adapters.jwt_identity import (
    KEYS_COOLDOWN_S,
    KEYS_STALE_S,
    LEEWAY_S,
    IssuerRule,
    JwtVerifier,
    read_issuers,
)
from services.kernel.config import SettingsError

NOW_S = 1_800_000_000.0
GROUP = "b13dc8ea-0b0e-4a0b-9a1f-f0a3b3a1d3f4"


class Issuer:
    """Signs tokens and publishes its keys; can rotate, and be away."""

    def __init__(self, algorithm: str = "ES256") -> None:
        self._algorithm = algorithm
        self.fetches = 0
        self.is_away = False
        self.rotate("key-1")

    def rotate(self, key_id: str) -> None:
        self.key_id = key_id
        is_rsa = self._algorithm.startswith("RS")
        self._key: Any = rsa.generate_private_key(65537, 2048) if is_rsa else ec.generate_private_key(ec.SECP256R1())

    def fetch(self, url: str) -> bytes:
        self.fetches += 1
        if self.is_away:
            raise OSError("away")
        if url.endswith("/.well-known/openid-configuration"):
            issuer = url.removesuffix("/.well-known/openid-configuration")
            return json.dumps({"issuer": issuer, "jwks_uri": f"{issuer}/keys"}).encode()
        public = jwt.get_algorithm_by_name(self._algorithm).to_jwk(self._key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**public, "kid": self.key_id, "use": "sig", "alg": self._algorithm}]}).encode()

    def sign(self, claims: Mapping[str, Any], **changed: Any) -> str:
        times = {"iat": NOW_S, "nbf": NOW_S, "exp": NOW_S + 300.0}
        claims = {**times, **claims, **changed}
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self._key, algorithm=self._algorithm, headers={"kid": self.key_id})


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyJWT reads the clock itself."""
    import datetime

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(NOW_S, tz)

    monkeypatch.setattr("jwt.api_jwt.datetime", Frozen)


SALAD = IssuerRule(
    name="salad", kind="saladcloud", organization="acme", container_groups=(GROUP,), pool="salad", token_uses=2
)
SALAD_CLAIMS = {
    "sub": "machine-1",
    "aud": "organization-1",
    "salad_machine_id": "machine-1",
    "salad_organization_name": "acme",
    "salad_workload_id": GROUP,
    "iss": "salad",
}
CLUSTER = IssuerRule(
    name="cluster",
    kind="kubernetes",
    issuer="https://cluster.example",
    audience=("fanlight",),
    claims={"kubernetes.io/namespace": ("fanlight",), "kubernetes.io/serviceaccount/name": ("worker",)},
)
CLUSTER_CLAIMS = {
    "iss": "https://cluster.example",
    "aud": ["fanlight"],
    "sub": "system:serviceaccount:fanlight:worker",
    "kubernetes.io": {
        "namespace": "fanlight",
        "pod": {"name": "worker-0", "uid": "pod-uid-1"},
        "serviceaccount": {"name": "worker", "uid": "account-uid"},
    },
}


def verifier(issuer: Issuer, rule: IssuerRule, time: Callable[[], float] | None = None) -> JwtVerifier:
    return JwtVerifier([rule], fetch_of=lambda rule: issuer.fetch, monotonic_s=time or Time())


async def test_a_saladcloud_machine_is_known_by_its_machine_id() -> None:
    issuer = Issuer()
    identity = await verifier(issuer, SALAD).verify(issuer.sign(SALAD_CLAIMS))
    assert (identity.proof, identity.subject, identity.grant.pool) == ("salad", "machine-1", "salad")
    assert identity.token_uses == 2
    assert identity.token_expire_s == NOW_S + 300.0 + LEEWAY_S


@pytest.mark.parametrize(
    "changed",
    [
        {"salad_organization_name": "other"},
        {"salad_workload_id": "another group"},
        {"salad_workload_id": [GROUP]},
        {"salad_machine_id": None},
        {"salad_machine_id": ""},
    ],
)
async def test_another_customers_machine_with_a_valid_signature_is_refused(changed: dict[str, Any]) -> None:
    issuer = Issuer()
    with pytest.raises(Unauthenticated, match="claim"):
        await verifier(issuer, SALAD).verify(issuer.sign(SALAD_CLAIMS, **changed))


async def test_a_kubernetes_pod_is_known_by_its_uid() -> None:
    issuer = Issuer("RS256")
    identity = await verifier(issuer, CLUSTER).verify(issuer.sign(CLUSTER_CLAIMS))
    assert (identity.proof, identity.subject) == ("cluster", "pod-uid-1")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"aud": ["other"]}, "another audience"),
        ({"aud": None}, "malformed"),
        ({"exp": NOW_S - LEEWAY_S - 1}, "expired"),
        ({"exp": None}, "malformed"),
        ({"nbf": NOW_S + LEEWAY_S + 60}, "not valid yet"),
        ({"iss": "https://other.example"}, "does not trust"),
        ({"kubernetes.io": {"namespace": "other"}}, "claim"),
        ({"kubernetes.io": "fanlight"}, "claim"),
    ],
)
async def test_a_kubernetes_token_with_a_wrong_claim_is_refused(changed: dict[str, Any], why: str) -> None:
    issuer = Issuer("RS256")
    with pytest.raises(Unauthenticated, match=why):
        await verifier(issuer, CLUSTER).verify(issuer.sign(CLUSTER_CLAIMS, **changed))


@pytest.mark.parametrize("skew_s", [-LEEWAY_S + 1, LEEWAY_S - 1])
async def test_clocks_may_differ_by_minutes(skew_s: float) -> None:
    issuer = Issuer()
    times = {"iat": NOW_S + skew_s, "nbf": NOW_S + skew_s, "exp": NOW_S + max(skew_s, -LEEWAY_S + 1)}
    await verifier(issuer, SALAD).verify(issuer.sign(SALAD_CLAIMS, **times))


async def test_a_signature_of_another_key_with_the_same_id_is_refused() -> None:
    issuer, forger = Issuer(), Issuer()
    with pytest.raises(Unauthenticated, match="signature is wrong"):
        await verifier(issuer, SALAD).verify(forger.sign(SALAD_CLAIMS))


async def test_a_token_without_signature_and_one_signed_with_the_public_key_are_refused() -> None:
    issuer = Issuer()
    check = verifier(issuer, SALAD)
    times = {"iat": NOW_S, "exp": NOW_S + 300.0}
    unsigned = jwt.encode({**SALAD_CLAIMS, **times}, None, algorithm="none", headers={"kid": "key-1"})
    keyed = jwt.encode({**SALAD_CLAIMS, **times}, "k" * 32, algorithm="HS256", headers={"kid": "key-1"})
    for token in (unsigned, keyed):
        with pytest.raises(Unauthenticated):
            await check.verify(token)


async def test_rotated_keys_are_fetched_and_unknown_ids_do_not_make_the_gateway_ask_at_each_call() -> None:
    issuer, time = Issuer(), Time()
    check = verifier(issuer, SALAD, time)
    await check.verify(issuer.sign(SALAD_CLAIMS))
    issuer.rotate("key-2")
    time.now_s += KEYS_COOLDOWN_S + 1
    await check.verify(issuer.sign(SALAD_CLAIMS))
    assert issuer.fetches == 2
    forger = Issuer()
    forger.key_id = "key-9"
    time.now_s += KEYS_COOLDOWN_S + 1
    for _ in range(5):
        with pytest.raises(Unauthenticated, match="no key"):
            await check.verify(forger.sign(SALAD_CLAIMS))
    assert issuer.fetches == 3


async def test_a_key_that_is_newer_than_the_last_look_is_waited_for_and_not_refused() -> None:
    issuer, time = Issuer(), Time()
    check = verifier(issuer, SALAD, time)
    await check.verify(issuer.sign(SALAD_CLAIMS))
    issuer.rotate("key-2")
    time.now_s += 10.0
    for _ in range(5):
        with pytest.raises(Unavailable, match="is new") as refused:
            await check.verify(issuer.sign(SALAD_CLAIMS))
    assert refused.value.retry_after_s == KEYS_COOLDOWN_S - 10.0
    assert issuer.fetches == 1, "whoever sends unknown key ids cannot make the gateway ask more often"
    time.now_s += KEYS_COOLDOWN_S
    await check.verify(issuer.sign(SALAD_CLAIMS))


async def test_while_the_issuer_is_away_a_new_key_is_waited_for_and_the_known_ones_hold() -> None:
    issuer, time = Issuer(), Time()
    check = verifier(issuer, SALAD, time)
    old = issuer.sign(SALAD_CLAIMS)
    await check.verify(old)
    issuer.rotate("key-2")
    issuer.is_away = True
    time.now_s += KEYS_COOLDOWN_S + 1
    with pytest.raises(Unavailable, match="salad"):
        await check.verify(issuer.sign(SALAD_CLAIMS))
    await check.verify(old)
    issuer.is_away = False
    time.now_s += KEYS_COOLDOWN_S + 1
    await check.verify(issuer.sign(SALAD_CLAIMS))


async def test_while_the_issuer_is_away_its_last_keys_hold_for_a_day() -> None:
    issuer, time = Issuer(), Time()
    check = verifier(issuer, SALAD, time)
    token = issuer.sign(SALAD_CLAIMS)
    await check.verify(token)
    issuer.is_away = True
    time.now_s = KEYS_STALE_S
    await check.verify(token)
    time.now_s = 2 * KEYS_STALE_S
    with pytest.raises(Unavailable, match="salad"):
        await check.verify(token)


async def test_the_keys_are_found_by_discovery() -> None:
    issuer = Issuer("RS256")
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return issuer.fetch(url)

    check = JwtVerifier([CLUSTER], fetch_of=lambda rule: fetch, monotonic_s=Time())
    await check.verify(issuer.sign(CLUSTER_CLAIMS))
    assert asked == ["https://cluster.example/.well-known/openid-configuration", "https://cluster.example/keys"]


@pytest.mark.parametrize("document", [b"", b"{}", b"[]", b'{"keys": 3}', b'{"keys": [{"kty": "EC"}]}', b"\xff" * 10])
async def test_an_issuer_that_answers_nonsense_is_unavailable(document: bytes) -> None:
    check = JwtVerifier([SALAD], fetch_of=lambda rule: lambda url: document, monotonic_s=Time())
    with pytest.raises(Unavailable):
        await check.verify(Issuer().sign(SALAD_CLAIMS))


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "token",
    ["", "x", "a.b.c", "é.é.é", "x" * 100_000, f"{_part([])}.{_part({})}.x", f"{_part({'alg': 3})}.{_part(3)}.x"],
)
async def test_garbage_is_no_token(token: str) -> None:
    with pytest.raises(Unauthenticated):
        await verifier(Issuer(), SALAD).verify(token)


def test_the_issuers_file_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "issuers.toml"
    file.write_text('[[issuer]]\nname = "salad"\nkind = "saladcloud"\norganization = "acme"\n')
    with pytest.raises(SettingsError, match=r"issuer 1: .*container_groups"):
        read_issuers(file)
    file.write_text('[[issuer]]\nname = "k"\nkind = "kubernetes"\nissuer = "https://c"\naudience = ["f"]\n')
    with pytest.raises(SettingsError, match="claims"):
        read_issuers(file)
    file.write_text('[[issuer]]\nname = "k"\nissuer = "https://c"\naudience = ["f"]\nuser = 3\n')
    with pytest.raises(SettingsError, match="user"):
        read_issuers(file)
    file.write_text("[[issuer]\n")
    with pytest.raises(SettingsError, match="not TOML"):
        read_issuers(file)
    file.write_text('[[issuer]]\nname = "k"\nissuer = "https://c"\naudience = ["f"]\n')
    assert read_issuers(file)[0].subject_path == "sub"
    assert read_issuers(None) == ()
