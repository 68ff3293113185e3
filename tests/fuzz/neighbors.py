"""A gateway process with a tenant that has secrets, a tenant that calls, and a credential of every role.

The secrets are words in prompts, notes and blobs, and ids; an answer that has one that its request had not is a leak.
"""

import base64
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.client import requests
from fanlight.gateway.v1 import gateway_pb2
from fanlight.keys.v1 import keys_pb2, keys_pb2_grpc
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from fanlight.tenants.v1 import tenants_pb2, tenants_pb2_grpc
from tests.fakes.gateway_process import GatewayProcess, RpcWorker, jobs_of

OPERATOR_TOKEN, WORKER_TOKEN = "operator-0123456789abcdef", "worker-0123456789abcdef"
# The canary is in whatever the tenant with secrets wrote.
CANARY = "kakapo1f9e"
VICTIM, CALLER = f"{CANARY}-co", "mallory"
OPERATOR, NODE, SESSION, NOBODY = "operator", "node", "session", "nobody"
KEY_ROLES = {
    "admin": keys_pb2.Key.ROLE_ADMIN,
    "submit": keys_pb2.Key.ROLE_SUBMIT,
    "read": keys_pb2.Key.ROLE_READ,
    "metrics": keys_pb2.Key.ROLE_METRICS,
    "scaler": keys_pb2.Key.ROLE_SCALER,
}
ROLES = (OPERATOR, *KEY_ROLES, SESSION, NODE, NOBODY)


@dataclass
class Neighbors:
    gateway: GatewayProcess
    secrets: set[bytes] = field(default_factory=set)
    # Role to its bearer token.
    tokens: dict[str, str] = field(default_factory=dict)
    # What calls may name: ids of both tenants.
    names: list[str] = field(default_factory=list)

    def names_for(self, role: str) -> list[str]:
        """The operator may end what the others have: it names nothing of theirs."""
        return ["", "default", "starter", "canny"] if role == OPERATOR else self.names

    def leaked(self, role: str, asked: bytes, answered: bytes) -> list[bytes]:
        """The secrets in an answer that the question had not."""
        if role == OPERATOR:
            return []
        return [each for each in self.secrets if each in answered and each not in asked]

    async def is_valid(self, role: str) -> bool:
        """Whether the gateway still knows the role's credential."""
        async with self.gateway.channel(self.tokens[role]) as channel:
            try:
                if role == NODE:
                    await queue_pb2_grpc.QueueServiceStub(channel).RenewLeases(queue_pb2.RenewLeasesRequest())
                else:
                    await tenants_pb2_grpc.TenantServiceStub(channel).GetQuota(tenants_pb2.GetQuotaRequest())
            except grpc.aio.AioRpcError as error:
                return error.code() is not grpc.StatusCode.UNAUTHENTICATED
        return True

    async def renew(self, role: str) -> None:
        """Another credential, where a call ended the role's own."""
        async with self.gateway.channel(OPERATOR_TOKEN) as channel:
            # Calls of an admin make keys too, up to the limit.
            keys = keys_pb2_grpc.KeyServiceStub(channel)
            listed = await keys.ListKeys(keys_pb2.ListKeysRequest(tenant=CALLER, page_size=100))
            if len(listed.keys) == 100:
                for key in listed.keys:
                    await keys.RevokeKey(keys_pb2.RevokeKeyRequest(id=key.id))
            if role in KEY_ROLES:
                self.tokens[role] = await _key(channel, CALLER, KEY_ROLES[role], note="")
            elif role == SESSION:
                self.tokens[role] = await self._session(channel)
            elif role == NODE:
                self.tokens[role] = await self._join(channel)

    async def _session(self, channel: grpc.aio.Channel) -> str:
        """Opened with a key of its own: a session ends with the key that opened it."""
        key = await _key(channel, CALLER, keys_pb2.Key.ROLE_ADMIN, note="")
        async with self.gateway.channel(key) as own:
            opened = await keys_pb2_grpc.KeyServiceStub(own).OpenSession(keys_pb2.OpenSessionRequest())
        return opened.secret

    async def _join(self, channel: grpc.aio.Channel) -> str:
        nodes = nodes_pb2_grpc.NodeServiceStub(channel)
        invite = await nodes.CreateInvite(nodes_pb2.CreateInviteRequest(uses=1))
        async with self.gateway.channel() as bare:
            stub = nodes_pb2_grpc.NodeServiceStub(bare)
            joined = await stub.Join(nodes_pb2.JoinRequest(join_code=invite.join_code, name="fuzzed"))
        return joined.credential


@asynccontextmanager
async def neighbors(folder: Path) -> AsyncIterator[Neighbors]:
    gateway = GatewayProcess(
        folder / "data",
        FANLIGHT_CLIENT_TOKEN=OPERATOR_TOKEN,
        FANLIGHT_WORKER_TOKEN=WORKER_TOKEN,
        FANLIGHT_GATEWAY_TENANT_REQUESTS_PER_S="1000000",
        FANLIGHT_LOG_LEVEL="warning",
    )
    found = Neighbors(gateway)
    try:
        await gateway.start()
        async with gateway.channel(OPERATOR_TOKEN) as operator, gateway.channel(WORKER_TOKEN) as workers:
            drawing = RpcWorker(workers, "diffusion")
            await RpcWorker(workers, "preprocess").lease(0)
            await drawing.lease(0)
            await _furnish(found, operator, drawing)
        for role in ROLES:
            await found.renew(role)
        found.tokens[OPERATOR] = OPERATOR_TOKEN
        yield found
    finally:
        await gateway.stop()


async def _furnish(found: Neighbors, operator: grpc.aio.Channel, worker: RpcWorker) -> None:
    """Jobs, blobs and keys of both tenants; the secrets' own, of the one."""
    ids = []
    for tenant, word in ((VICTIM, CANARY), (CALLER, "plain")):
        key = await _key(operator, tenant, keys_pb2.Key.ROLE_ADMIN, note=word)
        async with found.gateway.channel(key) as channel:
            jobs = jobs_of(channel)
            done = await jobs.CreateJob(_job(word, f"{word}-done"))
            await worker.work()
            waiting = await jobs.CreateJob(_job(word, f"{word}-waiting"))
            digest = await _blob(channel, f"{word} in a blob".encode())
            done = await jobs.GetJob(gateway_pb2.GetJobRequest(name=done.name))
            assert done.state == gateway_pb2.Job.STATE_SUCCEEDED
            keys = await keys_pb2_grpc.KeyServiceStub(channel).ListKeys(keys_pb2.ListKeysRequest())
        # Nothing of it is anybody's to lease from now on.
        limits = tenants_pb2.SetTenantRequest(name=tenant, pool=tenant, note=word)
        await tenants_pb2_grpc.TenantServiceStub(operator).SetTenant(limits)
        own = [done.name, waiting.name, digest, tenant, keys.keys[0].id, *(each.blob.digest for each in done.images)]
        ids += own
        if tenant == VICTIM:
            found.secrets |= {each.encode() for each in own} | {CANARY.encode(), *_in_base64(CANARY)}
    found.names = [*ids, *(each.removeprefix("jobs/") for each in ids), "", "default", "starter", "canny"]


def _job(word: str, request_id: str) -> gateway_pb2.CreateJobRequest:
    return gateway_pb2.CreateJobRequest(generation=requests.generation(f"{word} in a prompt"), request_id=request_id)


def _in_base64(text: str) -> Iterable[bytes]:
    """What is the same of it wherever it begins among the others."""
    for before in range(3):
        encoded = base64.b64encode(b"x" * before + text.encode())
        yield encoded[4 if before else 0 : -4]


async def _blob(channel: grpc.aio.Channel, data: bytes) -> str:
    parts = [
        blobs_pb2.WriteBlobRequest(header=blobs_pb2.WriteBlobHeader(size_bytes=len(data))),
        blobs_pb2.WriteBlobRequest(chunk=data),
    ]
    written = await blobs_pb2_grpc.BlobServiceStub(channel).WriteBlob(iter(parts))
    return str(written.blob.digest)


async def _key(operator: grpc.aio.Channel, tenant: str, role: int, *, note: str) -> str:
    request = keys_pb2.CreateKeyRequest(tenant=tenant, role=keys_pb2.Key.Role.ValueType(role), note=note)
    return (await keys_pb2_grpc.KeyServiceStub(operator).CreateKey(request)).secret
