"""AuditLogService over gRPC: the log of changes and of reads across tenants, for the operator."""

from collections.abc import AsyncIterator

from fanlight.audit_log.v1 import audit_log_pb2, audit_log_pb2_grpc
from services.gateway.app.gateway import Gateway
from services.gateway.app.tenants import Callers
from services.gateway.domain.keys import Right
from services.gateway.rpc.jobs import Context, caller_of
from services.gateway.wire import audit_log as wire


class AuditLogService(audit_log_pb2_grpc.AuditLogServiceServicer):
    def __init__(self, gateway: Gateway, callers: Callers) -> None:
        self._log, self._callers = gateway.audit, callers

    async def ListAuditEntries(
        self, request: audit_log_pb2.ListAuditEntriesRequest, context: Context
    ) -> audit_log_pb2.ListAuditEntriesResponse:
        caller_of(self._callers, context, Right.OPERATE)
        return wire.page(*await self._log.page(before=request.page_token, limit=wire.page_size(request)))

    async def ListAuditChains(
        self, request: audit_log_pb2.ListAuditChainsRequest, context: Context
    ) -> audit_log_pb2.ListAuditChainsResponse:
        caller_of(self._callers, context, Right.OPERATE)
        return wire.chains(await self._log.chains())

    async def FollowAuditLog(
        self, request: audit_log_pb2.FollowAuditLogRequest, context: Context
    ) -> AsyncIterator[audit_log_pb2.AuditEntry]:
        caller_of(self._callers, context, Right.OPERATE)
        with self._log.followed() as entries:
            # The caller knows by it that from now on it misses nothing.
            await context.send_initial_metadata(())
            async for entry in entries:
                # Perhaps revoked meanwhile.
                caller_of(self._callers, context, Right.OPERATE)
                yield wire.entry(entry)
