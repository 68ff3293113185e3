"""Damaged records as messages. Shows their bytes as they are: nothing of them can be trusted."""

from collections.abc import Sequence

from fanlight.records.v1 import records_pb2
from services.gateway.app.records import DamagedRecord
from services.gateway.wire.answers import moment


def parse_name(name: str) -> tuple[str, str]:
    """Bucket and key of `BUCKET/KEY`. Any other name is none of a record, which is not found."""
    bucket, _, key = name.partition("/")
    return bucket, key


def damaged_record(value: DamagedRecord, data: bytes = b"") -> records_pb2.DamagedRecord:
    return records_pb2.DamagedRecord(
        name=value.name,
        why=value.why,
        size_bytes=value.size_bytes,
        found_time=moment(value.found_time_s),
        value=data,
    )


def page(values: Sequence[DamagedRecord], page_size: int) -> records_pb2.ListDamagedRecordsResponse:
    return records_pb2.ListDamagedRecordsResponse(
        records=[damaged_record(each) for each in values],
        next_page_token=values[-1].name if len(values) == page_size else "",
    )
