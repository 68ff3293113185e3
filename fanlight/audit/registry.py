"""A registry's blobs through its v2 API, anonymously or with a bearer token that its challenge leads to."""

import hashlib
import io
import ipaddress
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .choosing import LISTS
from .model import AuditError
from .reading import MANIFEST_BYTES_MAX

ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        *LISTS,
    )
)
TIMEOUT_S = 60
DOCKER_HUB = "registry-1.docker.io"


class Registry:
    """One repository of one host; plain HTTP on loopback only."""

    def __init__(self, host: str, repository: str) -> None:
        if host in ("docker.io", "index.docker.io"):
            host, repository = DOCKER_HUB, repository if "/" in repository else f"library/{repository}"
        self._base = f"{'http' if _is_loopback(host) else 'https'}://{host}/v2/{repository}"
        self._token = ""
        self._manifests: dict[str, bytes] = {}

    def resolve(self, tag: str) -> str:
        """The digest of the manifest that the tag names now."""
        try:
            answer = self._get(f"/manifests/{tag}")
        except FileNotFoundError as error:
            raise AuditError(f"{self._base} has no image tagged {tag!r}") from error
        with answer:
            body = answer.read(MANIFEST_BYTES_MAX)
        # Whatever the registry says of it: that is what was read.
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if tag.startswith("sha256:") and tag != digest:
            raise AuditError(f"{self._base} has another manifest at {tag}")
        self._manifests[digest] = body
        return digest

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        """A blob, or a manifest of an index: the API keeps the two apart."""
        if digest in self._manifests:
            yield io.BytesIO(self._manifests[digest])
            return
        try:
            answer = self._get(f"/blobs/{digest}")
        except FileNotFoundError:
            answer = self._get(f"/manifests/{digest}")
        with answer:
            yield answer

    def _get(self, path: str) -> BinaryIO:
        try:
            return self._open(path)
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code == 401 and not self._token and challenge.lower().startswith("bearer"):
                self._token = _token(challenge)
                return self._get(path)
            if error.code == 404:
                raise FileNotFoundError(path) from error
            raise AuditError(f"{self._base}{path} answers {error.code}") from error
        except OSError as error:
            raise AuditError(f"{self._base} cannot be reached: {error}") from error

    def _open(self, path: str) -> BinaryIO:
        request = urllib.request.Request(self._base + path, headers={"Accept": ACCEPT})
        if self._token:
            # Not for the store that a registry may send us on to.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        answer: BinaryIO = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return answer


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0].strip("[]") if host.count(":") == 1 or host.startswith("[") else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _token(challenge: str) -> str:
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urllib.parse.urlencode({key: fields[key] for key in ("service", "scope") if key in fields})
    try:
        with urllib.request.urlopen(f"{fields['realm']}?{query}", timeout=TIMEOUT_S) as answer:
            found = json.load(answer)
        return str(found.get("token") or found.get("access_token") or "")
    except (KeyError, AttributeError, ValueError, OSError) as error:
        raise AuditError(f"the registry wants a token, and there is none to be had: {error}") from error
