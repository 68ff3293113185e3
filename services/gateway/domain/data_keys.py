"""The data keys of a tenant, and how they change: made, rotated, wrapped again, destroyed. Knows no clock or cipher."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.gateway.domain.job import BYTES_AS_BASE64


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKey:
    """A key as it is used. Numbers of a tenant's keys never repeat."""

    number: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKeys:
    """New data is sealed with the current key; the others read older data."""

    tenant: str
    current: int
    by_number: Mapping[int, DataKey] = field(repr=False)

    @property
    def newest(self) -> DataKey:
        return self.by_number[self.current]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A data key as it is stored."""

    __pydantic_config__ = BYTES_AS_BASE64

    number: int
    # Which of the operator's keys opens it.
    wrapped_by: str
    wrapped: bytes = field(repr=False)
    create_s: float
    # When a newer one took its place; 0 for the current one.
    retire_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKeys:
    """All of a tenant's, the oldest first. Without keys: they were destroyed."""

    tenant: str
    keys: tuple[WrappedKey, ...]
    # Counts all that there ever were.
    made: int
    destroy_s: float = 0.0
    format: int = 1


def added(before: WrappedKeys | None, key: WrappedKey, *, tenant: str) -> WrappedKeys:
    """The key is the current one from now on."""
    if before is None:
        return WrappedKeys(tenant=tenant, keys=(key,), made=key.number)
    older = tuple(replace(each, retire_s=each.retire_s or key.create_s) for each in before.keys)
    return replace(before, keys=(*older, key), made=key.number, destroy_s=0.0)


def destroyed(before: WrappedKeys | None, *, tenant: str, now_s: float) -> WrappedKeys:
    made = before.made if before else 0
    return WrappedKeys(tenant=tenant, keys=(), made=made, destroy_s=now_s)


def without_unused(before: WrappedKeys, *, used: frozenset[int], retired_before_s: float) -> WrappedKeys:
    """Older keys that no data has any more go, once no gateway can still write with them."""
    kept = tuple(
        each for each in before.keys if not each.retire_s or each.number in used or each.retire_s >= retired_before_s
    )
    return before if len(kept) == len(before.keys) else replace(before, keys=kept)
