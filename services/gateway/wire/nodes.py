"""NodeService's messages: protobuf to domain and back."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fanlight.contract.limits import check_bytes, check_count, check_number, check_whole
from fanlight.errors import InvalidField
from fanlight.nodes.v1 import nodes_pb2
from services.gateway.app.lease_rights import WorkerPrincipal
from services.gateway.app.leasing import Poll
from services.gateway.app.nodes import IssuedCredential
from services.gateway.domain.nodes import DEFAULT_POOL, GRANTED, Grant, Invite, NodeRecord, offers_of, state_of
from services.gateway.wire.answers import moment

NAME_LIMIT_BYTES = 64
LABELS_LIMIT = 16
LABEL_VALUE_LIMIT_BYTES = 63
STAGES_LIMIT = 16
COMMENT_LIMIT_BYTES = 128
USES_LIMIT = 10_000
INVITE_TTL_S, INVITE_TTL_MIN_S, INVITE_TTL_MAX_S = 3_600.0, 1.0, 30 * 86_400.0
PAGE_SIZE, PAGE_SIZE_LIMIT = 50, 100

_LABEL = re.compile(r"[a-z0-9._/-]{1,63}")
_POOL = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_STAGE = re.compile(r"[a-z0-9_-]{1,32}")


def name(text: str) -> str:
    """As the node calls itself, printable; `node` for an empty one."""
    check_bytes(text, NAME_LIMIT_BYTES, field="name")
    return "".join(each if each.isprintable() else "?" for each in text) or "node"


def stages(values: Sequence[str], *, field: str = "stages") -> tuple[str, ...]:
    check_count(len(values), STAGES_LIMIT, field=field)
    for index, stage in enumerate(values):
        if not _STAGE.fullmatch(stage):
            raise InvalidField("must be 1 to 32 of a-z, 0-9, _ and -, such as diffusion", field=f"{field}[{index}]")
    return tuple(dict.fromkeys(values))


def grant(message: nodes_pb2.Grant) -> Grant:
    pool = message.pool or DEFAULT_POOL
    if not _POOL.fullmatch(pool):
        raise InvalidField("must be 1 to 63 of a-z, 0-9 and -, not starting with -", field="grant.pool")
    return Grant(pool=pool, labels=labels(message.labels), stages=stages(message.stages, field="grant.stages"))


def labels(values: Sequence[nodes_pb2.Label], *, field: str = "grant.labels") -> tuple[tuple[str, str], ...]:
    """Sorted by name. InvalidField for malformed ones and names that come twice."""
    check_count(len(values), LABELS_LIMIT, field=field)
    found: dict[str, str] = {}
    for index, label in enumerate(values):
        at = f"{field}[{index}]"
        if not _LABEL.fullmatch(label.name):
            raise InvalidField("must be 1 to 63 of a-z, 0-9, `.`, `_`, `-` and `/`", field=f"{at}.name")
        if label.name in found:
            raise InvalidField("comes twice", field=f"{at}.name")
        check_bytes(label.value, LABEL_VALUE_LIMIT_BYTES, field=f"{at}.value")
        if not label.value.isprintable():
            raise InvalidField("must be printable", field=f"{at}.value")
        found[label.name] = label.value
    return tuple(sorted(found.items()))


def uses(request: nodes_pb2.CreateInviteRequest) -> int:
    return check_whole(request.uses, 0, USES_LIMIT, field="uses") or 1


def ttl_s(request: nodes_pb2.CreateInviteRequest) -> float:
    if request.ttl_s == 0:
        return INVITE_TTL_S
    return check_number(request.ttl_s, INVITE_TTL_MIN_S, INVITE_TTL_MAX_S, field="ttl_s")


def comment(text: str, *, field: str) -> str:
    check_bytes(text, COMMENT_LIMIT_BYTES, field=field)
    return "".join(each if each.isprintable() else " " for each in text)


def page_size(request: nodes_pb2.ListNodesRequest) -> int:
    return check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size") or PAGE_SIZE


def joined(issued: IssuedCredential) -> nodes_pb2.JoinResponse:
    return nodes_pb2.JoinResponse(
        node_id=issued.node.id, credential=issued.credential, ttl_s=issued.ttl_s, stages=issued.node.grant.stages
    )


def invite(value: Invite) -> nodes_pb2.Invite:
    return nodes_pb2.Invite(
        id=value.id,
        grant=_grant(value.grant),
        uses=value.uses,
        used=value.used,
        expire_time=moment(value.expire_s),
        comment=value.comment,
    )


def node(value: NodeRecord, workers: Iterable[str], *, now_s: float) -> nodes_pb2.Node:
    """`workers`: ids of its workers that polled recently."""
    return nodes_pb2.Node(
        id=value.id,
        name=value.name,
        state=nodes_pb2.Node.State.Value(f"STATE_{state_of(value, now_s).upper()}"),
        grant=_grant(value.grant),
        proof=value.proof,
        subject=value.subject,
        join_time=moment(value.join_s),
        renew_time=moment(value.renew_s),
        expire_time=moment(value.expire_s),
        workers=workers,
        reason=value.reason,
        checked_results=value.checked_results,
        false_results=value.false_results,
    )


def _grant(value: Grant) -> nodes_pb2.Grant:
    return nodes_pb2.Grant(
        pool=value.pool,
        labels=[nodes_pb2.Label(name=name, value=text) for name, text in value.labels],
        stages=value.stages,
    )


def poll_of(principal: WorkerPrincipal, poll: Poll) -> Poll:
    """The poll as the gateway believes it: the node is the one that the credential proves, and so are its offers.

    Pool and labels are offers that no worker can announce by itself.
    """
    worker = poll.worker
    if principal.node_id:
        worker = replace(worker, node=principal.node_id, draining=worker.draining or principal.draining)
    granted = offers_of(principal.grant)
    capabilities = poll.capabilities
    if capabilities is not None:
        own = (each for each in capabilities.other_offers if not each.startswith(GRANTED))
        capabilities = replace(capabilities, other_offers=tuple(sorted({*own, *granted})))
    # Another grant makes other capabilities, which the gateway asks for then.
    digest = hashlib.sha256("\n".join([poll.capabilities_digest, *granted]).encode()).hexdigest()
    return replace(poll, worker=worker, capabilities=capabilities, capabilities_digest=digest)
