"""Finds embeddings' names in prompts. Pure."""

import re
from collections.abc import Sequence


def embedding_pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Finds one of the names, as a whole word in any case, the longest that fits."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
