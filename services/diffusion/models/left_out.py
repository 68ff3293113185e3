"""What was found among the models and is not used: a file or folder, and why. Each is logged once; the list is capped.

Knows no path but those within the models' folders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fanlight.terminal import printable
from services.kernel.logs import get_logger

log = get_logger()

# How many are listed and logged by name; the others are counted.
LEFT_OUT_LIMIT = 500
PATH_LIMIT = 200
REASON_LIMIT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutModel:
    """`path`: within the models' folder. Both are printable, and of bounded length."""

    path: str
    reason: str


class LeftOutList:
    """Grows while folders are scanned."""

    def __init__(self) -> None:
        self._found: list[LeftOutModel] = []
        self.count = 0

    @property
    def found(self) -> Sequence[LeftOutModel]:
        """The first of them, at most LEFT_OUT_LIMIT; `count` has all."""
        return tuple(self._found)

    def add(self, path: Path, root: Path, reason: str) -> None:
        """`root`: the models' folder that the path is in, or is."""
        self.count += 1
        if self.count > LEFT_OUT_LIMIT:
            return
        left_out = LeftOutModel(path=_shown(path, root), reason=_clean(reason, REASON_LIMIT))
        self._found.append(left_out)
        log.warning("model_skipped", path=left_out.path, reason=left_out.reason)

    def end(self) -> None:
        """Say how many are not listed."""
        if self.count > LEFT_OUT_LIMIT:
            log.warning("more_models_skipped", count=self.count - LEFT_OUT_LIMIT, limit=LEFT_OUT_LIMIT)


def _shown(path: Path, root: Path) -> str:
    """Its end where it is long: the file's name tells more than the folders."""
    within = path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name
    clean = _clean(within, 8 * PATH_LIMIT)
    return clean if len(clean) <= PATH_LIMIT else f"...{clean[3 - PATH_LIMIT :]}"


def _clean(text: str, limit: int) -> str:
    """Printable, in one line, cut to the limit; names that are no text of Unicode lose what is none."""
    return printable(text.encode(errors="replace").decode())[:limit]
