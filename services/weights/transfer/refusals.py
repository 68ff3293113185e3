"""Why a hub refuses: mistyped, gated, private or gone are four sentences, each with what to do.

Reads what the hubs say of it: Hugging Face's `X-Error-Code` and `X-Error-Message`, Civitai's JSON, a storage's XML.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fanlight.errors import FanlightError, NotFound
from services.kernel.process import without
from services.weights.errors import SourceFailed, TokenRefused

# As in transfer/web.py.
with without("click"):
    import httpx

MAX_BODY_BYTES = 4096
MAX_TOLD_CHARS = 200
HF_TOKEN = "FANLIGHT_WEIGHTS_HF_TOKEN"
CIVITAI_TOKEN = "FANLIGHT_WEIGHTS_CIVITAI_TOKEN"
REFUSED = (401, 403, 404, 407, 410, 451)
_REMOVED = (410, 451)
_CLOCK = "RequestTimeTooSkewed"
_STORAGE_TODO = "check the credentials of this machine, or whether the signed address ran out"
# How S3 says that the bucket is in another region than the request was signed for.
_OTHER_REGION = (301, 307, 400)
_DISABLED = "access to this resource is disabled"


async def refusal_of(response: httpx.Response, *, has_token: bool) -> FanlightError:
    """The error for an answer whose status is in REFUSED; reads a short JSON body. `has_token`: one was sent."""
    host, status = response.url.host or "the source", response.status_code
    if status == 407:
        return SourceFailed(f"the proxy refuses to fetch from {host} (407): set its user and password in HTTP_PROXY")
    code = response.headers.get("x-error-code", "")
    said = await said_by(response)
    told = _printable(response.headers.get("x-error-message", "")) or said.told
    if code:
        return _of_hugging_face(code, told, response, has_token=has_token)
    if status in _REMOVED or _DISABLED in told.lower():
        return NotFound(f"{host} answers {status}: it was removed there and does not come back{_in_brackets(told)}")
    if status == 404:
        return NotFound(f"{host} does not have it (404): check how it is spelled{_in_brackets(told)}")
    if said.is_storage:
        todo = "set this machine's clock" if told.startswith(_CLOCK) else _STORAGE_TODO
        return TokenRefused(f"{host} answers {status}{_in_brackets(told)}: {todo}")
    return _gated(host, told, has_token=has_token) or TokenRefused(
        f"{host} answers {status}: it is private; it requires a token, or rejects the configured one "
        f"({HF_TOKEN}, {CIVITAI_TOKEN}){_in_brackets(told)}"
    )


def _of_hugging_face(code: str, told: str, response: httpx.Response, *, has_token: bool) -> FanlightError:
    host, status, repo = response.url.host, response.status_code, _repo_of(response.url.path)
    if code == "GatedRepo":
        where = f"{response.url.scheme}://{response.url.netloc.decode()}/{repo}"
        whose = f"with the account of {HF_TOKEN}" if has_token else f"and set {HF_TOKEN} to that account's token"
        return TokenRefused(f"{host}: {repo} is gated: accept its terms at {where} {whose}")
    if code in ("DisabledRepo", "RepoDisabled") or _DISABLED in told.lower() or status in _REMOVED:
        return NotFound(f"{host}: {repo} was removed there and does not come back{_in_brackets(told)}")
    if code == "RevisionNotFound":
        return NotFound(f"{host}: {repo} has no such revision ({status}): check how it is spelled")
    if code == "EntryNotFound":
        return NotFound(f"{host}: {repo} has no such file in this revision ({status}): check how it is spelled")
    if code == "RepoNotFound" and (has_token or status == 404):
        return NotFound(f"{host} does not have {repo} ({status}): check how it is spelled, and whose token is set")
    if code == "RepoNotFound":
        return TokenRefused(
            f"{host} does not have {repo}, or it is private ({status}): check how it is spelled, or set {HF_TOKEN}"
        )
    if status == 404:
        return NotFound(f"{host} does not have it (404, {_printable(code)}){_in_brackets(told)}")
    return TokenRefused(
        f"{host}: {repo} is private ({status}, {_printable(code)}): "
        f"{'the account of ' + HF_TOKEN + ' may not read it' if has_token else 'set ' + HF_TOKEN}{_in_brackets(told)}"
    )


def _gated(host: str, told: str, *, has_token: bool) -> FanlightError | None:
    """Civitai says in words what a download takes."""
    said = told.lower()
    if "early access" in said:
        return TokenRefused(
            f"{host}: it is in early access: wait, or buy it and set {CIVITAI_TOKEN}{_in_brackets(told)}"
        )
    if "logged in" in said or "log in" in said or "login" in said:
        todo = f"the account of {CIVITAI_TOKEN} may not" if has_token else f"set {CIVITAI_TOKEN}"
        return TokenRefused(f"{host}: it is gated: its creator lets only those who are logged in load it: {todo}")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the body of a refusal says: `told` in words or as a storage's code; the bucket's `region`."""

    told: str = ""
    region: str = ""
    is_storage: bool = False


async def said_by(response: httpx.Response) -> Said:
    """Reads a short body of JSON or of a storage's XML; any other one says nothing."""
    body = bytearray()
    async for block in response.aiter_raw():
        body += block
        if len(body) > MAX_BODY_BYTES:
            break
    text = bytes(body).decode(errors="replace").lstrip("\ufeff").strip()
    region = response.headers.get("x-amz-bucket-region", "") if response.status_code in _OTHER_REGION else ""
    if text.startswith("<"):
        return _said_in_xml(text, region)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return Said(told=_printable(_words(found)) if isinstance(found, dict) else "", region=_printable(region))


def _said_in_xml(text: str, region: str) -> Said:
    """S3, Google and Azure answer `<Error><Code>AccessDenied</Code><Message>...`."""
    code, words, there = (re.search(rf"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message", "Region"))
    told = ": ".join(found[1].strip() for found in (code, words) if found) if code else ""
    region = region or (there[1] if there else "")
    return Said(told=_printable(told), region=_printable(region), is_storage=code is not None)


def _words(found: Mapping[str, object]) -> str:
    words = [found.get(name) for name in ("error", "message", "deadline")]
    return ", ".join(dict.fromkeys(word for word in words if isinstance(word, str) and word))


def _printable(text: str) -> str:
    return "".join(each for each in text[:MAX_TOLD_CHARS] if each.isprintable())


def _in_brackets(told: str) -> str:
    return f" ({told})" if told else ""


def _repo_of(path: str) -> str:
    """ORG/REPO of an address of the API or of a file."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[:1] == ["api"] else parts
    return "/".join(parts[:2]) or "it"
