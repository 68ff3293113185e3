"""Domain values as the bytes of records, and back. Records of another form are refused by its number."""

import json
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from fanlight.errors import FailedPrecondition
from services.gateway.jobs.model import Job
from services.gateway.jobs.workers import WorkerRecord
from services.gateway.ports import JobStore, Record
from services.kernel.logs import get_logger

log = get_logger()

# 2: a job keeps its stages' request messages.
FORM = 2

T = TypeVar("T")


class Unreadable(FailedPrecondition):
    """A record that this gateway cannot read: of another form, or damaged. It harms nothing but itself."""

    reason = "UNREADABLE_RECORD"


class OtherForm(Unreadable):
    """Written by an older or a newer Fanlight."""


class Codec(Generic[T]):
    def __init__(self, kind: Any) -> None:
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        self._head = b'{"version":%d,"value":' % FORM

    def encode(self, value: T) -> bytes:
        """Leaves defaults out, which therefore must never change within a form."""
        return b"%b%b}" % (self._head, self._adapter.dump_json(value, exclude_defaults=True))

    def decode(self, data: bytes) -> T:
        """OtherForm, Unreadable."""
        if not data.startswith(self._head):
            raise _not_ours(data)
        try:
            return self._adapter.validate_json(data[len(self._head) : -1])
        except ValidationError as error:
            where = error.errors(include_url=False, include_input=False)[0]
            raise Unreadable(f"{'.'.join(map(str, where['loc']))}: {where['msg']}") from error

    def read(self, bucket: str, record: Record) -> T | None:
        """None for one that cannot be read: it is set aside, and ends no gateway and no list."""
        try:
            return self.decode(record.value)
        except Unreadable as error:
            log.error("record_set_aside", bucket=bucket, key=record.key, why=error.message)
            return None


async def refuse_other_form(store: JobStore, buckets: Iterable[str]) -> None:
    """OtherForm where a record of the store has another form than those of this gateway."""
    for bucket in buckets:
        for record in await store.list(bucket, limit=1):
            form = _form_of(record.value)
            if form is not None and form != FORM:
                raise OtherForm(f"{bucket} have form {form}; this gateway reads and writes form {FORM}")


def _not_ours(data: bytes) -> Unreadable:
    form = _form_of(data)
    if form is None or form == FORM:
        return Unreadable("it is no record of Fanlight")
    return OtherForm(f"it has form {form}; this gateway reads form {FORM}")


def _form_of(data: bytes) -> object:
    """None where it says none."""
    try:
        return json.loads(data)["version"]
    except (ValueError, KeyError, TypeError):
        return None


JOBS: Codec[Job] = Codec(Job)
WORKERS: Codec[WorkerRecord] = Codec(WorkerRecord)
