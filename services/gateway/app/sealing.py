"""Data at rest is sealed: what must hold at the start, what is still in clear, and which data keys are still needed.

A store that was sealed once names its vault in a record, so that no gateway without the keys writes to it in clear.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fanlight.errors import AlreadyExists, FailedPrecondition
from services.gateway.app.contents import CONTENT_BUCKETS, contents
from services.gateway.app.data_keys import DataKeys, KeyFigures
from services.gateway.app.records import Codec, UnreadableRecord
from services.gateway.ports import BlobSeals, RecordStore, SealCounter
from services.kernel.blobs import BlobStore
from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

BUCKET, KEY = "seals", "vault"


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultRecord:
    vault: str


VAULTS: Codec[VaultRecord] = Codec(VaultRecord)


async def require_keys(store: RecordStore, keys: DataKeys | None) -> None:
    """Before anything is read or written. SettingsError where the store is sealed, and these keys do not open it."""
    record = await store.get(BUCKET, KEY)
    try:
        wanted = VAULTS.decode(record.value).vault if record else ""
    except UnreadableRecord as error:
        raise SettingsError(
            f"the store's record {BUCKET}/{KEY}, which names its vault, is damaged: restore it"
        ) from error
    if keys is None:
        if wanted:
            raise SettingsError(
                "FANLIGHT_GATEWAY_SEAL_KEY_FILE: this store is sealed, so that the operator's key is needed; name the"
                " file with it"
            )
        return
    vault = await keys.open(wanted)
    if not wanted:
        try:
            await store.create(BUCKET, KEY, VAULTS.encode(VaultRecord(vault=vault)))
        except AlreadyExists:
            # Another gateway that starts for the first time too.
            await require_keys(store, keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealReport:
    """What the sealed stores hold; all empty where they are not sealed."""

    is_on: bool
    # Where the wrapped keys are, and the operator's key that wraps.
    place: str = ""
    wrapped_by: str = ""
    tenants: Sequence[KeyFigures] = ()
    clear_records: int = 0
    clear_blobs: int = 0
    # Records and blobs that no key opens any more.
    lost_records: int = 0


class Sealing:
    """Rotation, and what goes on beside the calls."""

    def __init__(self, keys: DataKeys | None, store: RecordStore, blobs: BlobStore) -> None:
        self._keys, self._store, self._blobs = keys, store, blobs

    @property
    def is_on(self) -> bool:
        return self._keys is not None

    async def rotate(self, tenant: str) -> int:
        """The number of its new data key. FailedPrecondition where nothing is sealed; NotFound."""
        return (await self._required().rotate(tenant)).current

    async def destroy(self, tenant: str) -> bool:
        """Whether the tenant had a key; False also where nothing is sealed."""
        return await self._keys.destroy(tenant) if self._keys is not None else False

    def _required(self) -> DataKeys:
        if self._keys is None:
            raise FailedPrecondition("nothing is sealed here; set FANLIGHT_GATEWAY_SEAL_KEY_FILE at the gateway")
        return self._keys

    async def report(self) -> SealReport:
        """Reads every record and the end of every blob."""
        if self._keys is None:
            return SealReport(is_on=False)
        report, _ = await self._look(self._keys)
        return report

    async def sweep(self) -> None:
        """Wrap with the operator's current key, and destroy older data keys that no data has."""
        if self._keys is None:
            return
        if rewrapped := await self._keys.rewrap():
            log.info("data_keys_rewrapped", count=rewrapped, wrapped_by=self._keys.wrapped_by)
        if not any(each.older for each in await self._keys.figures(is_opened=False)):
            return
        report, numbers = await self._look(self._keys)
        for each in report.tenants:
            if each.older:
                await self._keys.drop_unused(each.tenant, frozenset(numbers[each.tenant]))

    async def _look(self, keys: DataKeys) -> tuple[SealReport, defaultdict[str, set[int]]]:
        """And the numbers of the data keys in use, by tenant."""
        clear = lost = 0
        numbers = defaultdict[str, set[int]](set)
        for bucket in CONTENT_BUCKETS:
            async for record in contents(self._store, bucket):
                if record.seal is not None:
                    numbers[record.seal.tenant].add(record.seal.number)
                clear += record.seal is None and not record.fault
                lost += bool(record.fault)
        seals = BlobSeals(clear=0, numbers={})
        if isinstance(self._blobs, SealCounter):
            seals = await self._blobs.count_seals()
        for scope, found in seals.numbers.items():
            numbers[scope] |= found
        report = SealReport(
            is_on=True,
            place=keys.place,
            wrapped_by=keys.wrapped_by,
            tenants=await keys.figures(),
            clear_records=clear,
            clear_blobs=seals.clear,
            lost_records=lost,
        )
        return report, numbers
