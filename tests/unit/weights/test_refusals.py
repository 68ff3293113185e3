"""What a hub's refusal becomes: mistyped, gated, private and gone are different sentences that say what to do."""

import json as as_json

import httpx
import pytest

from fanlight.errors import NotFound
from services.weights.errors import SourceFailed, TokenRefused
from services.weights.transfer.refusals import refusal_of

REPO = "https://hub.example/api/models/org/m/revision/main?blobs=true"
FILE = "https://hub.example/org/m/resolve/main/a.safetensors"
DOWNLOAD = "https://civit.example/api/download/models/7"


class Body(httpx.AsyncByteStream):
    def __init__(self, data):
        self._data = data

    async def __aiter__(self):
        yield self._data


async def refused(url, status, *, code="", message="", json=None, has_token=False):
    headers = {key: value for key, value in (("x-error-code", code), ("x-error-message", message)) if value}
    body = Body(as_json.dumps(json).encode() if json else b"")
    response = httpx.Response(status, headers=headers, stream=body, request=httpx.Request("GET", url))
    return await refusal_of(response, has_token=has_token)


CASES = [
    (REPO, 404, {"code": "RepoNotFound"}, NotFound, "does not have org/m .*spelled"),
    (REPO, 401, {"code": "RepoNotFound"}, TokenRefused, "org/m, or it is private.*FANLIGHT_WEIGHTS_HF_TOKEN"),
    (REPO, 401, {"code": "RepoNotFound", "has_token": True}, NotFound, "whose token"),
    (REPO, 404, {"code": "RevisionNotFound"}, NotFound, "no such revision"),
    (FILE, 404, {"code": "EntryNotFound"}, NotFound, "no such file"),
    (FILE, 403, {"code": "GatedRepo"}, TokenRefused, "gated: accept its terms at https://hub.example/org/m and set"),
    (FILE, 401, {"code": "GatedRepo", "has_token": True}, TokenRefused, "gated: .* with the account of"),
    (FILE, 403, {"message": "Access to this resource is disabled."}, NotFound, "was removed"),
    (FILE, 410, {}, NotFound, "answers 410: it was removed"),
    (FILE, 451, {"code": "Unavailable"}, NotFound, "was removed"),
    (FILE, 401, {}, TokenRefused, "it is private; it requires a token"),
    (FILE, 404, {}, NotFound, "does not have it"),
    (
        DOWNLOAD,
        401,
        {"json": {"error": "Unauthorized", "message": "The creator requires you to be logged in to download it"}},
        TokenRefused,
        "those who are logged in .*set FANLIGHT_WEIGHTS_CIVITAI_TOKEN",
    ),
    (
        DOWNLOAD,
        403,
        {"json": {"error": "Early Access", "deadline": "2027-01-01T00:00:00Z"}},
        TokenRefused,
        "early access.*2027-01-01",
    ),
    (DOWNLOAD, 410, {"json": {"error": "Model archived"}}, NotFound, "removed .*Model archived"),
    (DOWNLOAD, 403, {"json": {"error": "Forbidden"}}, TokenRefused, "private.*Forbidden"),
    (DOWNLOAD, 404, {"json": {"error": "x" * 9000}}, NotFound, "does not have it"),
    (FILE, 407, {}, SourceFailed, "proxy .*407"),
]


@pytest.mark.parametrize(("url", "status", "told", "kind", "says"), CASES)
async def test_a_refusal_says_why_and_what_to_do(url, status, told, kind, says):
    error = await refused(url, status, **told)
    assert type(error) is kind
    with pytest.raises(kind, match=says):
        raise error


async def test_mistyped_gated_private_and_gone_are_different_sentences():
    errors = [
        await refused(REPO, 404, code="RepoNotFound"),
        await refused(REPO, 401, code="GatedRepo"),
        await refused(REPO, 401),
        await refused(REPO, 410),
    ]
    assert len({error.message.replace("401", "").replace("404", "") for error in errors}) == 4


async def test_control_characters_of_an_answer_reach_no_log():
    error = await refused(DOWNLOAD, 404, json={"message": "a\x1b[31m\nb"})
    assert error.message.isprintable()
