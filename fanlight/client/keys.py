"""Calls about API keys: for operators, and for a tenant's admins about its own."""

from collections.abc import Awaitable, Callable

import grpc.aio

from fanlight.client.retry import Answer, Retry
from fanlight.keys.v1 import keys_pb2 as keys
from fanlight.keys.v1.keys_pb2_grpc import KeyServiceStub

PAGE_KEYS = 100


class KeyCalls:
    """A part of AsyncClient. CallFailed with PERMISSION_DENIED for a key whose role does not manage keys."""

    def __init__(self, channel: grpc.aio.Channel, retry: Retry, *, timeout_s: float) -> None:
        self._stub = KeyServiceStub(channel)
        self._retry, self._timeout_s = retry, timeout_s

    async def create(
        self,
        *,
        tenant: str = "",
        role: "keys.Key.Role.ValueType" = keys.Key.ROLE_SUBMIT,
        note: str = "",
        ttl_s: float = 0.0,
    ) -> keys.CreateKeyResponse:
        """A key with its secret, which no other call returns. Not retried after a lost response.

        `tenant`: empty for your own; `ttl_s` 0: valid until it is revoked.
        """
        request = keys.CreateKeyRequest(tenant=tenant, role=role, note=note, ttl_s=ttl_s)
        return await self._call(lambda left_s: self._stub.CreateKey(request, timeout=left_s))

    async def list(self, *, tenant: str = "", with_ended: bool = False, limit: int = 50) -> list[keys.Key]:
        """The newest first, as many pages as the limit takes."""
        found: list[keys.Key] = []
        page_token = ""
        while len(found) < limit:
            request = keys.ListKeysRequest(
                tenant=tenant,
                with_ended=with_ended,
                page_size=min(limit - len(found), PAGE_KEYS),
                page_token=page_token,
            )
            page = await self._page(request)
            found += page.keys
            page_token = page.next_page_token
            if not page_token:
                break
        return found

    async def _page(self, request: keys.ListKeysRequest) -> keys.ListKeysResponse:
        return await self._call(lambda left_s: self._stub.ListKeys(request, timeout=left_s))

    async def get(self, key_id: str) -> keys.Key:
        request = keys.GetKeyRequest(id=key_id)
        return await self._call(lambda left_s: self._stub.GetKey(request, timeout=left_s))

    async def rotate(self, key_id: str, *, overlap_s: float | None = None) -> keys.CreateKeyResponse:
        """A key like it; the old one ends after the overlap, 300 seconds where none is given."""
        request = keys.RotateKeyRequest(id=key_id, overlap_s=overlap_s)
        return await self._call(lambda left_s: self._stub.RotateKey(request, timeout=left_s))

    async def revoke(self, key_id: str) -> keys.Key:
        """It and its sessions end at every gateway within seconds."""
        request = keys.RevokeKeyRequest(id=key_id)
        return await self._call(lambda left_s: self._stub.RevokeKey(request, timeout=left_s))

    async def open_session(self, *, jwt: str = "") -> keys.CreateKeyResponse:
        """A key of a few hours, by a token of an issuer that the operator trusts, or by the client's own token."""
        request = keys.OpenSessionRequest(jwt=jwt)
        return await self._call(lambda left_s: self._stub.OpenSession(request, timeout=left_s))

    async def _call(self, send: Callable[[float], Awaitable[Answer]]) -> Answer:
        return await self._retry.call(send, timeout_s=self._timeout_s)
