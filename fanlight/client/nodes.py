"""The operator's calls about nodes: invitations, and the machines that joined."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc.aio

from fanlight.client.retry import Answer, Retry
from fanlight.nodes.v1 import nodes_pb2 as nodes
from fanlight.nodes.v1.nodes_pb2_grpc import NodeServiceStub

PAGE_NODES = 100


class NodeCalls:
    """A part of AsyncClient. Every call needs the operator's token: CallFailed with PERMISSION_DENIED otherwise."""

    def __init__(self, channel: grpc.aio.Channel, retry: Retry, *, timeout_s: float) -> None:
        self._stub = NodeServiceStub(channel)
        self._retry, self._timeout_s = retry, timeout_s

    async def invite(
        self,
        *,
        uses: int = 1,
        ttl_s: float = 3_600.0,
        pool: str = "",
        labels: Mapping[str, str] | None = None,
        stages: Sequence[str] = (),
        comment: str = "",
    ) -> nodes.CreateInviteResponse:
        """A join code, which is a secret. Not retried after a lost response: each call makes another one."""
        grant = nodes.Grant(
            pool=pool,
            labels=[nodes.Label(name=name, value=value) for name, value in (labels or {}).items()],
            stages=stages,
        )
        request = nodes.CreateInviteRequest(grant=grant, uses=uses, ttl_s=ttl_s, comment=comment)
        return await self._call(lambda left_s: self._stub.CreateInvite(request, timeout=left_s))

    async def list_invites(self) -> list[nodes.Invite]:
        request = nodes.ListInvitesRequest()
        return list((await self._call(lambda left_s: self._stub.ListInvites(request, timeout=left_s))).invites)

    async def remove_invite(self, invite_id: str) -> None:
        request = nodes.RemoveInviteRequest(id=invite_id)
        await self._call(lambda left_s: self._stub.RemoveInvite(request, timeout=left_s))

    async def list(self, *, limit: int = 50) -> list[nodes.Node]:
        """Those that joined last first, as many pages as the limit takes."""
        found: list[nodes.Node] = []
        page_token = ""
        while len(found) < limit:
            page = await self._page(min(limit - len(found), PAGE_NODES), page_token)
            found += page.nodes
            page_token = page.next_page_token
            if not page_token:
                break
        return found

    async def _page(self, page_size: int, page_token: str) -> nodes.ListNodesResponse:
        request = nodes.ListNodesRequest(page_size=page_size, page_token=page_token)
        return await self._call(lambda left_s: self._stub.ListNodes(request, timeout=left_s))

    async def get(self, node_id: str) -> nodes.Node:
        request = nodes.GetNodeRequest(id=node_id)
        return await self._call(lambda left_s: self._stub.GetNode(request, timeout=left_s))

    async def drain(self, node_id: str, *, undo: bool = False) -> nodes.Node:
        """Its workers finish what they lease and get no more tasks; `undo` ends that."""
        request = nodes.DrainNodeRequest(id=node_id, undo=undo)
        return await self._call(lambda left_s: self._stub.DrainNode(request, timeout=left_s))

    async def revoke(self, node_id: str, *, reason: str = "") -> nodes.Node:
        """Ends its credentials and leases at once, and drops the cached control images that it made."""
        request = nodes.RevokeNodeRequest(id=node_id, reason=reason)
        return await self._call(lambda left_s: self._stub.RevokeNode(request, timeout=left_s))

    async def purge(self, node_id: str) -> int:
        """Drops the cached control images that it made, and returns how many."""
        request = nodes.PurgeNodeRequest(id=node_id)
        return (await self._call(lambda left_s: self._stub.PurgeNode(request, timeout=left_s))).purged

    async def remove(self, node_id: str) -> None:
        """Forgets a revoked or expired node."""
        request = nodes.RemoveNodeRequest(id=node_id)
        await self._call(lambda left_s: self._stub.RemoveNode(request, timeout=left_s))

    async def _call(self, send: Callable[[float], Awaitable[Answer]]) -> Answer:
        return await self._retry.call(send, timeout_s=self._timeout_s)
