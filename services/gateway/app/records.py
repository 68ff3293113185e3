"""Domain values as the bytes of records, and back. The format has a version; a reader knows the ones before its own."""

import json
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from services.gateway.jobs.model import Job
from services.gateway.jobs.workers import WorkerRecord

VERSION = 1

T = TypeVar("T")


class Codec(Generic[T]):
    def __init__(self, kind: Any) -> None:
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)

    def encode(self, value: T) -> bytes:
        """Leaves defaults out, which therefore must never change within a version."""
        return b'{"version":%d,"value":%b}' % (VERSION, self._adapter.dump_json(value, exclude_defaults=True))

    def decode(self, data: bytes) -> T:
        envelope = json.loads(data)
        assert envelope["version"] == VERSION, "written by a later version of Fanlight"
        return self._adapter.validate_python(envelope["value"])


JOBS: Codec[Job] = Codec(Job)
WORKERS: Codec[WorkerRecord] = Codec(WorkerRecord)
