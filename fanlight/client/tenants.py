"""The operator's calls about tenants, and everybody's about their quota."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc.aio

from fanlight.client.retry import Answer, Retry
from fanlight.tenants.v1 import tenants_pb2 as tenants
from fanlight.tenants.v1.tenants_pb2_grpc import TenantServiceStub

PAGE_TENANTS = 100


class TenantCalls:
    """A part of AsyncClient. All but `quota` need an operator: CallFailed with PERMISSION_DENIED otherwise."""

    def __init__(self, channel: grpc.aio.Channel, retry: Retry, *, timeout_s: float) -> None:
        self._stub = TenantServiceStub(channel)
        self._retry, self._timeout_s = retry, timeout_s

    async def set(
        self,
        name: str,
        *,
        limits: Mapping[str, float] | None = None,
        clear_limits: Sequence[str] = (),
        weight: float | None = None,
        service_class: int | None = None,
        pool: str | None = None,
        note: str | None = None,
        policy: str | None = None,
        policy_pool: str | None = None,
    ) -> tenants.Tenant:
        """What is None stays as it was. `limits`: by the names of `TenantLimits`' fields."""
        request = tenants.SetTenantRequest(
            name=name,
            limits=tenants.TenantLimits(**dict(limits or {})),  # type: ignore[arg-type]  # whole numbers where they must be
            clear_limits=clear_limits,
            weight=weight,
            service_class=service_class,
            pool=pool,
            note=note,
            policy=policy,
            policy_pool=policy_pool,
        )
        return await self._call(lambda left_s: self._stub.SetTenant(request, timeout=left_s))

    async def list(self, *, limit: int = 50) -> list[tenants.Tenant]:
        """By name, as many pages as the limit takes."""
        found: list[tenants.Tenant] = []
        page_token = ""
        while len(found) < limit:
            request = tenants.ListTenantsRequest(page_size=min(limit - len(found), PAGE_TENANTS), page_token=page_token)
            page = await self._page(request)
            found += page.tenants
            page_token = page.next_page_token
            if not page_token:
                break
        return found

    async def _page(self, request: tenants.ListTenantsRequest) -> tenants.ListTenantsResponse:
        return await self._call(lambda left_s: self._stub.ListTenants(request, timeout=left_s))

    async def get(self, name: str) -> tenants.Tenant:
        request = tenants.GetTenantRequest(name=name)
        return await self._call(lambda left_s: self._stub.GetTenant(request, timeout=left_s))

    async def quota(self, tenant: str = "") -> tenants.Quota:
        """Each limit and how much of it is used; empty: your own."""
        request = tenants.GetQuotaRequest(tenant=tenant)
        return await self._call(lambda left_s: self._stub.GetQuota(request, timeout=left_s))

    async def delete(self, name: str) -> tenants.DeleteTenantResponse:
        """With all its data; its data key is destroyed."""
        request = tenants.DeleteTenantRequest(name=name)
        return await self._call(lambda left_s: self._stub.DeleteTenant(request, timeout=left_s))

    async def rotate_data_key(self, name: str) -> int:
        """The new key's number."""
        request = tenants.RotateDataKeyRequest(name=name)
        return (await self._call(lambda left_s: self._stub.RotateDataKey(request, timeout=left_s))).number

    async def sealing(self) -> tenants.Sealing:
        """The tenants' data keys, and how much is still in clear."""
        request = tenants.GetSealingRequest()
        return await self._call(lambda left_s: self._stub.GetSealing(request, timeout=left_s))

    async def _call(self, send: Callable[[float], Awaitable[Answer]]) -> Answer:
        return await self._retry.call(send, timeout_s=self._timeout_s)
