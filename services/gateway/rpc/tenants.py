"""TenantService over gRPC: translates, calls, translates."""

from fanlight.tenants.v1 import tenants_pb2, tenants_pb2_grpc
from services.gateway.app.gateway import Gateway
from services.gateway.app.tenants import Callers
from services.gateway.domain.keys import Right
from services.gateway.rpc.jobs import Context, caller_of
from services.gateway.wire import tenants as wire


class TenantService(tenants_pb2_grpc.TenantServiceServicer):
    def __init__(self, gateway: Gateway, callers: Callers) -> None:
        self._gateway, self._quotas, self._callers = gateway, gateway.quotas, callers

    async def SetTenant(self, request: tenants_pb2.SetTenantRequest, context: Context) -> tenants_pb2.Tenant:
        caller_of(self._callers, context, Right.OPERATE)
        name = wire.name(request.name, field="name")
        return wire.tenant(await self._quotas.change(name, wire.change(request)))

    async def ListTenants(
        self, request: tenants_pb2.ListTenantsRequest, context: Context
    ) -> tenants_pb2.ListTenantsResponse:
        caller_of(self._callers, context, Right.OPERATE)
        size = wire.page_size(request)
        return wire.page(self._quotas.page(after=request.page_token, limit=size), size)

    async def GetTenant(self, request: tenants_pb2.GetTenantRequest, context: Context) -> tenants_pb2.Tenant:
        caller_of(self._callers, context, Right.OPERATE)
        return wire.tenant(self._quotas.get(wire.name(request.name, field="name")))

    async def GetQuota(self, request: tenants_pb2.GetQuotaRequest, context: Context) -> tenants_pb2.Quota:
        caller = caller_of(self._callers, context, Right.QUEUE)
        name = wire.quota_of(caller, request.tenant)
        return wire.quota(name, self._quotas.uses(name))

    async def DeleteTenant(
        self, request: tenants_pb2.DeleteTenantRequest, context: Context
    ) -> tenants_pb2.DeleteTenantResponse:
        caller = caller_of(self._callers, context, Right.OPERATE)
        name = wire.name(request.name, field="name")
        return wire.deleted(await self._gateway.tenant_deletions.delete(name, caller))

    async def RotateDataKey(
        self, request: tenants_pb2.RotateDataKeyRequest, context: Context
    ) -> tenants_pb2.RotateDataKeyResponse:
        caller_of(self._callers, context, Right.OPERATE)
        name = wire.name(request.name, field="name")
        return tenants_pb2.RotateDataKeyResponse(tenant=name, number=await self._gateway.rotate_data_key(name))

    async def GetSealing(self, request: tenants_pb2.GetSealingRequest, context: Context) -> tenants_pb2.Sealing:
        caller_of(self._callers, context, Right.OPERATE)
        return wire.sealing(await self._gateway.sealing.report())
