"""Data keys over a folder or another vault, with an operator's key that the test knows."""

import os
import tempfile
from pathlib import Path

from services.gateway.adapters.key_vaults import FolderVault
from services.gateway.adapters.key_wrappers import FileKeys
from services.gateway.app.data_keys import DataKeys
from services.gateway.ports import KeyVault
from tests.fakes.fleet import FakeClock

OPERATOR_KEY = "00112233445566778899aabbccddeeff" * 2
OTHER_KEY = "ffeeddccbbaa99887766554433221100" * 2


def key_file(folder: Path, *keys: str) -> Path:
    """The first one wraps."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "operator.key"
    file.write_text("# the operator's\n" + "\n".join(keys or (OPERATOR_KEY,)) + "\n")
    return file


def data_keys(vault: KeyVault | Path, *keys: str, clock: FakeClock | None = None) -> DataKeys:
    """`vault`: also a folder. `keys`: the operator's."""
    if isinstance(vault, Path):
        wrapper = FileKeys(key_file(vault.with_name(f"operator-{'-'.join(each[:4] for each in keys)}"), *keys))
        return DataKeys(FolderVault(vault), wrapper, clock or FakeClock(), os.urandom)
    with tempfile.TemporaryDirectory() as folder:
        wrapper = FileKeys(key_file(Path(folder), *keys))
    return DataKeys(vault, wrapper, clock or FakeClock(), os.urandom)
