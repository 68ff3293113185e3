"""The tenants' data keys: made at first use, wrapped by the operator's key, rotated, and destroyed with their tenant.

Several gateways share a vault. What a gateway knows of it is at most FRESH_S old, so that within that time all use a
new key, and none a destroyed one. Knows no cipher and nothing of what is sealed.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from pydantic import TypeAdapter, ValidationError

from fanlight.errors import Conflict, FailedPrecondition, NotFound
from services.gateway.app.leases import RandomBytes
from services.gateway.domain.data_keys import (
    DataKey,
    TenantKeys,
    WrappedKey,
    WrappedKeys,
    added,
    destroyed,
    without_unused,
)
from services.gateway.ports import Clock, KeyVault, KeyWrapper, WrongKey
from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

SECRET_BYTES = 32
FRESH_S = 5.0
# How many tenants' keys are remembered.
REMEMBERED_LIMIT = 10_000
# For so long after a deletion nothing new is sealed for the tenant: what still ran then has ended.
CLOSED_S = 3_600.0
# How long an older key stays even where no data seems to have it: a write may still be on its way.
RETIRED_S = 3_600.0
# No scope can have this name: it says which store the vault belongs to, and shows that the operator's key opens it.
VAULT = "_vault"

ENTRIES: TypeAdapter[WrappedKeys] = TypeAdapter(WrappedKeys)


class KeysUnreadable(FailedPrecondition):
    """The tenant's wrapped keys are damaged, or wrapped by a key that this gateway does not have."""

    reason = "KEYS_UNREADABLE"


class TenantClosed(FailedPrecondition):
    """The tenant was deleted, and with it its data key."""

    reason = "TENANT_DELETED"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFigures:
    """Of one tenant's entry in the vault."""

    tenant: str
    current: int
    older: int
    # The operator's keys that wrapped some of them.
    wrapped_by: frozenset[str]
    is_destroyed: bool
    fault: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    keys: TenantKeys | None
    destroy_s: float
    until_s: float


class DataKeys:
    """By tenant. Changes are compare-and-set in the vault."""

    def __init__(self, vault: KeyVault, wrapper: KeyWrapper, clock: Clock, random_bytes: RandomBytes) -> None:
        self._vault, self._wrapper, self._clock, self._random_bytes = vault, wrapper, clock, random_bytes
        self._known: dict[str, _Known] = {}
        # By tenant, so that a service that does not answer about one tenant's keys holds up no other tenant.
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def place(self) -> str:
        return self._vault.place

    @property
    def wrapped_by(self) -> str:
        return self._wrapper.current

    # At the start.

    async def open(self, wanted: str) -> str:
        """The vault's id. `wanted`: the id that the store names; empty for a store that was never sealed.

        SettingsError where the vault is another one, is gone or damaged, or is not opened by the operator's key.
        """
        found = await self._vault.get(VAULT)
        if found is None and wanted:
            raise SettingsError(
                f"{self.place}: the wrapped data keys of this store are missing; put them back, as without them its"
                " sealed data cannot be read (FANLIGHT_GATEWAY_SEAL_VAULT names another place)"
            )
        if found is None:
            found = await self._vault.change(VAULT, await self._new_vault())
        keys = await self._vault_keys(found)
        identity = hashlib.sha256(keys.newest.secret).hexdigest()[:32]
        if wanted and identity != wanted:
            raise SettingsError(f"{self.place}: its data keys belong to another store than this gateway's")
        return identity

    async def _new_vault(self) -> Callable[[bytes | None], bytes]:
        data = ENTRIES.dump_json(added(None, await self._wrapped(VAULT, 1), tenant=VAULT))
        return lambda before: data if before is None else before

    async def _vault_keys(self, found: bytes) -> TenantKeys:
        try:
            keys = await self._unwrapped(_entry(VAULT, found))
        except KeysUnreadable as error:
            raise SettingsError(f"{self.place}: {error.message}") from error
        if keys is None:
            raise SettingsError(f"{self.place}: its entry {VAULT} has no key; put it back from a backup")
        return keys

    # While the gateway runs.

    async def get(self, tenant: str, *, is_fresh: bool = False) -> TenantKeys | None:
        """For reading; None where there are none, or none any more. KeysUnreadable, Unavailable.

        `is_fresh`: as the vault has them now.
        """
        if is_fresh:
            return (await self._note(tenant, await self._vault.get(tenant))).keys
        return (self._remembered(tenant) or await self._load(tenant)).keys

    def is_destroyed(self, tenant: str) -> bool:
        """As last read from the vault."""
        known = self._known.get(tenant)
        return known is not None and known.keys is None and bool(known.destroy_s)

    async def for_writing(self, tenant: str) -> TenantKeys:
        """Made where the tenant has none yet. TenantClosed, KeysUnreadable, Unavailable."""
        known = self._remembered(tenant) or await self._load(tenant)
        if known.keys is not None:
            return known.keys
        self._require_open(tenant, known.destroy_s)
        return await self._add(tenant, is_first=True)

    def _remembered(self, tenant: str) -> _Known | None:
        known = self._known.get(tenant)
        return known if known is not None and known.until_s > self._clock.monotonic_s() else None

    async def _load(self, tenant: str) -> _Known:
        async with self._loading.setdefault(tenant, asyncio.Lock()):
            known = self._remembered(tenant)
            return known or await self._note(tenant, await self._vault.get(tenant))

    async def _note(self, tenant: str, found: bytes | None) -> _Known:
        entry = _entry(tenant, found) if found is not None else None
        before = self._known.get(tenant)
        if entry is None and before is not None and before.keys is not None:
            # A new key in its place would cost the data that is sealed with it.
            raise KeysUnreadable(f"the wrapped keys of {tenant} have vanished from {self.place}; put them back")
        keys = await self._unwrapped(entry, before.keys if before else None) if entry else None
        known = _Known(keys, entry.destroy_s if entry else 0.0, self._clock.monotonic_s() + FRESH_S)
        if len(self._known) >= REMEMBERED_LIMIT:
            self._known.pop(next(iter(self._known)))
        self._known[tenant] = known
        return known

    def _require_open(self, tenant: str, destroy_s: float) -> None:
        if destroy_s and self._clock.now_s() < destroy_s + CLOSED_S:
            raise TenantClosed(f"the tenant {tenant} was deleted; nothing is stored for it within an hour of that")

    async def _unwrapped(self, entry: WrappedKeys, before: TenantKeys | None = None) -> TenantKeys | None:
        """Those that are known already need no unwrapping."""
        known: Mapping[int, DataKey] = before.by_number if before else {}
        by_number = {
            each.number: known.get(each.number) or await self._unwrap(entry.tenant, each) for each in entry.keys
        }
        return (
            TenantKeys(tenant=entry.tenant, current=entry.keys[-1].number, by_number=by_number) if by_number else None
        )

    async def _unwrap(self, tenant: str, key: WrappedKey) -> DataKey:
        try:
            secret = await self._wrapper.unwrap(key.wrapped_by, key.wrapped, _context(tenant, key.number))
        except WrongKey as error:
            raise KeysUnreadable(f"the data key {key.number} of {tenant} cannot be opened: {error}") from error
        return DataKey(number=key.number, secret=secret)

    async def _wrapped(self, tenant: str, number: int, secret: bytes | None = None) -> WrappedKey:
        data = await self._wrapper.wrap(secret or self._random_bytes(SECRET_BYTES), _context(tenant, number))
        return WrappedKey(number=number, wrapped_by=self._wrapper.current, wrapped=data, create_s=self._clock.now_s())

    async def _add(self, tenant: str, *, is_first: bool) -> TenantKeys:
        """`is_first`: not where another gateway has added one meanwhile."""
        while True:
            found = await self._vault.get(tenant)
            entry = _entry(tenant, found) if found is not None else None
            if not (is_first and entry is not None and entry.keys):
                self._require_open(tenant, entry.destroy_s if entry else 0.0)
                key = await self._wrapped(tenant, (entry.made if entry else 0) + 1)
                try:
                    found = await self._replace(tenant, found, added(entry, key, tenant=tenant))
                except Conflict:
                    # Another gateway was first.
                    continue
                log.info("data_key_created", tenant=tenant, number=key.number)
            assert found is not None
            known = await self._note(tenant, found)
            assert known.keys is not None
            return known.keys

    async def _replace(self, tenant: str, found: bytes | None, after: WrappedKeys) -> bytes:
        """Conflict where the entry is no longer what was found."""
        data = ENTRIES.dump_json(after)

        def event(before: bytes | None) -> bytes:
            if before != found:
                raise Conflict(f"the wrapped keys of {tenant} have changed")
            return data

        return await self._vault.change(tenant, event)

    # Rotation and deletion.

    async def rotate(self, tenant: str) -> TenantKeys:
        """A new key for new data. NotFound where the tenant has none; KeysUnreadable."""
        if await self.get(tenant) is None:
            raise NotFound("the tenant has no data key", field="name")
        return await self._add(tenant, is_first=False)

    async def destroy(self, tenant: str) -> bool:
        """Whether there was a key. Also where the keys cannot be read."""

        def event(before: bytes | None) -> bytes:
            try:
                entry = _entry(tenant, before) if before is not None else None
            except KeysUnreadable:
                entry = None
            return ENTRIES.dump_json(destroyed(entry, tenant=tenant, now_s=self._clock.now_s()))

        was = await self._vault.get(tenant)
        await self._note(tenant, await self._vault.change(tenant, event))
        log.warning("data_key_destroyed", tenant=tenant)
        return was is not None and b'"wrapped"' in was

    async def rewrap(self) -> int:
        """Wrap with the operator's current key what an older one has wrapped; how many entries that were.

        Killed in the middle, it goes on at the next call: an entry names the key that wrapped it.
        """
        try:
            await self._wrapper.refresh()
        except SettingsError as error:
            log.error("operator_key_unreadable", why=str(error))
            return 0
        return sum([await self._rewrap(name) for name in await self._vault.names()])

    async def _rewrap(self, name: str) -> bool:
        found = await self._vault.get(name)
        try:
            entry = _entry(name, found) if found is not None else None
            if entry is None or all(each.wrapped_by == self._wrapper.current for each in entry.keys):
                return False
            keys = tuple([await self._wrapped_again(name, each) for each in entry.keys])
        except KeysUnreadable as error:
            log.error("data_keys_unreadable", tenant=name, why=error.message)
            return False
        with contextlib.suppress(Conflict):
            await self._replace(name, found, replace(entry, keys=keys))
            return True
        return False

    async def _wrapped_again(self, name: str, key: WrappedKey) -> WrappedKey:
        if key.wrapped_by == self._wrapper.current:
            return key
        data_key = await self._unwrap(name, key)
        again = await self._wrapped(name, key.number, data_key.secret)
        return replace(again, create_s=key.create_s, retire_s=key.retire_s)

    async def drop_unused(self, tenant: str, used: frozenset[int]) -> int:
        """Destroy older keys that no data has; how many. `used`: numbers that data was found to have."""
        found = await self._vault.get(tenant)
        if found is None:
            return 0
        before = _entry(tenant, found)
        after = without_unused(before, used=used, retired_before_s=self._clock.now_s() - RETIRED_S)
        if after is before:
            return 0
        try:
            await self._note(tenant, await self._replace(tenant, found, after))
        except Conflict:
            return 0
        log.info("older_data_keys_destroyed", tenant=tenant, count=len(before.keys) - len(after.keys))
        return len(before.keys) - len(after.keys)

    async def figures(self, *, is_opened: bool = True) -> list[KeyFigures]:
        """Of every tenant, by name. `is_opened`: also whether the keys can be opened, which services charge for."""
        names = [name for name in sorted(await self._vault.names()) if name != VAULT]
        return [await self._figures_of(name, is_opened=is_opened) for name in names]

    async def _figures_of(self, name: str, *, is_opened: bool) -> KeyFigures:
        found = await self._vault.get(name)
        fault = ""
        try:
            entry = _entry(name, found) if found is not None else None
            if entry is not None and is_opened:
                await self._unwrapped(entry)
        except KeysUnreadable as error:
            entry, fault = None, error.message
        keys = entry.keys if entry else ()
        return KeyFigures(
            tenant=name,
            current=keys[-1].number if keys else 0,
            older=max(0, len(keys) - 1),
            wrapped_by=frozenset(each.wrapped_by for each in keys),
            is_destroyed=entry is not None and not keys,
            fault=fault,
        )


def _entry(name: str, found: bytes) -> WrappedKeys:
    """KeysUnreadable where it is damaged, or another tenant's."""
    try:
        entry = ENTRIES.validate_json(found)
    except ValidationError as error:
        raise KeysUnreadable(f"the wrapped keys of {name} are damaged; put them back from a backup") from error
    if entry.tenant != name or entry.format != 1 or (not entry.keys and not entry.destroy_s):
        raise KeysUnreadable(f"the wrapped keys of {name} are another tenant's or another version's")
    return entry


def _context(tenant: str, number: int) -> bytes:
    return f"fanlight data key\0{tenant}\0{number}".encode()
