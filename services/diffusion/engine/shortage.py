"""What to do where the device has no room: drop what nobody uses, go on in smaller batches, then say so."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from fanlight.errors import ResourceExhausted
from services.diffusion.models.shortage import NoRoom, noticed

Result = TypeVar("Result")


class Relief:
    """For the device thread."""

    def __init__(self, release: Callable[[], None]) -> None:
        """`release` drops from the device what no picture at hand uses."""
        self._release = release
        self._key: Hashable = None
        self._rows_limit = 0

    def once_more(self, work: Callable[[], Result], what: str, *, field: str = "width_px") -> Result:
        """The work, tried again after a release. ResourceExhausted, "the device has no room to `what`"."""
        try:
            with noticed():
                return work()
        except NoRoom:
            self._release()
        try:
            with noticed():
                return work()
        except NoRoom as error:
            raise no_room(what, field=field) from error

    def release(self) -> None:
        self._release()

    def rows_limit(self, key: Hashable) -> int:
        """How many rows of this kind were found to fit together; 0 where that is not known."""
        return self._rows_limit if key == self._key else 0

    def learn(self, key: Hashable, rows_limit: int) -> None:
        """Kept until rows of another kind have a shortage, so that not every evaluation runs into the same wall."""
        self._key, self._rows_limit = key, rows_limit


def no_room(what: str, *, field: str = "width_px") -> ResourceExhausted:
    return ResourceExhausted(f"the device has no room to {what}", field=field)
