"""Which blobs the jobs of the store use, and which checks repeat a job: for what is deleted with a job."""

from collections import Counter, defaultdict

from services.gateway.domain.job import Job, blobs_of

# A blob by 64 bits of its scope and digest: two that agree in them keep each other.
BlobMark = int


def mark_of(scope: str, digest: str) -> BlobMark:
    return hash((scope, digest))


class JobReferences:
    """Observes the job store: it knows every job that the store has."""

    def __init__(self) -> None:
        self._marks: dict[str, frozenset[BlobMark]] = {}
        self._uses: Counter[BlobMark] = Counter()
        # Ids of checks, by the id of the job whose task they repeat.
        self._checks: dict[str, set[str]] = defaultdict(set)
        self._checked: dict[str, str] = {}

    def observe(self, job: Job) -> None:
        marks = frozenset(mark_of(blob.scope, blob.digest) for blob in blobs_of(job))
        if marks != self._marks.get(job.id):
            self._drop_marks(job.id)
            self._marks[job.id] = marks
            self._uses.update(marks)
        if job.check is not None:
            checked = job.check.task.split("/")[1]
            self._checked[job.id] = checked
            self._checks[checked].add(job.id)

    def forget(self, job_id: str) -> None:
        """It is gone from the store."""
        self._drop_marks(job_id)
        checked = self._checked.pop(job_id, None)
        if checked is not None:
            self._checks[checked].discard(job_id)
            if not self._checks[checked]:
                del self._checks[checked]

    def _drop_marks(self, job_id: str) -> None:
        for mark in self._marks.pop(job_id, frozenset()):
            self._uses[mark] -= 1
            if not self._uses[mark]:
                del self._uses[mark]

    def count_of(self, scope: str, digest: str) -> int:
        """How many jobs read or wrote the blob."""
        return self._uses[mark_of(scope, digest)]

    def checks_of(self, job_id: str) -> frozenset[str]:
        return frozenset(self._checks.get(job_id, ()))
