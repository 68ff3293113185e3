"""Nodes over HTTP, for the operator alone: list, show, drain, revoke, purge, remove. Invitations: NodeService."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from fanlight.nodes.v1 import nodes_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.domain.nodes import NodeRecord
from services.gateway.http import docs
from services.gateway.http.bodies import FOR_OPERATORS, refuse_unknown
from services.gateway.http.json_messages import answer
from services.gateway.wire import nodes as wire


class NodeRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["nodes"], dependencies=[Depends(refuse_unknown), FOR_OPERATORS])
        add = router.add_api_route
        one = "/v1/nodes/{node_id}"
        add("/v1/nodes", self.list, methods=["GET"], **docs.LIST_NODES)
        add(f"{one}:drain", self.drain, methods=["POST"], **docs.DRAIN_NODE)
        add(f"{one}:undrain", self.undrain, methods=["POST"], **docs.UNDRAIN_NODE)
        add(f"{one}:revoke", self.revoke, methods=["POST"], **docs.REVOKE_NODE)
        add(f"{one}:purge", self.purge, methods=["POST"], **docs.PURGE_NODE)
        add(one, self.get, methods=["GET"], **docs.GET_NODE)
        add(one, self.remove, methods=["DELETE"], **docs.REMOVE_NODE)
        return router

    async def list(
        self,
        page_size: Annotated[int, Query(ge=0, le=wire.PAGE_SIZE_LIMIT, description=f"0 means {wire.PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        size = page_size or wire.PAGE_SIZE
        page = self._gateway.nodes.page(before=page_token, limit=size)
        return answer(
            nodes_pb2.ListNodesResponse(
                nodes=[self._shown(each) for each in page], next_page_token=page[-1].id if len(page) == size else ""
            )
        )

    async def get(self, node_id: str) -> Response:
        return answer(self._shown(self._gateway.nodes.get(node_id)))

    async def drain(self, node_id: str) -> Response:
        return answer(self._shown(await self._gateway.nodes.drain(node_id, draining=True)))

    async def undrain(self, node_id: str) -> Response:
        return answer(self._shown(await self._gateway.nodes.drain(node_id, draining=False)))

    async def revoke(
        self, node_id: str, reason: Annotated[str, Query(description="For people; at most 128 bytes.")] = ""
    ) -> Response:
        why = wire.comment(reason, field="reason") or "revoked by an operator"
        return answer(self._shown(await self._gateway.revoke_node(node_id, why)))

    async def purge(self, node_id: str) -> Response:
        purged = await self._gateway.purge_node(self._gateway.nodes.get(node_id).id)
        return answer(nodes_pb2.PurgeNodeResponse(purged=purged))

    async def remove(self, node_id: str) -> Response:
        await self._gateway.nodes.remove(node_id)
        return answer(nodes_pb2.RemoveNodeResponse())

    def _shown(self, node: NodeRecord) -> nodes_pb2.Node:
        return wire.node(node, self._gateway.workers_of(node.id), now_s=self._gateway.now_s())
