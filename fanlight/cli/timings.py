"""Where a job's time went, told from its record."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from fanlight.gateway.v1.gateway_pb2 import Job


def timings_of(job: "Job") -> dict[str, float]:
    """Seconds by what they were for: `job`, first wish to last picture; `queue`, until a worker took the first
    task; and the workers' own spans, added up over the tasks, which may have run side by side.
    """
    spans: dict[str, float] = {}
    for task in job.tasks:
        for span in task.spans:
            spans[span.name] = spans.get(span.name, 0.0) + span.duration_s
    begun = job.create_time
    known = {"job": _between(begun, [job.end_time]), "queue": _between(begun, (task.lease_time for task in job.tasks))}
    return {f"{name}_s": round(value, 3) for name, value in {**known, **spans}.items() if value is not None}


def _between(begin: "Timestamp", ends: "Iterable[Timestamp]") -> float | None:
    """To the first of the ends that are set."""
    moments = [_seconds(end) for end in ends if end.seconds]
    return max(0.0, min(moments) - _seconds(begin)) if moments and begin.seconds else None


def _seconds(moment: "Timestamp") -> float:
    return moment.seconds + moment.nanos / 1e9
