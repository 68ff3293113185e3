"""How a worker gets on with its gateway: whether it answers, why not, and when trying again cannot help.

Knows no stage.
"""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc.aio

from fanlight import __version__
from fanlight.channel import PLAIN_TEXT_SETTING
from fanlight.errors import FanlightError, Unauthenticated
from services.kernel.config import ProcessEnd
from services.kernel.logs import get_logger
from services.worker.retry import Env, Throttle

log = get_logger()

# The same failure is logged again after this time.
SAY_AGAIN_EVERY_S = 60.0
PROBE_LIMIT_S = 3.0

TOKEN = "FANLIGHT_WORKER_TOKEN (or FANLIGHT_WORKER_TOKEN_FILE)"
ADDRESS = "FANLIGHT_WORKER_GATEWAY"
ROOTS = "FANLIGHT_TLS_CA_FILE"


class JoinRefused(ProcessEnd):
    """The gateway and this worker's settings do not fit, and have not for some time."""

    # EX_CONFIG of sysexits.h.
    exit_code = 78


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why a poll failed. `is_final`: with the same settings on both sides it always fails."""

    reason: str
    # One sentence: what is wrong, and what to set.
    advice: str
    is_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What this worker was given for the gateway, not the values."""

    has_token: bool = False
    # A node's own: a join code, a platform's token or a certificate.
    has_proof: bool = False
    uses_tls: bool = False
    has_certificate: bool = False


def obstacle_of(
    error: FanlightError, *, gateway: str, credentials: Credentials, is_joining: bool = False
) -> Obstacle | None:
    """What the error means; None where only a look at the connection can tell.

    `is_joining`: it comes from the exchange of the node's proof, not from a poll.
    """
    code, text = _code_of(error), " ".join(error.message.split())
    if is_joining and not isinstance(error.__cause__, grpc.aio.AioRpcError):
        return _own_obstacle(error, text)
    if is_joining and code in ("UNAUTHENTICATED", "INVALID_ARGUMENT"):
        advice = f"the gateway at {gateway} does not let this node join: {text}"
        return Obstacle(reason="proof_refused", advice=advice, is_final=True)
    if code == "UNAUTHENTICATED":
        return _token_obstacle(gateway, credentials)
    if code == "UNIMPLEMENTED":
        advice = (
            f"{gateway} speaks gRPC but is no Fanlight gateway that this worker ({__version__}) knows: correct"
            f" {ADDRESS}, or run the same version on both"
        )
        return Obstacle(reason="not_a_gateway", advice=advice, is_final=True)
    if code == "PERMISSION_DENIED":
        return Obstacle(
            reason="not_admitted", advice=f"the gateway at {gateway} does not admit this worker: {text}", is_final=True
        )
    if code == "INVALID_ARGUMENT":
        advice = (
            f"the gateway at {gateway} refuses what this worker ({__version__}) reports: {error.field or 'worker'}: "
            f"{text}; run the same version on both"
        )
        return Obstacle(reason="report_refused", advice=advice, is_final=True)
    if any(words in text.lower() for words in _AMBIGUOUS) and code == "UNAVAILABLE":
        return None
    for pattern, reason, advice, is_final in _BY_TEXT:
        if re.search(pattern, text, re.IGNORECASE):
            return Obstacle(reason=reason, advice=advice.format(gateway=gateway), is_final=is_final)
    if code == "DEADLINE_EXCEEDED":
        return _silent(gateway)
    return Obstacle(reason=error.reason.lower(), advice=f"the gateway at {gateway} does not give tasks now: {text}")


def _code_of(error: FanlightError) -> str:
    """gRPC's own code, where the error came over the wire."""
    cause = error.__cause__
    return cause.code().name if isinstance(cause, grpc.aio.AioRpcError) else error.code


def _own_obstacle(error: FanlightError, text: str) -> Obstacle:
    """What this machine found itself while it joined: a gateway with another certificate, or no proof or folder yet."""
    if isinstance(error, Unauthenticated):
        return Obstacle(reason="another_gateway", advice=text, is_final=True)
    return Obstacle(reason="cannot_join_yet", advice=text)


def _token_obstacle(gateway: str, credentials: Credentials) -> Obstacle:
    if credentials.has_proof:
        advice = f"the gateway at {gateway} does not take this node's credential any more: see `fanlight nodes list`"
        return Obstacle(reason="credential_refused", advice=advice, is_final=True)
    what = "refuses this worker's token" if credentials.has_token else "asks for a credential"
    advice = (
        f"the gateway at {gateway} {what}: set FANLIGHT_WORKER_JOIN_CODE to a code from `fanlight nodes invite`, or on"
        f" the gateway's own machine {TOKEN} to its worker token"
    )
    return Obstacle(reason="token_refused", advice=advice, is_final=True)


def _silent(gateway: str) -> Obstacle:
    return Obstacle(
        reason="no_answer", advice=f"{gateway} does not answer: check {ADDRESS}, the firewall and the gateway's log"
    )


# In what gRPC says when the other side ends a connection: it wanted TLS, a certificate, or neither.
_AMBIGUOUS = ("socket closed", "connection reset", "broken pipe")
_BY_TEXT = (
    (
        "WRONG_VERSION_NUMBER",
        "no_tls_there",
        f"{{gateway}} does not speak TLS: correct {ADDRESS}, give the gateway a certificate (FANLIGHT_TLS_CERT_FILE),"
        f" or, in a network that you trust, unset {ROOTS} and set {PLAIN_TEXT_SETTING}=true",
        True,
    ),
    (
        "CERTIFICATE_VERIFY_FAILED.*expired",
        "certificate_expired",
        "the certificate of the gateway at {gateway} has expired: renew it there, and check this machine's clock",
        False,
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "certificate_not_trusted",
        f"the certificate of the gateway at {{gateway}} is not signed by a root that this worker trusts: set {ROOTS} to"
        " the root that signed it, or join with a new code, which names it",
        True,
    ),
    (
        "Hostname Verification|not in peer certificate",
        "certificate_of_another_name",
        f"the certificate of the gateway at {{gateway}} is for another name: use its name in {ADDRESS}",
        True,
    ),
    (
        "ALPN|parsing HTTP/2|http1\\.x",
        "not_grpc",
        f"{{gateway}} answers, but not with gRPC: set {ADDRESS} to the gateway's gRPC address, not the one for HTTP",
        True,
    ),
    (
        "errors resolving|resolution failed|Domain name not found|lookup failed",
        "name_not_found",
        f"the name in {{gateway}} is not found: correct {ADDRESS}, or this machine's DNS",
        False,
    ),
    (
        "Connection refused",
        "nobody_listens",
        f"nobody listens at {{gateway}}: start the gateway, or correct {ADDRESS}",
        False,
    ),
    (
        "unreachable|No route to host|timed? ?out",
        "no_answer",
        f"{{gateway}} cannot be reached: check {ADDRESS}, the network and the firewall",
        False,
    ),
    (
        "HTTP proxy",
        "proxy_refuses",
        "the HTTP proxy of http_proxy does not connect to {gateway}: add its host to no_proxy, or allow it there",
        False,
    ),
    (
        "http2 header with status: 5",
        "proxy_without_gateway",
        "a proxy answers at {gateway}, and the gateway behind it does not: see the proxy's log",
        False,
    ),
)


async def look_at(gateway: str, credentials: Credentials) -> Obstacle:
    """Why the other side ended the connection: shakes hands by TLS itself, and trusts nobody for that."""
    closed = Obstacle(
        reason="connection_closed", advice=f"{gateway} ends connections: check {ADDRESS}, and any proxy between"
    )
    after = await _handshake(gateway, ssl.TLSVersion.TLSv1_3)
    if after is None:
        return closed
    if not credentials.uses_tls:
        advice = (
            f"{gateway} speaks TLS: join with a code from `fanlight nodes invite`, or set {ROOTS} to the roots"
            " that signed its certificate"
        )
        return Obstacle(reason="tls_needed", advice=advice, is_final=True)
    # With TLS 1.3 a server that misses a certificate ends the connection after the handshake, as others do that have
    # nobody behind them; with TLS 1.2, before its end.
    if after == _OPEN or await _handshake(gateway, ssl.TLSVersion.TLSv1_2) is not None:
        return closed
    what = "refuses this worker's certificate" if credentials.has_certificate else "asks for a certificate"
    advice = (
        f"the gateway at {gateway} {what}: set FANLIGHT_TLS_CERT_FILE and FANLIGHT_TLS_KEY_FILE to one that its"
        " FANLIGHT_TLS_CLIENT_CA_FILE signed"
    )
    return Obstacle(reason="certificate_needed", advice=advice, is_final=True)


_OPEN, _CLOSED = "open", "closed"


async def _handshake(gateway: str, version: ssl.TLSVersion) -> str | None:
    """Whether the connection is open after the handshake, or closed; None where there is no handshake."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.maximum_version = version
    host, _, port = gateway.split(",")[0].rpartition(":")
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    except (OSError, TimeoutError):
        return None
    try:
        # A gRPC server speaks first.
        async with asyncio.timeout(PROBE_LIMIT_S):
            return _OPEN if await reader.read(1) else _CLOSED
    except TimeoutError:
        return _OPEN
    except OSError:
        return _CLOSED
    finally:
        writer.close()


class GatewayContact:
    """Whether the gateway answers the polls. Logs an obstacle once, then seldom; ends the process if it is final."""

    def __init__(
        self,
        gateway: str,
        credentials: Credentials,
        env: Env,
        *,
        refused_exit_s: float,
        refused_again_exit_s: float,
        look: Callable[[str, Credentials], Awaitable[Obstacle]] = look_at,
    ) -> None:
        """`refused_exit_s`: how long final obstacles are tried again; `refused_again_exit_s`: after it had joined."""
        self.has_joined = False
        # What is wrong now; None while the gateway answers.
        self.obstacle: Obstacle | None = None
        self._gateway = gateway
        self._credentials = credentials
        self._env = env
        self._exit_s, self._again_exit_s = refused_exit_s, refused_again_exit_s
        self._look = look
        self._answered_s = env.now_s()
        self._final_since_s: float | None = None
        self._throttle = Throttle(env, every_s=SAY_AGAIN_EVERY_S)

    @property
    def answers(self) -> bool:
        """Whether the last poll was answered."""
        return self.has_joined and self.obstacle is None

    @property
    def silent_s(self) -> float:
        """How long ago the last poll was answered, or the start if none was."""
        return self._env.now_s() - self._answered_s

    def note_answer(self) -> None:
        if not self.answers:
            log.info("gateway_joined", gateway=self._gateway)
        self.has_joined, self.obstacle, self._final_since_s = True, None, None
        self._answered_s = self._env.now_s()
        self._throttle.reset()

    async def note_failure(self, error: FanlightError, *, is_joining: bool = False) -> None:
        """JoinRefused where the obstacles have been final for long enough. `is_joining`: see `obstacle_of`."""
        obstacle = obstacle_of(error, gateway=self._gateway, credentials=self._credentials, is_joining=is_joining)
        if obstacle is None:
            obstacle = await self._look(self._gateway, self._credentials)
        self.obstacle = obstacle
        if self._throttle.allows(obstacle.reason):
            log.warning("poll_failed", reason=obstacle.reason, error=obstacle.advice, tries_again=not obstacle.is_final)
        if not obstacle.is_final:
            self._final_since_s = None
            return
        now_s = self._env.now_s()
        if self._final_since_s is None:
            self._final_since_s = now_s
        if now_s - self._final_since_s >= (self._again_exit_s if self.has_joined else self._exit_s):
            raise JoinRefused(f"cannot join: {obstacle.advice}")
