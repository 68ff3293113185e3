"""How a worker belongs to its gateway, by its settings: its proof, whom it trusts, and what its calls carry.

Without a proof it has the shared token of the gateway's own machine, or none.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio

from fanlight.channel import (
    PLAIN_TEXT_WARNING,
    Security,
    is_local,
    open_channel,
    security_of,
    system_roots,
    target_of,
)
from fanlight.contract.join_code import OWN_NAME, JoinCode, parse_join_code
from fanlight.errors import FanlightError, InvalidField, Unauthenticated, Unavailable
from services.kernel.config import CommonSettings, SettingsError, secret_of
from services.kernel.grpc_server import require_pair
from services.kernel.logs import get_logger
from services.worker.identity import (
    CertificateProof,
    CodeProof,
    CredentialFile,
    NodeIdentity,
    Proof,
    SaladCloudProof,
    TokenFileProof,
    Trust,
)
from services.worker.joining import Credentials, GatewayContact
from services.worker.loop import WorkerSettings
from services.worker.pinning import pinned_roots
from services.worker.retry import Backoff, Env, race

log = get_logger()

CODE_SETTING = "FANLIGHT_WORKER_JOIN_CODE (or FANLIGHT_WORKER_JOIN_CODE_FILE)"
PROOF_SETTINGS = f"{CODE_SETTING}, FANLIGHT_WORKER_IDENTITY and FANLIGHT_WORKER_IDENTITY_TOKEN_FILE"


def join_code_of(settings: WorkerSettings) -> JoinCode | None:
    """None where none is set. SettingsError for a malformed one."""
    text = secret_of(settings.join_code, settings.join_code_file)
    if not text:
        return None
    try:
        return parse_join_code(text)
    except InvalidField as error:
        raise SettingsError(f"{CODE_SETTING}: {error.message}") from error


def with_gateway(settings: WorkerSettings) -> WorkerSettings:
    """With the gateway of the join code, where no other is set. SettingsError."""
    code = join_code_of(settings)
    if code is None or settings.gateway is not None:
        return settings
    if not code.gateway:
        raise SettingsError(
            f"FANLIGHT_WORKER_GATEWAY: must be set, as the join code of {CODE_SETTING} names no gateway"
        )
    try:
        target_of(code.gateway)
    except ValueError as error:
        raise SettingsError(f"{CODE_SETTING}: its gateway {error}") from error
    return settings.model_copy(update={"gateway": code.gateway})


def proof_of(settings: WorkerSettings, common: CommonSettings) -> Proof | None:
    """What the settings say that the node joins with; None: it does not. SettingsError for two, or half of one."""
    code = join_code_of(settings)
    proofs: list[Proof] = [CodeProof(code)] if code else []
    if settings.identity == "saladcloud":
        proofs.append(SaladCloudProof())
    if settings.identity == "certificate":
        if common.certificate is None:
            raise SettingsError("FANLIGHT_WORKER_IDENTITY=certificate needs FANLIGHT_TLS_CERT_FILE and its KEY_FILE")
        proofs.append(CertificateProof())
    if settings.identity_token_file is not None:
        proofs.append(TokenFileProof(settings.identity_token_file))
    if len(proofs) > 1:
        raise SettingsError(f"{PROOF_SETTINGS}: set one of them; a node joins with one proof")
    return proofs[0] if proofs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialing:
    """Whom a worker calls, and how its settings protect that. OSError and ValueError as `security_of`."""

    gateway: str
    ca_file: Path | None = None
    certificate: tuple[Path, Path] | None = None
    plain_text: bool = False
    code: JoinCode | None = None

    def security(self, trust: Trust | None = None) -> Security:
        """`trust`: what a join code pins, which goes before all settings."""
        found = security_of(
            self.gateway, ca_file=self.ca_file, certificate=self.certificate, plain_text=self.plain_text
        )
        if trust is None or trust.roots is None:
            return found
        pinned = replace(found, is_plain_text=False, roots=trust.roots, name=trust.name)
        if self.certificate is not None:
            chain, key = self.certificate
            pinned = replace(pinned, certificate=(chain.read_bytes(), key.read_bytes()))
        if trust.name:
            return pinned
        # An operator's certificate may get another authority, such as a public one's next intermediate.
        usual = found.roots if found.roots is not None else system_roots()
        return replace(pinned, roots=trust.roots + b"\n" + (usual or b""))

    def find_trust(self) -> Trust:
        """What the join code pins, as the gateway shows it at first contact. Unauthenticated, Unavailable. Blocks."""
        if self.code is None or not self.code.authority:
            return Trust()
        refused: FanlightError = Unavailable(f"the gateway at {self.gateway} cannot be reached")
        for address in self.gateway.split(","):
            try:
                roots = pinned_roots(address, self.code.authority)
            except (Unauthenticated, Unavailable) as error:
                refused = error
                continue
            return Trust(roots=roots, name=OWN_NAME if self.code.is_own else "")
        raise refused

    def open(self, trust: Trust | None = None, token: Callable[[], str] | str = "") -> grpc.aio.Channel:
        return open_channel(self.gateway, token=token, security=self.security(trust))


class Membership:
    """A worker's standing with its gateway. Make it with `membership_of`."""

    def __init__(
        self, dialing: Dialing, identity: NodeIdentity | None, contact: GatewayContact, env: Env, *, shared_token: str
    ) -> None:
        """`identity`: None for a worker without a proof, whose calls carry the shared token."""
        self._dialing, self._identity, self._contact, self._env = dialing, identity, contact, env
        self._shared_token = shared_token
        # The credential that was refused last and exchanged for another one.
        self._refused = ""

    @property
    def node_id(self) -> str:
        """As the gateway named the node; empty for a worker without a proof."""
        return self._identity.node_id if self._identity else ""

    def token(self) -> str:
        """Of the next call."""
        return self._identity.token() if self._identity else self._shared_token

    def open_channel(self) -> grpc.aio.Channel:
        """Whose calls carry the token of their time. After `begin`."""
        return self._dialing.open(self._identity.trust if self._identity else None, self.token)

    async def begin(self, stop: asyncio.Event, *, delay_max_s: float) -> bool:
        """Join, or take the known credential; False where `stop` was set before. JoinRefused if it is never let in."""
        backoff = Backoff(self._env, max_s=delay_max_s)
        while self._identity is not None and not stop.is_set():
            try:
                await self._identity.establish()
                return True
            except FanlightError as error:
                await self._contact.note_failure(error, is_joining=True)
                await race(self._env.sleep(backoff.next_s(error)), stop.wait())
        return not stop.is_set()

    async def run(self) -> None:
        """Renew the credential until cancelled."""
        if self._identity is not None:
            await self._identity.run()

    async def recover(self, error: FanlightError) -> bool:
        """Whether there is a credential to try in place of the refused one. JoinRefused if it is never let in again."""
        if self._identity is None or error.code != "UNAUTHENTICATED":
            return False
        refused = self.token()
        if self._refused == refused:
            return False
        try:
            await self._identity.recover()
        except FanlightError as failure:
            await self._contact.note_failure(failure, is_joining=True)
            return False
        self._refused = self.token()
        return True


def membership_of(settings: WorkerSettings, common: CommonSettings, contact: GatewayContact, env: Env) -> Membership:
    """By the settings, which have a gateway. SettingsError."""
    assert settings.gateway is not None
    if common.certificate is not None:
        require_pair(*common.certificate)
    dialing = Dialing(
        gateway=settings.gateway,
        ca_file=common.tls_ca_file,
        certificate=common.certificate,
        plain_text=common.plain_text,
        code=join_code_of(settings),
    )
    _check(dialing)
    proof = proof_of(settings, common)
    if proof is None:
        return Membership(dialing, None, contact, env, shared_token=common.token_of_workers())
    identity = NodeIdentity(
        proof,
        CredentialFile(settings.state_dir, env.sleep),
        find_trust=dialing.find_trust,
        open_channel=dialing.open,
        name=settings.node,
        env=env,
    )
    return Membership(dialing, identity, contact, env, shared_token="")


def _check(dialing: Dialing) -> None:
    """SettingsError for files that cannot be read; a warning of plain text."""
    try:
        security = dialing.security()
    except OSError as error:
        raise SettingsError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
    is_pinned = dialing.code is not None and dialing.code.authority
    if security.is_plain_text and not is_pinned and not is_local(dialing.gateway):
        log.warning("plain_text_beyond_loopback", gateway=dialing.gateway, advice=PLAIN_TEXT_WARNING)


def credentials_of(settings: WorkerSettings, common: CommonSettings) -> Credentials:
    """What the worker has for its gateway, for advice. SettingsError."""
    assert settings.gateway is not None
    code = join_code_of(settings)
    is_pinned = code is not None and bool(code.authority)
    return Credentials(
        has_token=bool(common.token_of_workers()),
        has_proof=proof_of(settings, common) is not None,
        uses_tls=is_pinned or common.tls_ca_file is not None or not (common.plain_text or is_local(settings.gateway)),
        has_certificate=common.certificate is not None,
    )
