"""AuditLogService's messages: from the log's entries."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from fanlight.audit_log.v1 import audit_log_pb2
from fanlight.contract.audit_log import AuditChain, AuditEntry, ChainHead
from fanlight.contract.limits import check_whole

PAGE_SIZE, PAGE_SIZE_LIMIT = 100, 1_000


def page_size(request: audit_log_pb2.ListAuditEntriesRequest) -> int:
    return check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size") or PAGE_SIZE


def page(entries: Sequence[AuditEntry], next_token: str) -> audit_log_pb2.ListAuditEntriesResponse:
    return audit_log_pb2.ListAuditEntriesResponse(entries=[entry(each) for each in entries], next_page_token=next_token)


def entry(value: AuditEntry) -> audit_log_pb2.AuditEntry:
    time = Timestamp()
    time.FromMicroseconds(value.time_us)
    return audit_log_pb2.AuditEntry(
        chain=value.chain,
        number=value.number,
        time=time,
        kind=audit_log_pb2.AuditEntry.Kind.Value(f"KIND_{value.kind.name}"),
        actor=audit_log_pb2.Actor(
            tenant=value.actor.tenant,
            role=value.actor.role,
            key_id=value.actor.key_id,
            address=value.actor.address,
        ),
        action=value.action,
        target=value.target,
        target_tenant=value.target_tenant,
        result=value.result,
        detail=value.detail,
        intent=value.intent,
        links=[_head(each) for each in value.links],
        previous_hash=value.previous_hash,
        hash=value.hash,
    )


def chains(found: Sequence[AuditChain]) -> audit_log_pb2.ListAuditChainsResponse:
    return audit_log_pb2.ListAuditChainsResponse(
        chains=[
            audit_log_pb2.AuditChain(
                head=_head(each.head),
                first_number=each.first_number,
                first_previous_hash=each.first_previous_hash,
            )
            for each in found
        ]
    )


def _head(value: ChainHead) -> audit_log_pb2.ChainHead:
    return audit_log_pb2.ChainHead(chain=value.chain, number=value.number, hash=value.hash)
