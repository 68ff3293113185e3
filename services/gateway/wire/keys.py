"""KeyService's messages: protobuf to domain and back."""

from collections.abc import Mapping, Sequence

from fanlight.contract.limits import check_bytes, check_number, check_whole
from fanlight.contract.names import parse_scope
from fanlight.errors import InvalidField
from fanlight.keys.v1 import keys_pb2
from services.gateway.app.keys import CreatedKey
from services.gateway.domain.keys import Key, KeyRole, state_of
from services.gateway.wire.answers import moment

NOTE_LIMIT_BYTES = 128
TTL_MIN_S, TTL_MAX_S = 1.0, 10 * 365 * 86_400.0
OVERLAP_S, OVERLAP_MAX_S = 300.0, 7 * 86_400.0
PAGE_SIZE, PAGE_SIZE_LIMIT = 50, 100
_ROLES: Mapping[int, KeyRole] = {keys_pb2.Key.Role.Value(f"ROLE_{each.upper()}"): each for each in KeyRole}


def tenant(text: str) -> str:
    """Empty: the caller's own."""
    return parse_scope(text, field="tenant") if text else ""


def role(value: int) -> KeyRole:
    if value == keys_pb2.Key.ROLE_UNSPECIFIED:
        return KeyRole.SUBMIT
    if value not in _ROLES:
        raise InvalidField(f"must be one of {', '.join(KeyRole)}", field="role")
    return _ROLES[value]


def note(text: str) -> str:
    check_bytes(text, NOTE_LIMIT_BYTES, field="note")
    return "".join(each if each.isprintable() else " " for each in text)


def ttl_s(value: float) -> float:
    return check_number(value, TTL_MIN_S, TTL_MAX_S, field="ttl_s") if value else 0.0


def overlap_s(request: keys_pb2.RotateKeyRequest) -> float:
    if not request.HasField("overlap_s"):
        return OVERLAP_S
    return check_number(request.overlap_s, 0.0, OVERLAP_MAX_S, field="overlap_s")


def page_size(request: keys_pb2.ListKeysRequest) -> int:
    return check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size") or PAGE_SIZE


def page(found: Sequence[Key], size: int, *, now_s: float) -> keys_pb2.ListKeysResponse:
    return keys_pb2.ListKeysResponse(
        keys=[key(each, now_s=now_s) for each in found],
        next_page_token=found[-1].id if len(found) == size else "",
    )


def created(value: CreatedKey, *, now_s: float) -> keys_pb2.CreateKeyResponse:
    return keys_pb2.CreateKeyResponse(key=key(value.key, now_s=now_s), secret=value.secret)


def key(value: Key, *, now_s: float) -> keys_pb2.Key:
    message = keys_pb2.Key(
        id=value.id,
        tenant=value.tenant,
        role=keys_pb2.Key.Role.Value(f"ROLE_{value.role.upper()}"),
        state=keys_pb2.Key.State.Value(f"STATE_{state_of(value, now_s).upper()}"),
        note=value.note,
        create_time=moment(value.create_s),
        parent=value.parent,
        subject=value.subject,
        is_session=value.is_session,
    )
    for name, at_s in (("expire_time", value.expire_s), ("use_time", value.use_s), ("revoke_time", value.revoke_s)):
        if at_s:
            getattr(message, name).CopyFrom(moment(at_s))
    return message
