"""The gate for bytes that no digest pins: a page, a pointer, an error or nothing is never kept as a model.

Pure. With a digest, only the digest judges. A first look at the begin of an answer refuses what is foreign before it is
written; a second one at the whole file asks whether it is what its name promises.
"""

import json
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from services.weights.errors import ForeignAnswer
from services.weights.references.tensors import BadHeader

# So much of a file's begin is looked at, and of its end for the directory of a zip archive.
HEAD_BYTES = 4096
TAIL_BYTES = 66 * 1024
MAX_TOLD_CHARS = 120
# Names of files that are text; any other name is a model's.
TEXTS = frozenset(
    {".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv", ".tsv", ".py", ".jinja"}
    | {".jinja2", ".xml", ".svg", ".html", ".htm"}
)
_PAGES = (".html", ".htm", ".xml", ".svg", ".md")
_TORCH = (".ckpt", ".pt", ".pth")
_TORCH_STEM = re.compile(r"pytorch|learned_embeds")
_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_HTML = re.compile(
    rb"(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|script|title|meta)\b", re.I | re.S
)
_POINTER = re.compile(rb"version https://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/")
_CODE = re.compile(rb"<Code>\s*([\w.-]{1,60})\s*</Code>")
# Keys of an error; a configuration has others.
_ERROR_KEYS = frozenset(
    {"error", "errors", "message", "detail", "details", "code", "status", "statuscode", "status_code", "type", "title"}
    | {"reason", "path", "timestamp", "requestid", "request_id", "success", "documentation_url"}
)
_TELLING = ("error", "errors", "message", "detail")


def is_text(name: str) -> bool:
    """Whether a file of this name is text; it may be JSON, and a repository may list it as empty."""
    return PurePosixPath(name).suffix.lower() in TEXTS


def page_in(head: bytes) -> bool:
    """Whether these are the first bytes of a web page: of a login, a captive portal, a file's page at a hub."""
    return bool(_HTML.match(_text(head)))


def foreign_in(head: bytes, size_bytes: int | None, name: str) -> str:
    """What the answer is instead of the file `name`, such as `a web page`; empty if it may be the file.

    `head`: the first HEAD_BYTES, or all there is. `size_bytes` of the whole, None if unknown.
    """
    text, ending = _text(head), PurePosixPath(name).suffix.lower()
    is_whole = size_bytes is not None and size_bytes <= len(head)
    if size_bytes == 0:
        return "an empty file"
    if _POINTER.match(text):
        return "a Git LFS pointer"
    if page_in(head) and ending not in _PAGES:
        return "a web page"
    if text.startswith((b"<?xml", b"<Error")) and ending not in _PAGES:
        code = _CODE.search(text)
        return f"an XML error ({code[1].decode()})" if code else "an XML document"
    if text.startswith((b"{", b"[")) and is_whole:
        return _foreign_json(text, is_text=ending in TEXTS)
    if is_whole and ending and ending not in TEXTS and _is_prose(text):
        return f"a text ({_shown(text.decode(errors='replace'))!r})"
    return ""


def _text(head: bytes) -> bytes:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _foreign_json(text: bytes, *, is_text: bool) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    told = _error_of(found)
    if told or not is_text:
        return f"a JSON error ({told})" if told else "a JSON document"
    return ""


def _error_of(found: Any) -> str:
    """What a JSON error says; empty if it is none."""
    if not isinstance(found, dict) or not {str(key).lower() for key in found} <= _ERROR_KEYS:
        return ""
    told = next((found[key] for key in _TELLING if found.get(key)), "")
    return _shown(told if isinstance(told, str) else json.dumps(told)) if told else ""


def _is_prose(text: bytes) -> bool:
    return len(text) > 1 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text)


def _shown(text: str) -> str:
    return "".join(each for each in text[:MAX_TOLD_CHARS] if each.isprintable())


def refuse_foreign(head: bytes, size_bytes: int | None, *, name: str, url: str) -> None:
    """ForeignAnswer if the answer from `url` is no file `name`; it says what it is and what to do."""
    what = foreign_in(head, size_bytes, name)
    if what:
        host = urlsplit(url).hostname or "the source"
        raise ForeignAnswer(f"{host} answers with {what} instead of {name}: {_advice(what, url)}")


def _advice(what: str, url: str) -> str:
    if what == "a Git LFS pointer":
        return "use the address with /resolve/ (or /media/), which leads to the file itself"
    if what == "an empty file":
        return "check the address, or upload the file there again"
    if what == "a web page":
        page = ", or is it the address of a page (/blob/ instead of /resolve/)" if "/blob/" in url else ""
        return f"does one have to log in there (set a token), or in this network first{page}?"
    return "check the address, and whether one has to log in there (set a token)"


def refuse_unsound(head: bytes, tail: bytes, *, name: str, host: str, header_fault: str) -> None:
    """BadHeader if the file is not what its name promises: a safetensors header, a pickle's or an archive's magic.

    `tail`: the last TAIL_BYTES. `header_fault`: what is wrong with its safetensors header.
    """
    path = PurePosixPath(name.lower())
    is_torch = path.suffix in _TORCH or (path.suffix == ".bin" and bool(_TORCH_STEM.search(path.stem)))
    if path.suffix == ".safetensors" and header_fault:
        raise BadHeader(f"{name} from {host} is not a sound safetensors file: {header_fault}")
    if is_torch and not head.startswith(_ZIP) and not _PICKLE.match(head):
        raise BadHeader(f"{name} from {host} is neither a zip archive nor a pickle: check what the address leads to")
    if (is_torch or path.suffix == ".zip") and head.startswith(_ZIP) and _ZIP_END not in tail:
        raise BadHeader(f"{name} from {host} is cut off: its zip archive has no end; fetch it again")
    if path.suffix == ".zip" and not head.startswith(b"PK"):
        raise BadHeader(f"{name} from {host} is no zip archive: check what the address leads to")
    if path.suffix == ".gguf" and not head.startswith(b"GGUF"):
        raise BadHeader(f"{name} from {host} is no GGUF file: check what the address leads to")
