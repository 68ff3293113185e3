"""Files to be fetched in benchmarks."""

import hashlib
import random
from pathlib import Path

BLOCK_BYTES = 16 * 1024 * 1024


def noise(path: Path, size: int) -> str:
    """A file that does not compress; its sha256."""
    chance, digest = random.Random(1), hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, size, BLOCK_BYTES):
            block = chance.randbytes(min(BLOCK_BYTES, size - at))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()
