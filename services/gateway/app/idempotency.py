"""Which job a client's request id stands for. Whoever creates the record first has decided it."""

import hashlib
from dataclasses import dataclass

from fanlight.errors import AlreadyExists
from services.gateway.app.records import Codec
from services.gateway.jobs.model import DEFAULT_TENANT
from services.gateway.ports import JobStore, New

BUCKET = "requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    job_id: str
    content_digest: str


REQUESTS: Codec[Request] = Codec(Request)


def _key(request_id: str, tenant: str) -> str:
    """Each tenant has request ids of its own."""
    whole = request_id if tenant == DEFAULT_TENANT else f"{tenant}/{request_id}"
    return hashlib.sha256(whole.encode()).hexdigest()


class Requests:
    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def job_of(self, request_id: str, content_digest: str, tenant: str) -> str | None:
        """The id of the job it stands for, which may not be made yet. AlreadyExists for other content."""
        record = await self._store.get(BUCKET, _key(request_id, tenant)) if request_id else None
        if record is None:
            return None
        request = REQUESTS.decode(record.value)
        if request.content_digest != content_digest:
            raise AlreadyExists("was used with other content before", field="request_id")
        return request.job_id

    def claim(self, request_id: str, content_digest: str, tenant: str, job_id: str) -> New | None:
        """The record that makes it stand for this job, to be created before the job; None without a request id."""
        if not request_id:
            return None
        value = REQUESTS.encode(Request(job_id=job_id, content_digest=content_digest))
        return New(bucket=BUCKET, key=_key(request_id, tenant), value=value)

    async def forget(self, request_id: str, tenant: str) -> None:
        if request_id:
            await self._store.delete(BUCKET, _key(request_id, tenant))
