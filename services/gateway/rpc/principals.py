"""Whose gRPC call it is: a client's, a node's, or that of a worker on this machine. By its token, and its address."""

import hmac
from dataclasses import dataclass

from fanlight.errors import PermissionDenied, Unauthenticated
from services.gateway.app.audit_log import act_as
from services.gateway.app.lease_rights import LOCAL, WorkerPrincipal
from services.gateway.app.nodes import Nodes
from services.gateway.app.peer_roles import Role, require_role
from services.gateway.app.quotas import Quotas
from services.gateway.app.tenants import Caller, Callers
from services.kernel.grpc_admission import Context, address_of_peer, bearer_of
from services.kernel.grpc_server import is_loopback_ip


@dataclass(frozen=True, slots=True)
class Principals:
    callers: Callers
    # The shared token of this machine's workers; empty where none is set.
    worker_token: str
    nodes: Nodes

    def worker(self, context: Context) -> WorkerPrincipal:
        """Unauthenticated for anybody else, and for the shared token from another machine.

        PermissionDenied for a certificate that is not a worker's.
        """
        require_role(context.auth_context(), Role.WORKER)
        found = self.worker_or_none(context)
        if found is None:
            raise Unauthenticated("send a node's credential as `authorization: bearer TOKEN`")
        return found

    def worker_or_none(self, context: Context) -> WorkerPrincipal | None:
        token = bearer_of(context)
        node = self.nodes.of_credential(token)
        if node is not None:
            return WorkerPrincipal(node_id=node.id, grant=node.grant, draining=node.draining)
        if self.worker_token and hmac.compare_digest(self.worker_token.encode(), token.encode()):
            if not is_loopback_ip(address_of_peer(context.peer())):
                raise Unauthenticated(
                    "the shared worker token works on the gateway's own machine only; let this node join with a code"
                    " from `fanlight nodes invite`"
                )
            return LOCAL
        return LOCAL if not self.callers.tokens and not self.worker_token else None

    def client(self, context: Context) -> Caller | None:
        """None for a worker's call. Unauthenticated for anybody unknown."""
        token = bearer_of(context)
        if self.callers.tokens and (caller := self.callers.of_token(token)) is not None:
            require_role(context.auth_context(), Role.CLIENT, Role.OPERATOR)
            act_as(caller, address_of_peer(context.peer()))
            return caller
        if self.worker_or_none(context) is not None and (self.worker_token or self.nodes.of_credential(token)):
            return None
        caller = self.callers.of_token(token)
        if caller is None:
            raise Unauthenticated("send the right token as `authorization: bearer TOKEN`")
        return caller


class RateAdmission:
    """Counts calls of clients against their tenant's rate; those of nodes have limits of their own."""

    def __init__(self, quotas: Quotas, callers: Callers) -> None:
        self._quotas, self._callers = quotas, callers

    async def __call__(self, service: str, token: str) -> None:
        """ResourceExhausted where the caller's tenant has sent too many of late."""
        caller = self._callers.of_token(token)
        if caller is not None:
            await self._quotas.take_request(caller)


def require_own(principal: WorkerPrincipal, worker_id: str, stage: str, *, field: str) -> None:
    """PermissionDenied for a worker id that does not derive from the node's, and for a stage that it may not serve."""
    if principal.node_id and not worker_id.startswith(f"{principal.node_id}-"):
        raise PermissionDenied(f"must begin with {principal.node_id}-, the node's own id", field=field)
    if stage and not principal.grant.allows(stage):
        allowed = ", ".join(principal.grant.stages)
        raise PermissionDenied(f"this node may serve {allowed}, not {stage}", field="worker.stage")
