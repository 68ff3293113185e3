"""A node can harm nothing but its own leases: a rogue one tries all it can over gRPC."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import grpc.aio
import pytest

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.channel import open_channel
from fanlight.contract.join_code import parse_join_code
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError, LeaseLost, PermissionDenied, TooLarge, Unauthenticated
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from services.gateway.app.tenants import Tenant
from services.gateway.domain.job import DIFFUSION, PREPROCESS, JobState
from services.kernel.config import GatewayCommonSettings
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.fleet import Fleet, annotation, generation
from tests.fakes.gateway_process import RpcWorker
from tests.fakes.rpc_gateway import serving

OPERATOR, WORKERS, ACME = "operator-0123456789", "workers-0123456789", "acme-0123456789"
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A node and the stubs that call with its credential."""

    node_id: str
    credential: str
    queue: queue_pb2_grpc.QueueServiceStub
    blobs: blobs_pb2_grpc.BlobServiceStub
    nodes: nodes_pb2_grpc.NodeServiceStub
    jobs: gateway_pb2_grpc.JobServiceStub


class Town:
    """A gateway with an operator, a tenant, the shared worker token, and whoever joins."""

    def __init__(self, fleet: Fleet, address: str) -> None:
        self.fleet, self.address = fleet, address

    @asynccontextmanager
    async def stubs(self, token: str) -> AsyncIterator[Joined]:
        async with open_channel(self.address, token=token) as channel:
            yield Joined(
                node_id="",
                credential=token,
                queue=queue_pb2_grpc.QueueServiceStub(channel),
                blobs=blobs_pb2_grpc.BlobServiceStub(channel),
                nodes=nodes_pb2_grpc.NodeServiceStub(channel),
                jobs=gateway_pb2_grpc.JobServiceStub(channel),
            )

    @asynccontextmanager
    async def joined(self, **grant: object) -> AsyncIterator[Joined]:
        async with self.stubs(OPERATOR) as operator:
            request = nodes_pb2.CreateInviteRequest(grant=nodes_pb2.Grant(**grant))
            code = parse_join_code((await operator.nodes.CreateInvite(request)).join_code)
        async with self.stubs("") as stranger:
            answer = await stranger.nodes.Join(nodes_pb2.JoinRequest(join_code=str(code), name="box"))
        async with self.stubs(answer.credential) as stubs:
            yield Joined(**{name: getattr(stubs, name) for name in Joined.__slots__} | {"node_id": answer.node_id})


@pytest.fixture
async def town(fleet: Fleet) -> AsyncIterator[Town]:
    common = GatewayCommonSettings(drain_grace_s=0, client_token=OPERATOR, worker_token=WORKERS)
    async with serving(fleet, common, [Tenant(name="acme", token=ACME)]) as address:
        yield Town(fleet, address)


def poll(worker_id: str, needs: frozenset[str] = frozenset(), *, secret: bytes = b"s") -> queue_pb2.LeaseTasksRequest:
    return queue_pb2.LeaseTasksRequest(
        worker=queue_pb2.Worker(id=worker_id, node="any", stage=DIFFUSION, slots=1, disk_models=["starter"]),
        capabilities=queue_pb2.Capabilities(
            models=[diffusion_pb2.Model(id="starter", kind="checkpoint")],
            offers=sorted(needs - {"checkpoint:starter"}),
        ),
        capabilities_digest=b"d",
        max_tasks=1,
        worker_secret=secret,
    )


async def refused(call: Awaitable[object]) -> FanlightError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_node_polls_under_its_own_ids_alone(town: Town) -> None:
    async with town.joined() as node, town.joined() as other:
        await node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1"))
        for foreign in ("worker", f"{other.node_id}-diffusion-1", node.node_id, f"{node.node_id}x-1"):
            error = await refused(node.queue.LeaseTasks(poll(foreign)))
            assert isinstance(error, PermissionDenied)
            assert error.field == "worker.id"
        assert isinstance(
            await refused(node.queue.RenewLeases(queue_pb2.RenewLeasesRequest(worker_id=f"{other.node_id}-1"))),
            PermissionDenied,
        )


async def test_the_node_of_a_worker_is_the_one_that_its_credential_proves(town: Town) -> None:
    async with town.joined() as node:
        await node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1"))
        (status,) = town.fleet.gateway.workers.statuses()
        assert status.worker.node == node.node_id


async def test_two_processes_cannot_poll_under_one_id(town: Town) -> None:
    async with town.stubs(WORKERS) as local:
        await local.queue.LeaseTasks(poll("worker-a", secret=b"first"))
        for secret in (b"second", b""):
            assert isinstance(await refused(local.queue.LeaseTasks(poll("worker-a", secret=secret))), PermissionDenied)
        await local.queue.LeaseTasks(poll("worker-a", secret=b"first"))


async def test_a_node_serves_only_the_stages_that_it_was_invited_for(town: Town) -> None:
    async with town.joined(stages=["preprocess"]) as node:
        error = await refused(node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1")))
        assert isinstance(error, PermissionDenied)
        assert "preprocess" in error.message


async def test_a_node_reads_and_writes_what_its_live_leases_are_about(town: Town) -> None:
    async with town.joined() as node, town.joined() as other:
        assert isinstance(await refused(write(node, "default")), LeaseLost)
        job = await town.fleet.gateway.jobs.create(generation())
        needs = job.requests[0].facts.needs
        (task,) = (await node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1", needs))).tasks
        written = await write(node, "default")
        assert isinstance(await refused(write(node, "acme")), LeaseLost)
        assert isinstance(await refused(write(other, "default")), LeaseLost)
        for reader in (node, other):
            assert isinstance(await refused(read(reader, written.blob.digest)), LeaseLost)
        failed = queue_pb2.FailTaskRequest(lease_token=task.lease_token, fault=queue_pb2.FailTaskRequest.FAULT_RETURNED)
        assert isinstance(await refused(other.queue.FailTask(failed)), LeaseLost)
        await node.queue.FailTask(failed)
        assert isinstance(await refused(write(node, "default")), LeaseLost)


async def write(node: Joined, scope: str) -> blobs_pb2.WriteBlobResponse:
    parts = [
        blobs_pb2.WriteBlobRequest(header=blobs_pb2.WriteBlobHeader(scope=scope)),
        blobs_pb2.WriteBlobRequest(chunk=PNG),
    ]
    return await node.blobs.WriteBlob(iter(parts))


async def read(node: Joined, digest: str) -> bytes:
    request = blobs_pb2.ReadBlobRequest(scope="default", digest=digest)
    return b"".join([part.chunk async for part in node.blobs.ReadBlob(request)])


async def test_a_credential_opens_nothing_but_the_queue_and_its_own_renewal(town: Town) -> None:
    async with town.joined() as node:
        assert isinstance(await refused(node.jobs.ListJobs(gateway_pb2.ListJobsRequest())), Unauthenticated)
        for call in (
            node.nodes.ListNodes(nodes_pb2.ListNodesRequest()),
            node.nodes.CreateInvite(nodes_pb2.CreateInviteRequest()),
            node.nodes.RevokeNode(nodes_pb2.RevokeNodeRequest(id=node.node_id)),
        ):
            assert isinstance(await refused(call), Unauthenticated | PermissionDenied)
        renewed = await node.nodes.RenewCredential(nodes_pb2.RenewCredentialRequest())
        assert renewed.node_id == node.node_id


async def test_a_tenant_invites_nobody_and_leases_nothing(town: Town) -> None:
    async with town.stubs(ACME) as tenant:
        assert isinstance(await refused(tenant.nodes.ListNodes(nodes_pb2.ListNodesRequest())), PermissionDenied)
        assert isinstance(await refused(tenant.queue.LeaseTasks(poll("worker-a"))), Unauthenticated)


async def test_a_revoked_node_loses_its_leases_at_once(town: Town) -> None:
    async with town.joined() as node, town.stubs(OPERATOR) as operator:
        job = await town.fleet.gateway.jobs.create(generation())
        needs = job.requests[0].facts.needs
        assert (await node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1", needs))).tasks
        await operator.nodes.RevokeNode(nodes_pb2.RevokeNodeRequest(id=node.node_id, reason="it lied"))
        assert isinstance(
            await refused(node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1", needs))), Unauthenticated
        )
        (task,) = (await town.fleet.get(job)).tasks
        assert task.state.value == "queued"
        shown = await operator.nodes.GetNode(nodes_pb2.GetNodeRequest(id=node.node_id))
        assert (shown.state, shown.reason) == (nodes_pb2.Node.STATE_REVOKED, "it lied")


async def test_a_node_that_is_revoked_in_the_middle_of_a_batch_costs_no_image(town: Town) -> None:
    job = await town.fleet.gateway.jobs.create(generation(4))
    async with (
        town.joined() as first,
        town.joined() as second,
        town.stubs(OPERATOR) as operator,
        open_channel(town.address, token=first.credential) as from_first,
        open_channel(town.address, token=second.credential) as from_second,
    ):
        rogue = RpcWorker(from_first, DIFFUSION, name=first.node_id)
        honest = RpcWorker(from_second, DIFFUSION, name=second.node_id)
        batch = await rogue.lease()
        assert len(batch) == 4
        await rogue.complete(batch[0])
        await operator.nodes.RevokeNode(nodes_pb2.RevokeNodeRequest(id=first.node_id))
        for task in batch[1:]:
            assert isinstance(await refused(rogue.complete(task)), Unauthenticated)
        town.fleet.rest()
        assert await honest.work() == 3
    ended = await town.fleet.get(job)
    assert ended.state is JobState.SUCCEEDED
    assert [task.lease.node for task in ended.tasks if task.lease] == [first.node_id, *[second.node_id] * 3]
    assert [len(task.outputs) for task in ended.tasks] == [1] * 4


async def test_a_node_cannot_make_the_gateway_parse_a_message_larger_than_its_reports_may_be(town: Town) -> None:
    async with town.joined() as node:
        asked = poll(f"{node.node_id}-diffusion-1")
        asked.worker.disk_models.extend(f"model-{number:0250}" for number in range(70_000))
        error = await refused(node.queue.LeaseTasks(asked))
        assert isinstance(error, TooLarge)
        assert (error.field, "at most 16777216" in error.message) == ("request", True)
        named = nodes_pb2.JoinRequest(name="x" * 2_000_000)
        assert isinstance(await refused(node.nodes.Join(named)), TooLarge)
        # Others, and the node's next call, go on.
        assert not (await node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1"))).tasks


async def test_a_drained_node_gets_no_more_tasks_until_that_is_undone(town: Town) -> None:
    async with town.joined() as node, town.stubs(OPERATOR) as operator:
        job = await town.fleet.gateway.jobs.create(generation())
        asked = poll(f"{node.node_id}-diffusion-1", job.requests[0].facts.needs)
        await operator.nodes.DrainNode(nodes_pb2.DrainNodeRequest(id=node.node_id))
        assert not (await node.queue.LeaseTasks(asked)).tasks
        await operator.nodes.DrainNode(nodes_pb2.DrainNodeRequest(id=node.node_id, undo=True))
        assert (await node.queue.LeaseTasks(asked)).tasks


async def test_no_worker_announces_itself_into_a_pool(town: Town) -> None:
    async with town.joined(pool="home") as node:
        asked = poll(f"{node.node_id}-diffusion-1", frozenset({"pool:trusted", "label:a=b"}))
        await node.queue.LeaseTasks(asked)
        (known,) = town.fleet.gateway.workers.statuses()
        abilities = town.fleet.gateway.workers.offers.abilities_of(known.worker.id)
        assert abilities is not None
        offers, _ = abilities
        assert "pool:home" in offers
        assert not {"pool:trusted", "label:a=b"} & offers


async def test_the_shared_token_works_from_this_machine_alone(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.rpc.principals.address_of_peer", lambda peer: "203.0.113.7")
    async with town.stubs(WORKERS) as local:
        error = await refused(local.queue.LeaseTasks(poll("worker-a")))
        assert isinstance(error, Unauthenticated)
        assert "fanlight nodes invite" in error.message


async def test_a_node_reads_the_image_of_its_own_task_and_no_other_node_does(town: Town) -> None:
    async with town.joined() as node, town.joined() as other:
        job = await town.fleet.gateway.jobs.create(annotation())
        asked = poll(f"{node.node_id}-preprocess-1", job.requests[0].facts.needs)
        asked.worker.stage = PREPROCESS
        asked.capabilities.annotators.add(id="canny")
        (task,) = (await node.queue.LeaseTasks(asked)).tasks
        request = preprocessor_pb2.AnnotateRequest()
        task.request.Unpack(request)
        assert await read(node, request.image.blob.digest)
        assert isinstance(await refused(read(other, request.image.blob.digest)), LeaseLost)
        async with town.stubs(WORKERS) as local:
            assert isinstance(await refused(read(local, request.image.blob.digest)), LeaseLost)


async def test_a_job_of_a_pool_goes_to_the_nodes_of_that_pool_alone(town: Town) -> None:
    async with town.joined(pool="home") as stranger, town.joined(pool="trusted") as trusted:
        needs = generation().draft.plan({}, lambda: 0).requests[0].facts.needs
        for node in (stranger, trusted):
            await node.queue.LeaseTasks(poll(f"{node.node_id}-diffusion-1", needs))
        job = await town.fleet.gateway.jobs.create(replace(generation(), pool="trusted"))
        assert not (await stranger.queue.LeaseTasks(poll(f"{stranger.node_id}-diffusion-1", needs))).tasks
        (task,) = (await trusted.queue.LeaseTasks(poll(f"{trusted.node_id}-diffusion-1", needs))).tasks
        assert task.name.startswith(job.name)
        with pytest.raises(FailedPrecondition, match="pool nobody"):
            await town.fleet.gateway.jobs.create(replace(generation(), pool="nobody"))
