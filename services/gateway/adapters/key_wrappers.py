"""The operator's key: from a file, or from a key management service by an installed package's entry point."""

import asyncio
import contextlib
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.gateway.ports import KeyWrapper, WrongKey
from services.kernel.config import SettingsError

GROUP = "fanlight.key_wrappers"
SETTING = "FANLIGHT_GATEWAY_SEAL_KEY_FILE"
NONCE_BYTES = 12
KEYS_LIMIT = 16
_KEY = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class _OperatorKeys:
    current: str
    ciphers: Mapping[str, AESGCM] = field(repr=False)


class FileKeys:
    """Keys of 64 hexadecimal digits, one a line: the first wraps, all of them open. `#` begins a comment."""

    def __init__(self, file: Path) -> None:
        """SettingsError."""
        self._file = file
        self._keys = _read(file)

    @property
    def current(self) -> str:
        return self._keys.current

    async def wrap(self, secret: bytes, context: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._keys.ciphers[self._keys.current].encrypt(nonce, secret, context)

    async def unwrap(self, wrapped_by: str, wrapped: bytes, context: bytes) -> bytes:
        if wrapped_by not in self._keys.ciphers:
            with contextlib.suppress(SettingsError):
                await self.refresh()
        cipher = self._keys.ciphers.get(wrapped_by)
        if cipher is None:
            raise WrongKey(f"it was wrapped with the operator's key {wrapped_by}, which is not in {self._file}")
        try:
            return cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise WrongKey("the wrapped key was changed; put it back from a backup") from error

    async def refresh(self) -> None:
        self._keys = await asyncio.to_thread(_read, self._file)


def _read(file: Path) -> _OperatorKeys:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise SettingsError(f"{SETTING}: {file} cannot be read: {error.strerror}") from error
    words = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    keys: dict[str, AESGCM] = {}
    for number, word in words:
        if not word:
            continue
        if not _KEY.fullmatch(word):
            raise SettingsError(
                f"{SETTING}: {file}, line {number}: must be 64 hexadecimal digits: openssl rand -hex 32"
            )
        secret = bytes.fromhex(word)
        if len(set(secret)) < len(secret) // 4:
            raise SettingsError(f"{SETTING}: {file}, line {number}: can be guessed; take openssl rand -hex 32")
        keys.setdefault(_name_of(secret), AESGCM(secret))
    if not keys:
        raise SettingsError(f"{SETTING}: {file}: has no key; write one into it: openssl rand -hex 32")
    if len(keys) > KEYS_LIMIT:
        raise SettingsError(f"{SETTING}: {file}: has {len(keys)} keys; at most {KEYS_LIMIT}")
    return _OperatorKeys(next(iter(keys)), keys)


def _name_of(secret: bytes) -> str:
    """Says nothing about the key, whose 256 bits are random."""
    return hashlib.sha256(b"fanlight operator key" + secret).hexdigest()[:16]


def key_wrapper(file: Path | None, kms: str) -> KeyWrapper | None:
    """None where data is not sealed. `kms`: NAME or NAME:ARGUMENT of an entry point. SettingsError."""
    if file is not None and kms:
        raise SettingsError(f"{SETTING}: set either it or FANLIGHT_GATEWAY_SEAL_KMS")
    if file is not None:
        return FileKeys(file)
    if not kms:
        return None
    name, _, argument = kms.partition(":")
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        known = ", ".join(sorted(entry_points(group=GROUP).names)) or "none"
        raise SettingsError(
            f"FANLIGHT_GATEWAY_SEAL_KMS: no installed package offers {name!r} as {GROUP}; found: {known}"
        )
    wrapper: KeyWrapper = found.load()(argument)
    return wrapper
