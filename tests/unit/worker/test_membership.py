"""What a worker's settings make it: how it proves who it is, whom it trusts, and what it does when it is refused."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme

from fanlight.channel import Security
from fanlight.contract.join_code import OWN_NAME, JoinCode
from fanlight.errors import FanlightError, Unauthenticated, Unavailable
from services.kernel.config import CommonSettings, SettingsError
from services.worker.identity import Trust
from services.worker.joining import Credentials, GatewayContact, JoinRefused, obstacle_of
from services.worker.loop import WorkerSettings
from services.worker.membership import (
    Dialing,
    Membership,
    credentials_of,
    membership_of,
    proof_of,
    with_gateway,
)
from services.worker.retry import Env

CODE = JoinCode(invite="0123456789", secret="a" * 64, authority="b" * 64, is_own=True, gateway="gw.example:50051")


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, Path]:
    made = trustme.CA().issue_cert("box", organization_unit_name="worker")
    files = {"tls_cert_file": tmp_path / "box.pem", "tls_key_file": tmp_path / "box.key"}
    files["tls_cert_file"].write_bytes(made.cert_chain_pems[0].bytes())
    files["tls_key_file"].write_bytes(made.private_key_pem.bytes())
    return files


def test_a_node_joins_with_what_its_settings_name(tmp_path: Path, certificate: dict[str, Path]) -> None:
    (tmp_path / "code").write_text(f"{CODE}\n")
    for settings, name in (
        ({}, None),
        ({"join_code": str(CODE)}, "invite:0123456789"),
        ({"join_code_file": tmp_path / "code"}, "invite:0123456789"),
        ({"identity": "saladcloud"}, "saladcloud"),
        ({"identity": "certificate"}, "certificate"),
        ({"identity_token_file": tmp_path / "token"}, "token_file"),
    ):
        proof = proof_of(WorkerSettings(**settings), CommonSettings(**certificate))
        assert (proof.name if proof else None) == name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"join_code": str(CODE), "identity": "saladcloud"}, "set one of them"),
        ({"identity": "saladcloud", "identity_token_file": "/run/token"}, "set one of them"),
        ({"identity": "certificate"}, "needs FANLIGHT_TLS_CERT_FILE"),
        ({"join_code": "flj1.nonsense"}, "FANLIGHT_WORKER_JOIN_CODE"),
        ({"join_code_file": "/absent/code"}, "/absent/code: cannot be read"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        proof_of(WorkerSettings(**settings), CommonSettings())


def test_a_malformed_code_is_not_quoted() -> None:
    secret = str(CODE).replace("flj1", "flj2")
    with pytest.raises(SettingsError) as raised:
        proof_of(WorkerSettings(join_code=secret), CommonSettings())
    assert CODE.secret not in str(raised.value)


def test_a_join_code_names_the_gateway_unless_the_settings_do() -> None:
    assert with_gateway(WorkerSettings(join_code=str(CODE))).gateway == "gw.example:50051"
    assert with_gateway(WorkerSettings(join_code=str(CODE), gateway="10.0.0.1:1")).gateway == "10.0.0.1:1"
    assert with_gateway(WorkerSettings()).gateway is None


@pytest.mark.parametrize(("gateway", "words"), [("", "names no gateway"), ("http://gw:1", "its gateway must be HOST")])
def test_a_join_code_without_a_gateway_that_can_be_dialed_is_refused(gateway: str, words: str) -> None:
    code = str(CODE).partition("@")[0] + (f"@{gateway}" if gateway else "")
    with pytest.raises(SettingsError, match=words):
        with_gateway(WorkerSettings(join_code=code))


def dialing(**fields: Any) -> Dialing:
    return Dialing(**{"gateway": "gw.example:1", **fields})


def test_what_a_code_pins_goes_before_all_settings(certificate: dict[str, Path]) -> None:
    pair = (certificate["tls_cert_file"], certificate["tls_key_file"])
    pinned = Trust(roots=b"pinned", name=OWN_NAME)
    for gateway in ("127.0.0.1:1", "gw.example:1"):
        found = dialing(gateway=gateway, plain_text=True, certificate=pair).security(pinned)
        assert found == Security(
            roots=b"pinned", name=OWN_NAME, certificate=(pair[0].read_bytes(), pair[1].read_bytes())
        )


def test_an_operators_certificate_is_trusted_by_its_authority_and_the_usual_roots(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(trustme.CA().cert_pem.bytes())
    found = dialing(ca_file=file).security(Trust(roots=b"pinned"))
    assert found.roots == b"pinned\n" + file.read_bytes()
    assert not found.name


def test_a_code_that_pins_nothing_leaves_it_to_the_settings() -> None:
    code = JoinCode(invite="0123456789", secret="a" * 64)
    assert dialing(code=code).find_trust() == Trust()
    assert not dialing(code=code).security(Trust()).is_plain_text
    assert dialing(code=code, plain_text=True).security(Trust()).is_plain_text


def test_of_several_gateways_the_first_that_answers_shows_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pinned_roots(address: str, authority: str) -> bytes:
        asked.append(address)
        if address.startswith("10.0.0.1"):
            raise Unavailable("away")
        return b"roots"

    monkeypatch.setattr("services.worker.membership.pinned_roots", pinned_roots)
    found = dialing(gateway="10.0.0.1:1,10.0.0.2:1", code=CODE).find_trust()
    assert found == Trust(roots=b"roots", name=OWN_NAME)
    assert asked == ["10.0.0.1:1", "10.0.0.2:1"]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)

    @property
    def env(self) -> Env:
        return Env(now_s=lambda: self.now_s, sleep=self.sleep, random=lambda: 0.5)


class FakeIdentity:
    """Establishes after the failures; each recovery gives the next credential."""

    trust = Trust()

    def __init__(self, *failures: FanlightError) -> None:
        self.failures, self.tries, self.credential = list(failures), 0, "first"

    @property
    def node_id(self) -> str:
        return "n1"

    def token(self) -> str:
        return self.credential

    async def establish(self) -> None:
        self.tries += 1
        if self.failures:
            raise self.failures.pop(0)

    async def recover(self) -> None:
        await self.establish()
        self.credential = f"recovered-{self.tries}"


def member(identity: Any, clock: Clock) -> tuple[Membership, GatewayContact]:
    credentials = Credentials(has_proof=True, uses_tls=True)
    contact = GatewayContact("gw:1", credentials, clock.env, refused_exit_s=10.0, refused_again_exit_s=600.0)
    return Membership(dialing(), identity, contact, clock.env, shared_token="shared"), contact


async def test_a_gateway_that_is_away_is_tried_until_it_answers() -> None:
    identity = FakeIdentity(*[Unavailable("away")] * 50)
    membership, contact = member(identity, Clock())
    assert await membership.begin(asyncio.Event(), delay_max_s=5.0)
    assert identity.tries == 51
    assert membership.token() == "first"
    assert contact.obstacle is not None
    assert not contact.obstacle.is_final


async def test_a_proof_that_is_refused_ends_the_worker_with_the_gateways_words() -> None:
    identity = FakeIdentity(*[Unauthenticated("shows another certificate")] * 1_000)
    membership, _ = member(identity, Clock())
    with pytest.raises(JoinRefused, match="cannot join: shows another certificate"):
        await membership.begin(asyncio.Event(), delay_max_s=5.0)


async def test_a_worker_that_is_stopped_does_not_join() -> None:
    stop = asyncio.Event()
    stop.set()
    membership, _ = member(FakeIdentity(), Clock())
    assert not await membership.begin(stop, delay_max_s=5.0)


async def test_a_refused_credential_is_exchanged_once() -> None:
    membership, _ = member(FakeIdentity(), Clock())
    assert not await membership.recover(Unavailable("away"))
    assert await membership.recover(Unauthenticated("expired"))
    fresh = membership.token()
    assert fresh != "first"
    assert not await membership.recover(Unauthenticated("expired"))
    assert membership.token() == fresh


async def test_a_worker_without_a_proof_carries_the_shared_token_and_recovers_nothing() -> None:
    membership, _ = member(None, Clock())
    assert await membership.begin(asyncio.Event(), delay_max_s=5.0)
    assert (membership.token(), membership.node_id) == ("shared", "")
    assert not await membership.recover(Unauthenticated("wrong"))


def test_a_refused_credential_is_another_obstacle_than_a_refused_token() -> None:
    refused = Unauthenticated("no")
    node = obstacle_of(refused, gateway="gw:1", credentials=Credentials(has_proof=True))
    local = obstacle_of(refused, gateway="gw:1", credentials=Credentials(has_token=True))
    assert node is not None
    assert local is not None
    assert (node.reason, local.reason) == ("credential_refused", "token_refused")


def test_plain_text_beyond_loopback_is_warned_of(tmp_path: Path) -> None:
    contact = GatewayContact("gw:1", Credentials(), Env(), refused_exit_s=1.0, refused_again_exit_s=1.0)
    for gateway, plain_text, count in (("gw.example:1", True, 1), ("gw.example:1", False, 0), ("127.0.0.1:1", True, 0)):
        settings = WorkerSettings(gateway=gateway, state_dir=tmp_path)
        common = CommonSettings(plain_text=plain_text)
        with structlog.testing.capture_logs() as logs:
            membership_of(settings, common, contact, Env())
        assert len([each for each in logs if each["event"] == "plain_text_beyond_loopback"]) == count
        assert credentials_of(settings, common).uses_tls == (not plain_text and gateway != "127.0.0.1:1")
