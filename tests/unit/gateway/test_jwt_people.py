"""People sign in with the token of an issuer: its claims give their tenant and role."""

from pathlib import Path
from typing import Any

import pytest

from fanlight.client import AsyncClient
from fanlight.errors import FanlightError, Unauthenticated
from services.gateway.adapters.jwt_identity import read_issuers, read_rules
from services.gateway.adapters.jwt_people import PeopleRule, PeopleVerifier
from services.gateway.app.tenants import Tenant
from services.gateway.domain.keys import KeyRole
from services.kernel.config import GatewayCommonSettings, SettingsError
from tests.fakes.fleet import Fleet
from tests.fakes.rpc_gateway import serving
from tests.unit.gateway.test_jwt_identity import NOW_S, Issuer, Time, _now  # noqa: F401  # a fixture

COMPANY = PeopleRule(
    name="company",
    issuer="https://login.example",
    audience=("fanlight",),
    role_claim="realm/groups",
    roles={KeyRole.SUBMIT: ("artists",), KeyRole.ADMIN: ("leads",)},
    tenant="acme",
)
MANY = COMPANY.model_copy(update={"tenant": "", "tenant_claim": "org", "tenants": ("acme", "globex")})
ANN = {
    "iss": "https://login.example",
    "aud": "fanlight",
    "sub": "ann",
    "realm": {"groups": ["artists", "everybody"]},
    "org": "globex",
}


def verifier(issuer: Issuer, rule: PeopleRule = COMPANY) -> PeopleVerifier:
    return PeopleVerifier([rule], fetch_of=lambda rule: issuer.fetch, monotonic_s=Time())


async def test_the_claims_give_the_role_and_the_rule_the_tenant() -> None:
    issuer = Issuer()
    person = await verifier(issuer).verify_person(issuer.sign(ANN))
    assert (person.issuer, person.subject, person.tenant, person.role) == ("company", "ann", "acme", KeyRole.SUBMIT)
    assert person.expire_s == NOW_S + 300.0


async def test_of_several_roles_the_widest_counts() -> None:
    issuer = Issuer()
    both = {"realm": {"groups": ["artists", "leads"]}}
    assert (await verifier(issuer).verify_person(issuer.sign({**ANN, **both}))).role is KeyRole.ADMIN


async def test_a_claim_may_name_the_tenant() -> None:
    issuer = Issuer()
    assert (await verifier(issuer, MANY).verify_person(issuer.sign(ANN))).tenant == "globex"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"realm": {"groups": ["everybody"]}}, "gives no role"),
        ({"realm": {"groups": "everybody"}}, "gives no role"),
        ({"realm": None}, "gives no role"),
        ({"realm": {"groups": [["artists"]]}}, "gives no role"),
        ({"org": "initech"}, "names no tenant"),
        ({"org": ["acme", "globex"]}, "or several"),
        ({"org": None}, "names no tenant"),
        ({"aud": "another"}, "audience"),
        ({"iss": "https://other.example"}, "does not trust"),
        ({"sub": None}, "sub"),
        ({"exp": NOW_S - 301.0}, "expired"),
    ],
)
async def test_who_has_no_place_here_is_refused(changed: dict[str, Any], words: str) -> None:
    issuer = Issuer()
    with pytest.raises(Unauthenticated, match=words):
        await verifier(issuer, MANY).verify_person(issuer.sign(ANN, **changed))


async def test_a_token_that_another_signed_is_refused() -> None:
    issuer, forger = Issuer(), Issuer()
    with pytest.raises(Unauthenticated, match="signature"):
        await verifier(issuer).verify_person(forger.sign(ANN))
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify_person("a.b.c")


TABLE = """
[[people]]
name = "company"
issuer = "https://login.example"
audience = ["fanlight"]
role_claim = "groups"
roles = {{ {role} = ["leads"] }}
{tenant}
"""


@pytest.mark.parametrize(
    ("role", "tenant", "words"),
    [
        ("admin", "", "either tenant, or tenant_claim"),
        ("admin", 'tenant = "acme"\ntenant_claim = "org"\ntenants = ["acme"]', "either tenant"),
        ("admin", 'tenant_claim = "org"', "tenant_claim and tenants"),
        ("admin", 'tenant = "no such name!"', "tenant"),
        ("operator", 'tenant = "acme"', "a \\[\\[people\\]\\] table of their own"),
        ("king", 'tenant = "acme"', "roles"),
        ("admin", 'tenant = "acme"\npool = "home"', "pool"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path, role: str, tenant: str, words: str) -> None:
    file = tmp_path / "issuers.toml"
    file.write_text(TABLE.format(role=role, tenant=tenant))
    with pytest.raises(SettingsError, match=words):
        read_rules(file, "people", PeopleRule)


def test_one_file_has_the_issuers_of_nodes_and_of_people(tmp_path: Path) -> None:
    file = tmp_path / "issuers.toml"
    file.write_text(
        TABLE.format(role="operator", tenant='tenant = "default"')
        + '[[issuer]]\nname = "own"\nissuer = "https://login.example"\naudience = ["nodes"]\n'
    )
    assert [rule.name for rule in read_issuers(file)] == ["own"]
    assert [rule.name for rule in read_rules(file, "people", PeopleRule)] == ["company"]
    file.write_text('[[persons]]\nname = "x"\n')
    with pytest.raises(SettingsError, match="tables"):
        read_issuers(file)


async def test_a_person_works_with_the_session_that_the_token_opened() -> None:
    issuer, token = Issuer(), "operator-0123456789"
    settings = GatewayCommonSettings(client_token=token, drain_grace_s=0)
    async with Fleet().running() as fleet:
        fleet.clock.advance(NOW_S - fleet.clock.now_s())
        acme = [Tenant(name="acme", token="acme-0123456789")]
        async with serving(fleet, settings, acme, verifier(issuer)) as address:
            async with AsyncClient(address) as stranger:
                opened = await stranger.keys.open_session(jwt=issuer.sign(ANN))
                with pytest.raises(FanlightError, match="issuer"):
                    await stranger.keys.open_session(jwt=issuer.sign(ANN, iss="https://other.example"))
                with pytest.raises(FanlightError, match="token or a key"):
                    await stranger.keys.open_session()
            async with AsyncClient(address, token=opened.secret) as ann:
                assert await ann.list_jobs() == []
                with pytest.raises(FanlightError, match="manage its tenant"):
                    await ann.keys.create()
            async with AsyncClient(address, token=token) as operator:
                made = await operator.keys.create(tenant="acme", note="for the wall")
                assert {key.id for key in await operator.keys.list()} == {opened.key.id, made.key.id}
                renewed = await operator.keys.rotate(made.key.id, overlap_s=0.0)
                await operator.keys.revoke(renewed.key.id)
                assert (await operator.keys.get(renewed.key.id)).HasField("revoke_time")
                assert {key.id for key in await operator.keys.list()} == {opened.key.id}
                ended = await operator.keys.list(tenant="acme", with_ended=True)
                assert {key.id for key in ended} == {opened.key.id, made.key.id, renewed.key.id}
