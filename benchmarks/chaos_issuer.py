"""What nodes and gateways of the chaos run prove themselves with, all of it changing while they work.

An issuer of nodes' tokens (JWT) whose keys rotate and that is away now and then, and two authorities that take turns in
signing the gateways' certificates. Knows no process.
"""

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jwt
import trustme
from cryptography.hazmat.primitives.asymmetric import ec

NAME = "platform"
AUDIENCE = "fanlight"
# As long as a platform's tokens live at least.
TOKEN_LIFE_S = 600.0
RULE = """
[[issuer]]
name = "{name}"
issuer = "{issuer}"
audience = ["{audience}"]
keys_url = "{issuer}/keys"
token_uses = 64
"""


class Issuer:
    """Publishes its present key and the one before, as issuers do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: list[tuple[str, ec.EllipticCurvePrivateKey]] = []
        self._url = ""
        self._server: asyncio.Server | None = None
        self.rotations = self.fetches = 0
        self.is_away = False

    @property
    def rules_file(self) -> Path:
        return self._folder / "issuers.toml"

    async def open(self) -> None:
        self._folder.mkdir()
        self.rotate()
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.rules_file.write_text(RULE.format(name=NAME, issuer=self._url, audience=AUDIENCE))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def rotate(self) -> None:
        self.rotations += 1
        self._keys = [*self._keys[-1:], (f"key-{self.rotations}", ec.generate_private_key(ec.SECP256R1()))]

    def token_file(self, subject: str) -> Path:
        return self._folder / f"{subject}.jwt"

    def write_token(self, subject: str) -> None:
        """A fresh one in place of the last, as a platform projects it."""
        now_s = time.time()
        claims = {"iss": self._url, "aud": [AUDIENCE], "sub": subject, "iat": now_s, "exp": now_s + TOKEN_LIFE_S}
        key_id, key = self._keys[-1]
        partial = self.token_file(subject).with_suffix(".partial")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(jwt.encode(claims, key, algorithm="ES256", headers={"kid": key_id}))
        partial.replace(self.token_file(subject))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if not self.is_away:
                self.fetches += 1
                body = json.dumps({"keys": [_public(*each) for each in self._keys]}).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
                )
                await writer.drain()
        writer.close()


def _public(key_id: str, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    public = jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key(), as_dict=True)
    return {**public, "kid": key_id, "use": "sig", "alg": "ES256"}


class Certificates:
    """Each start of a gateway has a new certificate, from the other authority than the last. Nodes trust both."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authorities = [trustme.CA(), trustme.CA()]
        self.issued = 0

    @property
    def roots_file(self) -> Path:
        return self._folder / "roots.pem"

    def open(self) -> None:
        self._folder.mkdir()
        self.roots_file.write_bytes(b"".join(each.cert_pem.bytes() for each in self._authorities))

    def environment(self, name: str) -> dict[str, str]:
        """What a gateway of that name is started with."""
        chain, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        return {"FANLIGHT_TLS_CERT_FILE": str(chain), "FANLIGHT_TLS_KEY_FILE": str(key)}

    def issue(self, name: str) -> None:
        authority = self._authorities[self.issued % 2]
        self.issued += 1
        made = authority.issue_cert("127.0.0.1", "localhost")
        (self._folder / f"{name}.pem").write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        (self._folder / f"{name}.key").write_bytes(made.private_key_pem.bytes())
