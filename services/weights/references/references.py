"""References: the strings that name weights, parsed once. Pure: no network, no disk, no settings."""

import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import quote, unquote

from fanlight.errors import InvalidField

MAX_REFERENCE_CHARS = 2048


# How many of the parts behind a revision may belong to it.
MAX_BRANCH_PARTS = 4


# A suffix of an AIR URN is a format only if it is one of these; ids and versions may contain dots themselves.
FORMATS = frozenset({"safetensors", "ckpt", "pt", "pth", "bin", "gguf", "onnx", "tar", "diffusers", "zip", "json"})


AIR_SOURCES = frozenset({"civitai", "civitai-r2", "huggingface", "orchestrator", "comfyregistry", "dockerhub", "ghcr"})


_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?")


_WORD = re.compile(r"[A-Za-z0-9_/-]{1,64}")


_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,62}")


# Categories of characters that no name has: control characters, halves of surrogate pairs, separators of lines.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


# Change the direction of the text around them, so that a name looks like another one.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# Written as they are in an address: delimiters, and the percent sign of what is encoded already.
_URL_SAFE = "/?#[]@:!$&'()*+,;=%~"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRef:
    """A repository of a hub with the Hugging Face API, or a folder or file in it.

    A slash in a revision is written `%2F`, except in `refs/pr/1` and its like; names of files are written as they are.
    """

    repo: str
    revision: str = ""
    subfolder: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repo}{_after('@', _written_revision(self.revision))}{_after('/', self.subfolder)}"

    def readings(self) -> "list[HubRef]":
        """Itself, and where it can mean a branch such as `feature/x`, each longer revision with a shorter subfolder."""
        parts = self.subfolder.split("/") if self.subfolder and self.revision else []
        longer = [
            HubRef(
                repo=self.repo, revision="/".join([self.revision, *parts[:count]]), subfolder="/".join(parts[count:])
            )
            for count in range(1, min(len(parts), MAX_BRANCH_PARTS) + 1)
        ]
        return [self, *longer]


@dataclass(frozen=True, slots=True, kw_only=True)
class AirRef:
    """An AIR URN; `version` is empty where the URN has no version."""

    source: str
    id: str
    version: str = ""
    ecosystem: str = ""
    type: str = ""
    file_id: str = ""
    format: str = ""

    def __str__(self) -> str:
        head = f"urn:air:{self.ecosystem or 'other'}:{self.type or 'other'}:{self.source}:{self.id}"
        return head + _after("@", self.version) + _after("+", self.file_id) + _after(".", self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Ref:
    """An object; or all objects below the key where it ends with a slash."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlRef:
    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRef:
    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRef:
    """A file of the fanlight package; `path` is relative to the package."""

    path: str

    def __str__(self) -> str:
        return f"package:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogRef:
    """An entry or a profile of the catalog."""

    name: str

    def __str__(self) -> str:
        return self.name


Reference = HubRef | AirRef | S3Ref | UrlRef | LocalRef | PackageRef | CatalogRef


def parse(text: str) -> Reference:
    """Parse a reference. InvalidField repeats the text and says what is wrong."""
    lowered = text.lower()
    # The name of a repository's file may end with a blank.
    is_padded = text != text.strip() and not lowered.startswith("hf:")
    if not text or len(text) > MAX_REFERENCE_CHARS or not is_printable(text) or is_padded:
        raise _bad(text[:80], f"must be 1 to {MAX_REFERENCE_CHARS} printable characters without surrounding spaces")
    for prefix, read in _SCHEMES:
        if lowered.startswith(prefix):
            return read(text)
    return _parse_bare(text)


def _parse_bare(text: str) -> Reference:
    source = text.rsplit(":", 1)[0].rsplit(":", 1)[-1].lower()
    if ":" in text and (source in AIR_SOURCES or text.split(":")[0].lower() in AIR_SOURCES):
        return _parse_air(text)
    if ":" in text:
        raise _bad(text, "has an unknown prefix; write hf:, urn:air:, s3://, https://, a path or a catalog name")
    if _NAME.fullmatch(text) and "/" not in text:
        return CatalogRef(name=text)
    if "/" in text:
        return _parse_hub(f"hf:{text}")
    raise _bad(text, "is neither a catalog name nor a reference")


def _parse_hub(text: str) -> Reference:
    body = text.split(":", 1)[1].removeprefix("//")
    org, _, rest = body.partition("/")
    name, revision, subfolder = _split_hub(rest)
    for part in (org, name):
        if part and not _is_segment(part):
            raise _bad(text, f"has an invalid part: {part!r}")
    if not org or not name or "//" in body or body.endswith("/") or rest.endswith(f"{name}@"):
        raise _bad(text, "must be hf:ORG/REPO, optionally followed by @REVISION and /SUBFOLDER")
    revision = unquote(revision)
    if revision and (not is_safe_path(revision) or " " in revision):
        raise _bad(text, f"has an invalid revision: {revision!r}")
    if subfolder and not is_safe_path(subfolder):
        raise _bad(text, f"has an invalid path: {subfolder!r}")
    return HubRef(repo=f"{org}/{name}", revision=revision, subfolder=subfolder)


def _split_hub(rest: str) -> tuple[str, str, str]:
    """Name, revision and subfolder of `name[@revision][/subfolder]`; refs/pr/41 is one revision."""
    at, slash = rest.find("@"), rest.find("/")
    if at == -1 or (slash != -1 and slash < at):
        name, _, subfolder = rest.partition("/")
        return name, "", subfolder
    name, tail = rest[:at], rest[at + 1 :].split("/")
    taken = 3 if tail[0] == "refs" and len(tail) >= 3 else 1
    return name, "/".join(tail[:taken]), "/".join(tail[taken:])


def _written_revision(revision: str) -> str:
    """The revision in one segment, or in the three of `refs/pr/1`."""
    is_ref = revision.startswith("refs/") and revision.count("/") == 2
    return revision.replace("%", "%25") if is_ref else revision.replace("%", "%25").replace("/", "%2F")


def _parse_air(text: str) -> Reference:
    body = re.sub(r"^(urn:)?(air:)?", "", text, count=1, flags=re.IGNORECASE)
    if "@sha256:" in body:
        body, digest = body.split("@", 1)
    else:
        digest = ""
    parts = body.split(":")
    if not 2 <= len(parts) <= 4:
        raise _bad(text, "must be urn:air:ECOSYSTEM:TYPE:SOURCE:ID@VERSION")
    *kinds, source, tail = parts
    ecosystem, kind = (["", "", *kinds])[-2:]
    if source.lower() not in AIR_SOURCES or any(k and not _WORD.fullmatch(k) for k in (ecosystem, kind)):
        raise _bad(text, f"names an unknown source; known sources: {', '.join(sorted(AIR_SOURCES))}")
    return _finish_air(text, _air(source.lower(), ecosystem.lower(), kind.lower(), tail, digest))


def _air(source: str, ecosystem: str, kind: str, tail: str, digest: str) -> AirRef:
    tail, ending = _split_format(tail)
    tail, _, file_id = tail.partition("+") if re.search(r"\+\d+$", tail) else (tail, "", "")
    ident, _, version = tail.partition("@")
    return AirRef(
        source=source,
        id=ident,
        version=version or digest,
        ecosystem=ecosystem,
        type=kind,
        file_id=file_id,
        format=ending,
    )


def _split_format(tail: str) -> tuple[str, str]:
    head, dot, ending = tail.rpartition(".")
    return (head, ending.lower()) if dot and ending.lower() in FORMATS else (tail, "")


def _finish_air(text: str, ref: AirRef) -> Reference:
    parts = [*ref.id.split("/"), *([] if ref.version.startswith("sha256:") else ref.version.split("/"))]
    if not ref.id or any(part and not _is_segment(part) for part in parts) or "" in ref.id.split("/"):
        raise _bad(text, "has an invalid id or version")
    if ref.source == "civitai" and not (ref.id.isdigit() and (not ref.version or ref.version.isdigit())):
        raise _bad(text, "must name a Civitai model and version by number")
    if ref.source != "huggingface":
        return ref
    if ref.id.count("/") != 1:
        raise _bad(text, "must name a repository as ORG/REPO")
    if ref.format in ("", "tar", "diffusers"):
        return HubRef(repo=ref.id, revision=ref.version)
    return HubRef(repo=ref.id, subfolder=f"{ref.version}.{ref.format}")


def _parse_s3(text: str) -> Reference:
    bucket, _, key = text[len("s3://") :].partition("/")
    if not _BUCKET.fullmatch(bucket) or not is_safe_path(key.removesuffix("/")):
        raise _bad(text, "must be s3://BUCKET/KEY, or s3://BUCKET/FOLDER/")
    return S3Ref(bucket=bucket, key=key)


def _parse_url(text: str) -> Reference:
    host = re.split(r"[/?#]", text.split("://", 1)[1], maxsplit=1)[0]
    if not host or "@" in host or any(c in host for c in ' <>"^`{|}') or "\\" in text:
        raise _bad(text, "must be http(s)://HOST/PATH without a user or password in it")
    # As a browser's address line does, for an address that was copied with its blanks.
    begin = len(text.split("://", 1)[0]) + 3 + len(host)
    return UrlRef(url=text[:begin] + quote(text[begin:], safe=_URL_SAFE))


def _parse_local(text: str) -> Reference:
    path = text[len("file://") :] if text.lower().startswith("file://") else text
    if not path or "\0" in path:
        raise _bad(text, "must name a path")
    return LocalRef(path=path)


def _parse_package(text: str) -> Reference:
    path = text.split(":", 1)[1]
    if not is_safe_path(path):
        raise _bad(text, "must be package:PATH inside the fanlight package")
    return PackageRef(path=path)


def _parse_catalog(text: str) -> Reference:
    name = text.split(":", 1)[1]
    if not _NAME.fullmatch(name):
        raise _bad(text, "must be catalog:NAME")
    return CatalogRef(name=name)


_SCHEMES = (
    ("hf:", _parse_hub),
    ("urn:", _parse_air),
    ("air:", _parse_air),
    ("s3://", _parse_s3),
    ("https://", _parse_url),
    ("http://", _parse_url),
    ("file://", _parse_local),
    ("catalog:", _parse_catalog),
    ("package:", _parse_package),
    ("/", _parse_local),
    ("./", _parse_local),
    ("../", _parse_local),
    ("~/", _parse_local),
)


def is_safe_path(path: str) -> bool:
    """Whether a relative path stays inside its folder, on any system."""
    parts = path.split("/")
    return (
        len(path) <= 1024
        and is_printable(path)
        and "\\" not in path
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
    )


def is_printable(text: str) -> bool:
    """Whether a name can be shown in one line as what it is, in any script, also with joiners and wide blanks."""
    return text.isprintable() or not any(
        unicodedata.category(each) in _UNPRINTABLE or each in _DIRECTIONS for each in text
    )


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same to a reader: an accent may be a character of its own, or part of its letter's."""
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _is_segment(part: str) -> bool:
    return bool(_SEGMENT.fullmatch(part)) and part not in (".", "..")


def _after(mark: str, text: str) -> str:
    return f"{mark}{text}" if text else ""


def _bad(text: str, why: str) -> InvalidField:
    return InvalidField(f"{text!r} {why}", field="reference")
