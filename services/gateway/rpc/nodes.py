"""NodeService over gRPC: translates, calls, translates. Nodes join and renew here; the rest is for operators."""

from collections.abc import Sequence
from dataclasses import dataclass

from fanlight.contract.join_code import JoinCode, parse_join_code
from fanlight.errors import InvalidField, Unauthenticated
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from services.gateway.app.audit_log import act_as_node
from services.gateway.app.gateway import Gateway
from services.gateway.app.nodes import IdentityVerifier, IssuedCredential, VerifiedIdentity
from services.gateway.app.peer_roles import PeerCertificate, Role, certificate_of, require_role
from services.gateway.app.tenants import Callers
from services.gateway.domain.keys import Right
from services.gateway.domain.nodes import Grant, NodeRecord
from services.gateway.ports import Clock
from services.gateway.rpc.jobs import Context, caller_of
from services.gateway.wire import nodes as wire
from services.kernel.grpc_admission import address_of_peer, bearer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinAddress:
    """What a join code tells a node of this gateway."""

    # HOST:PORT for nodes; empty where the operator has not set it.
    gateway: str = ""
    # As in JoinCode.
    authority: str = ""
    is_own: bool = False


class NodeService(nodes_pb2_grpc.NodeServiceServicer):
    def __init__(
        self, gateway: Gateway, callers: Callers, clock: Clock, address: JoinAddress, verifier: IdentityVerifier | None
    ) -> None:
        """`verifier`: of platforms' tokens; None where no issuer is trusted."""
        self._gateway, self._nodes = gateway, gateway.nodes
        self._callers, self._clock = callers, clock
        self._address, self._verifier = address, verifier

    async def Join(self, request: nodes_pb2.JoinRequest, context: Context) -> nodes_pb2.JoinResponse:
        require_role(context.auth_context(), Role.WORKER)
        act_as_node("", address_of_peer(context.peer()))
        name, stages = wire.name(request.name), wire.stages(request.stages)
        proof = request.WhichOneof("proof")
        if proof == "join_code":
            code = parse_join_code(request.join_code)
            issued = await self._nodes.join_with_code(code.invite, code.secret, name=name, stages=stages)
        elif proof == "jwt" and self._verifier is not None:
            identity = await self._verifier.verify(request.jwt)
            issued = await self._nodes.join_verified(identity, name=name, stages=stages)
        elif proof == "jwt":
            raise Unauthenticated("this gateway trusts no issuer of tokens: set FANLIGHT_GATEWAY_ISSUERS_FILE there")
        elif (certificate := certificate_of(context.auth_context())) is not None:
            issued = await self._join_with_certificate(certificate, name, stages)
        else:
            raise InvalidField("must be given; make one with `fanlight nodes invite`", field="join_code")
        return wire.joined(issued)

    async def _join_with_certificate(
        self, certificate: PeerCertificate, name: str, stages: Sequence[str]
    ) -> IssuedCredential:
        identity = VerifiedIdentity(proof="certificate", subject=certificate.subject, grant=Grant())
        return await self._nodes.join_verified(identity, name=name, stages=stages)

    async def RenewCredential(
        self, request: nodes_pb2.RenewCredentialRequest, context: Context
    ) -> nodes_pb2.JoinResponse:
        require_role(context.auth_context(), Role.WORKER)
        act_as_node("", address_of_peer(context.peer()))
        return wire.joined(await self._nodes.renew(bearer_of(context)))

    async def CreateInvite(
        self, request: nodes_pb2.CreateInviteRequest, context: Context
    ) -> nodes_pb2.CreateInviteResponse:
        self._require_operator(context)
        invite, secret = await self._nodes.invite(
            wire.grant(request.grant),
            uses=wire.uses(request),
            ttl_s=wire.ttl_s(request),
            comment=wire.comment(request.comment, field="comment"),
        )
        code = JoinCode(
            invite=invite.id,
            secret=secret,
            authority=self._address.authority,
            is_own=self._address.is_own,
            gateway=self._address.gateway,
        )
        return nodes_pb2.CreateInviteResponse(invite=wire.invite(invite), join_code=str(code))

    async def ListInvites(
        self, request: nodes_pb2.ListInvitesRequest, context: Context
    ) -> nodes_pb2.ListInvitesResponse:
        self._require_operator(context)
        return nodes_pb2.ListInvitesResponse(invites=[wire.invite(each) for each in await self._nodes.invites()])

    async def RemoveInvite(
        self, request: nodes_pb2.RemoveInviteRequest, context: Context
    ) -> nodes_pb2.RemoveInviteResponse:
        self._require_operator(context)
        await self._nodes.remove_invite(request.id)
        return nodes_pb2.RemoveInviteResponse()

    async def ListNodes(self, request: nodes_pb2.ListNodesRequest, context: Context) -> nodes_pb2.ListNodesResponse:
        self._require_operator(context)
        size = wire.page_size(request)
        page = self._nodes.page(before=request.page_token, limit=size)
        return nodes_pb2.ListNodesResponse(
            nodes=[self._node(each) for each in page], next_page_token=page[-1].id if len(page) == size else ""
        )

    async def GetNode(self, request: nodes_pb2.GetNodeRequest, context: Context) -> nodes_pb2.Node:
        self._require_operator(context)
        return self._node(self._nodes.get(request.id))

    async def DrainNode(self, request: nodes_pb2.DrainNodeRequest, context: Context) -> nodes_pb2.Node:
        self._require_operator(context)
        return self._node(await self._nodes.drain(request.id, draining=not request.undo))

    async def RevokeNode(self, request: nodes_pb2.RevokeNodeRequest, context: Context) -> nodes_pb2.Node:
        self._require_operator(context)
        reason = wire.comment(request.reason, field="reason") or "revoked by an operator"
        return self._node(await self._gateway.revoke_node(request.id, reason))

    async def PurgeNode(self, request: nodes_pb2.PurgeNodeRequest, context: Context) -> nodes_pb2.PurgeNodeResponse:
        self._require_operator(context)
        return nodes_pb2.PurgeNodeResponse(purged=await self._gateway.purge_node(self._nodes.get(request.id).id))

    async def RemoveNode(self, request: nodes_pb2.RemoveNodeRequest, context: Context) -> nodes_pb2.RemoveNodeResponse:
        self._require_operator(context)
        await self._nodes.remove(request.id)
        return nodes_pb2.RemoveNodeResponse()

    def _require_operator(self, context: Context) -> None:
        caller_of(self._callers, context, Right.OPERATE)

    def _node(self, node: NodeRecord) -> nodes_pb2.Node:
        return wire.node(node, self._gateway.workers_of(node.id), now_s=self._clock.now_s())
