"""The operator's calls about the audit log: list, follow and verify it."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import grpc.aio

from fanlight.audit_log.v1 import audit_log_pb2 as audit_log
from fanlight.audit_log.v1.audit_log_pb2_grpc import AuditLogServiceStub
from fanlight.client.retry import Answer, Retry, to_error
from fanlight.contract.audit_log import Actor, AuditChain, AuditEntry, ChainHead, EntryKind, Verification, verify

PAGE_ENTRIES = 1_000


class AuditLogCalls:
    """A part of AsyncClient. CallFailed with PERMISSION_DENIED for everybody but an operator."""

    def __init__(self, channel: grpc.aio.Channel, retry: Retry, *, timeout_s: float) -> None:
        self._stub = AuditLogServiceStub(channel)
        self._retry, self._timeout_s = retry, timeout_s

    async def list(self, *, limit: int = 50) -> list[AuditEntry]:
        """The newest first, as many pages as the limit takes."""
        found: list[AuditEntry] = []
        page_token = ""
        while len(found) < limit:
            request = audit_log.ListAuditEntriesRequest(
                page_size=min(limit - len(found), PAGE_ENTRIES), page_token=page_token
            )
            page = await self._page(request)
            found += map(_entry, page.entries)
            page_token = page.next_page_token
            if not page_token:
                break
        return found

    async def _page(self, request: audit_log.ListAuditEntriesRequest) -> audit_log.ListAuditEntriesResponse:
        return await self._call(lambda left_s: self._stub.ListAuditEntries(request, timeout=left_s))

    async def chains(self) -> Sequence[AuditChain]:
        request = audit_log.ListAuditChainsRequest()
        answer = await self._call(lambda left_s: self._stub.ListAuditChains(request, timeout=left_s))
        return [
            AuditChain(
                head=_head(each.head),
                first_number=each.first_number,
                first_previous_hash=each.first_previous_hash,
            )
            for each in answer.chains
        ]

    async def verify(self, known: Sequence[ChainHead] = ()) -> Verification:
        """Of all kept entries. `known`: heads of an earlier verification."""
        result = await self._verified(known)
        # Entries that were deleted by age between the calls seem to be missing the first time.
        return await self._verified(known) if result.faults else result

    async def _verified(self, known: Sequence[ChainHead]) -> Verification:
        chains = await self.chains()
        return verify(await self.list(limit=10_000_000), chains, known)

    async def follow(self) -> AsyncGenerator[AuditEntry, None]:
        """Entries from now on, as they are written. CallFailed where the stream breaks: list what was missed."""
        call = self._stub.FollowAuditLog(audit_log.FollowAuditLogRequest())
        try:
            async for entry in call:
                yield _entry(entry)
        except grpc.RpcError as error:
            raise to_error(error) from error
        finally:
            call.cancel()

    async def _call(self, send: Callable[[float], Awaitable[Answer]]) -> Answer:
        return await self._retry.call(send, timeout_s=self._timeout_s)


def _entry(value: audit_log.AuditEntry) -> AuditEntry:
    kind = audit_log.AuditEntry.Kind.Name(value.kind).removeprefix("KIND_").lower()
    actor = value.actor
    return AuditEntry(
        chain=value.chain,
        number=value.number,
        time_us=value.time.ToMicroseconds(),
        kind=EntryKind(kind),
        actor=Actor(tenant=actor.tenant, role=actor.role, key_id=actor.key_id, address=actor.address),
        action=value.action,
        target=value.target,
        target_tenant=value.target_tenant,
        result=value.result,
        detail=value.detail,
        intent=value.intent,
        links=tuple(map(_head, value.links)),
        previous_hash=value.previous_hash,
        hash=value.hash,
    )


def _head(value: audit_log.ChainHead) -> ChainHead:
    return ChainHead(chain=value.chain, number=value.number, hash=value.hash)
