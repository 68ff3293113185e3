"""Who this node is to the gateway: joining with a proof, the credential that it gets, and its renewal. Knows no stage.

The credential is kept in a file, so that a restarted worker is the same node and needs its join code only once. Workers
of one machine share the file.
"""

import asyncio
import contextlib
import fcntl
import json
import math
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import grpc.aio

from fanlight.contract.join_code import JoinCode
from fanlight.errors import FanlightError, Unauthenticated, Unavailable
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from services.kernel.logs import get_logger
from services.worker.retry import CALL_DEADLINE_S, Backoff, Env, our_errors

log = get_logger()

FILE = "node.json"
RENEW_AFTER = 0.5
TTL_MIN_S, TTL_MAX_S = 10.0, 30 * 86_400.0
# A credential that could not be renewed is tried again after this long at least.
RETRY_MAX_S = 60.0
METADATA_TIMEOUT_S = 5.0
LOCK_PAUSE_S = 0.2
# A clock that was set back by less does not matter.
CLOCK_STEP_S = 1.0
METADATA_LIMIT_BYTES = 16 * 1024
# SaladCloud's metadata service, on each of its machines.
SALADCLOUD_TOKEN_URL = "http://169.254.169.254/v1/token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom the node takes for its gateway beyond what its settings say: what its join code pins."""

    # PEM root certificates; None: the join code pins nothing.
    roots: bytes | None = None
    # The name that the gateway's certificate must have, in place of the dialed one.
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCredential:
    node_id: str
    credential: str = field(repr=False)
    # Of the system's clock, because the file outlives the process.
    renew_at_s: float
    expire_at_s: float
    stages: tuple[str, ...] = ()
    # PEM; empty where the roots come from elsewhere.
    roots: str = field(default="", repr=False)
    name: str = ""
    # The join code's invitation, or what else it came from: another proof makes another node.
    proof: str = ""

    @property
    def trust(self) -> Trust:
        return Trust(roots=self.roots.encode() or None, name=self.name)


class Proof(Protocol):
    """What a node proves its identity with."""

    @property
    def name(self) -> str:
        """Tells proofs apart without secrets, such as `invite:0123456789`."""
        ...

    def fill(self, request: nodes_pb2.JoinRequest) -> None:
        """Put the proof into the request. May read a file or ask the platform. Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class CodeProof:
    code: JoinCode

    @property
    def name(self) -> str:
        return f"invite:{self.code.invite}"

    def fill(self, request: nodes_pb2.JoinRequest) -> None:
        request.join_code = str(replace(self.code, gateway=""))


@dataclass(frozen=True, slots=True)
class TokenFileProof:
    """A platform's token in a file that the platform keeps fresh, such as Kubernetes' service account token."""

    file: Path
    name: str = "token_file"

    def fill(self, request: nodes_pb2.JoinRequest) -> None:
        try:
            request.jwt = self.file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self.file}: the node's identity token cannot be read") from error


@dataclass(frozen=True, slots=True)
class CertificateProof:
    """The client certificate of the connection itself."""

    name: str = "certificate"

    def fill(self, request: nodes_pb2.JoinRequest) -> None:
        pass


@dataclass(frozen=True, slots=True)
class SaladCloudProof:
    url: str = SALADCLOUD_TOKEN_URL
    name: str = "saladcloud"

    def fill(self, request: nodes_pb2.JoinRequest) -> None:
        """Never through a proxy: the metadata service is on the machine itself."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        asked = urllib.request.Request(self.url, headers={"Metadata": "true"})
        try:
            with opener.open(asked, timeout=METADATA_TIMEOUT_S) as response:
                token = json.loads(response.read(METADATA_LIMIT_BYTES))["jwt"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"SaladCloud's metadata service at {self.url} gives no token") from error
        request.jwt = str(token)


def _is_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


Sleep = Callable[[float], Coroutine[Any, Any, None]]
OpenChannel = Callable[[Trust], grpc.aio.Channel]


class CredentialFile:
    """The node's credential on disk, for this machine's workers alone."""

    def __init__(self, folder: Path, sleep: Sleep) -> None:
        self._folder, self._sleep = folder, sleep

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """While one worker joins or renews, the machine's others wait. Unavailable."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self._folder / "node.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            while not _is_locked(handle):
                await self._sleep(LOCK_PAUSE_S)
            yield
        finally:
            os.close(handle)

    def read(self) -> NodeCredential | None:
        """None where there is none, or not a sound one."""
        try:
            known = json.loads((self._folder / FILE).read_text())
            return NodeCredential(**{**known, "stages": tuple(known["stages"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("node_credential_unreadable", folder=str(self._folder), why=type(error).__name__)
            return None

    def write(self, credential: NodeCredential) -> None:
        """Unavailable where the folder takes no file."""
        names = NodeCredential.__dataclass_fields__
        partial = self._folder / f"{FILE}.partial"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                json.dump({name: getattr(credential, name) for name in names}, out)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(self._folder / FILE)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"{self._folder}: the node's credential cannot be kept: {error.strerror or error};"
            " set FANLIGHT_WORKER_STATE_DIR to a folder that can be written"
        )


class NodeIdentity:
    """Joins once, and keeps the credential fresh. `token` is what calls carry."""

    def __init__(
        self,
        proof: Proof,
        file: CredentialFile,
        *,
        find_trust: Callable[[], Trust],
        open_channel: OpenChannel,
        name: str,
        env: Env,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`find_trust`: whom to trust at the first contact; blocks. `open_channel`: to the gateway, without a token."""
        self._proof, self._file = proof, file
        self._find_trust, self._open_channel = find_trust, open_channel
        self._name = name
        self._env, self._wall_s = env, wall_s
        self._credential: NodeCredential | None = None

    @property
    def node_id(self) -> str:
        assert self._credential is not None
        return self._credential.node_id

    @property
    def trust(self) -> Trust:
        assert self._credential is not None
        return self._credential.trust

    def token(self) -> str:
        """The bearer token of the next call."""
        return self._credential.credential if self._credential else ""

    async def establish(self) -> None:
        """Take the credential of the file, or join. Unauthenticated where the proof is refused; Unavailable."""
        async with self._file.locked():
            known = self._file.read()
            if known is None or known.proof != self._proof.name or not await self._is_usable(known):
                await self._join()
                return
            log.info("node_known", node=known.node_id)

    async def _is_usable(self, known: NodeCredential) -> bool:
        """Takes it. One that seems to have expired is tried: the clock may be wrong, and the code used up."""
        self._credential = known
        if self._wall_s() < known.expire_at_s:
            return True
        try:
            await self._exchange()
        except Unauthenticated:
            return False
        return True

    async def recover(self) -> None:
        """After the gateway refused the credential: take what another worker of this machine got, or join again."""
        refused = self._credential
        async with self._file.locked():
            known = self._file.read()
            if known is not None and refused is not None and known.credential != refused.credential:
                self._credential = known
                return
            await self._join()

    async def run(self) -> None:
        """Renew until cancelled."""
        backoff = Backoff(self._env, max_s=RETRY_MAX_S)
        while True:
            assert self._credential is not None
            await self._env.sleep(self._due_in_s(self._credential))
            try:
                await self.renew_if_due()
                backoff.reset()
            except FanlightError as error:
                log.warning("node_credential_not_renewed", reason=error.reason, message=error.message)
                await self._env.sleep(backoff.next_s(error))

    async def renew_if_due(self) -> None:
        """Unless another worker of this machine did. Unauthenticated where the node has no rights any more."""
        async with self._file.locked():
            known = self._file.read()
            if known is not None and known.node_id == self.node_id:
                # The file has the latest; an older one would look like a copy.
                self._credential = known
                if self._due_in_s(known):
                    return
            await self._exchange()

    def _due_in_s(self, credential: NodeCredential) -> float:
        """Zero for what should be renewed. More than half of its life is left only where the clock was set back."""
        left_s = credential.renew_at_s - self._wall_s()
        return left_s if 0.0 < left_s <= credential.expire_at_s - credential.renew_at_s + CLOCK_STEP_S else 0.0

    async def _exchange(self) -> None:
        """For the next one, with the file locked."""
        old = self._credential
        assert old is not None
        async with self._open_channel(old.trust) as channel:
            metadata = (("authorization", f"bearer {old.credential}"),)
            with our_errors():
                answer = await nodes_pb2_grpc.NodeServiceStub(channel).RenewCredential(
                    nodes_pb2.RenewCredentialRequest(), metadata=metadata, timeout=CALL_DEADLINE_S
                )
        self._keep(answer, old.trust)

    async def _join(self) -> None:
        """With the file locked."""
        trust = await asyncio.to_thread(self._find_trust)
        # For all stages that the proof allows: the machine's workers are one node.
        request = nodes_pb2.JoinRequest(name=self._name)
        await asyncio.to_thread(self._proof.fill, request)
        async with self._open_channel(trust) as channel:
            with our_errors():
                answer = await nodes_pb2_grpc.NodeServiceStub(channel).Join(request, timeout=CALL_DEADLINE_S)
        self._keep(answer, trust)
        log.info("node_joined", node=answer.node_id, proof=self._proof.name)

    def _keep(self, answer: nodes_pb2.JoinResponse, trust: Trust) -> None:
        now_s = self._wall_s()
        # What a gateway says is bounded too, so that none can make a worker spin or never renew.
        ttl_s = min(TTL_MAX_S, max(TTL_MIN_S, answer.ttl_s if math.isfinite(answer.ttl_s) else TTL_MIN_S))
        self._credential = NodeCredential(
            node_id=answer.node_id,
            credential=answer.credential,
            renew_at_s=now_s + RENEW_AFTER * ttl_s,
            expire_at_s=now_s + ttl_s,
            stages=tuple(answer.stages),
            roots=(trust.roots or b"").decode(),
            name=trust.name,
            proof=self._proof.name,
        )
        self._file.write(self._credential)
