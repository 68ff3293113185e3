"""Asking the operator's moderation over HTTP and over gRPC, and what counts as an answer."""

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from fanlight.errors import FailedPrecondition, Unavailable
from fanlight.moderation.v1 import moderation_pb2
from services.gateway.adapters.moderation_hooks import (
    ANSWER_LIMIT_BYTES,
    GrpcModeration,
    HttpModeration,
    hook_of,
    moderation_of,
)
from services.gateway.adapters.webhook_http import WebhookHttp
from services.gateway.app.webhooks import signature_headers
from services.gateway.config import GatewaySettings
from services.gateway.domain.moderation import ContentVerdict, Decision
from services.gateway.ports import JudgedImage, ModerationHook, Question
from services.kernel.blobs import BlobInfo
from services.kernel.config import SettingsError
from tests.fakes.moderation import LOOPBACK, GrpcHook, grpc_hook, http_answer, http_hook

KEY = b"k" * 32
SECRET = "whsec_" + base64.b64encode(KEY).decode()
NOW_S = 1_700_000_000
BLOB = BlobInfo(scope="acme", digest="sha256:" + "0" * 64, size_bytes=3, media_type="image/png")
QUESTION = Question(
    id="request_1",
    tenant="acme",
    stage="diffusion",
    policy="flag",
    prompt="a fox",
    negative_prompt="a hen",
    images=(JudgedImage(field="generation.image", blob=BLOB, data=b"png"),),
)
JUDGED = moderation_pb2.JudgeResponse


def asking(url: str, *, key: bytes = KEY, allowed: Any = LOOPBACK, timeout_s: float = 5.0) -> ModerationHook:
    return hook_of(url, allowed=allowed, key=key, now_s=lambda: NOW_S, timeout_s=timeout_s, limit_bytes=100_000)


async def over_http(raw: bytes, **changes: Any) -> ContentVerdict:
    async def answer(headers: Mapping[str, str], body: bytes) -> bytes:
        return raw

    async with http_hook(answer) as hook:
        return await asking(hook.url, **changes).judge(QUESTION)


async def test_the_question_over_http_is_signed_as_webhooks_are() -> None:
    seen: list[tuple[Mapping[str, str], bytes]] = []

    async def answer(headers: Mapping[str, str], body: bytes) -> bytes:
        seen.append((headers, body))
        return http_answer(b'{"decision": "allow"}')

    async with http_hook(answer) as hook:
        await asking(hook.url).judge(QUESTION)
        await asking(hook.url, key=b"").judge(QUESTION)
    [(headers, body), (unsigned, _)] = seen
    expected = signature_headers(KEY, message_id="request_1", now_s=NOW_S, body=body)
    assert expected.items() <= headers.items()
    assert (unsigned["webhook-id"], unsigned.get("webhook-signature")) == ("request_1", None)
    asked = json.loads(body)
    assert (asked["phase"], asked["prompt"], asked["negative_prompt"]) == ("PHASE_REQUEST", "a fox", "a hen")
    assert asked["images"][0]["data"] == base64.b64encode(b"png").decode()
    assert asked["images"][0]["blob"]["digest"] == BLOB.digest


@pytest.mark.parametrize("decision", list(Decision))
@pytest.mark.parametrize("written", ["{}", "DECISION_{}"])
async def test_each_decision_is_understood_over_http(decision: Decision, written: str) -> None:
    name = written.format(decision.value.upper() if "_" in written else decision.value)
    body = {"decision": name, "labels": ["a", "b"], "reason": "so", "score": 0.7}
    told = await over_http(http_answer(json.dumps(body).encode()))
    assert told == ContentVerdict(decision=decision, labels=("a", "b"), reason="so")


@pytest.mark.parametrize(
    ("raw", "kind", "match"),
    [
        (http_answer(b"", status="500 Oops"), Unavailable, "HTTP 500"),
        (http_answer(b"", status="429 Slow Down"), Unavailable, "HTTP 429"),
        (http_answer(b"", status="404 Not Here"), FailedPrecondition, "HTTP 404"),
        (
            http_answer(b"", status="302 Elsewhere", headers={"location": "http://127.0.0.1:1/"}),
            FailedPrecondition,
            "302",
        ),
        (http_answer(b"yes"), FailedPrecondition, "no JudgeResponse"),
        (http_answer(b"[]"), FailedPrecondition, "without a decision"),
        (http_answer(b"{}"), FailedPrecondition, "without a decision"),
        (http_answer(b'{"decision": "maybe"}'), FailedPrecondition, "without a decision"),
        (http_answer(b'{"decision": ["allow"]}'), FailedPrecondition, "no JudgeResponse"),
        (http_answer(b'{"decision": "allow", "labels": "a"}'), FailedPrecondition, "no JudgeResponse"),
        (http_answer(b"[" * 60_000), FailedPrecondition, "no JudgeResponse"),
        (http_answer(b"\xff\xfe"), FailedPrecondition, "no JudgeResponse"),
        (http_answer(b" " * (ANSWER_LIMIT_BYTES + 1)), FailedPrecondition, "more than"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}", Unavailable, "HTTP|middle"),
        (b"SSH-2.0\r\n\r\n", Unavailable, "HTTP"),
        (b"", Unavailable, "without an answer|HTTP"),
    ],
)
async def test_what_is_no_answer_over_http_is_an_error(raw: bytes, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        await over_http(raw)


def signed(body: bytes, *, key: bytes = KEY, of: str = "request_1") -> bytes:
    return http_answer(body, headers=signature_headers(key, message_id=of, now_s=NOW_S, body=body))


async def test_an_answer_with_the_right_signature_is_believed() -> None:
    body = b'{"decision": "block"}'
    assert (await over_http(signed(body))).decision is Decision.BLOCK


@pytest.mark.parametrize(
    "raw",
    [
        signed(b'{"decision": "allow"}', key=b"x" * 32),
        signed(b'{"decision": "allow"}', of="request_2"),
        signed(b'{"decision": "block"}').replace(b'"block"', b'"allow"'),
    ],
)
async def test_an_answer_with_a_wrong_signature_is_none(raw: bytes) -> None:
    with pytest.raises(FailedPrecondition, match="wrong signature"):
        await over_http(raw)


async def test_a_hook_over_http_that_hangs_costs_its_timeout() -> None:
    async def hang(headers: Mapping[str, str], body: bytes) -> bytes:
        await asyncio.sleep(60)
        return b""

    async with http_hook(hang) as hook:
        with pytest.raises(Unavailable, match="no answer within"):
            await asking(hook.url, timeout_s=0.1).judge(QUESTION)


async def test_nobody_there_is_unavailable() -> None:
    for scheme in ("http", "grpc"):
        with pytest.raises(Unavailable):
            await asking(f"{scheme}://127.0.0.1:9").judge(QUESTION)


async def over_grpc(answer: moderation_pb2.JudgeResponse | grpc.StatusCode) -> ContentVerdict:
    async def say() -> moderation_pb2.JudgeResponse:
        if isinstance(answer, JUDGED):
            return answer
        raise grpc.aio.AbortError

    hook = GrpcHook(say)
    async with grpc_hook(hook) as url:
        return await asking(url).judge(QUESTION)


async def test_each_decision_is_understood_over_grpc_and_the_question_is_signed() -> None:
    hook_decisions = iter([JUDGED.DECISION_ALLOW, JUDGED.DECISION_FLAG, JUDGED.DECISION_BLUR, JUDGED.DECISION_BLOCK])

    async def say() -> moderation_pb2.JudgeResponse:
        return JUDGED(decision=next(hook_decisions), labels=["a"], reason="so")

    hook = GrpcHook(say)
    async with grpc_hook(hook) as url:
        asked = asking(url)
        told = [await asked.judge(QUESTION) for _ in range(4)]
        await asked.close()  # type: ignore[attr-defined]  # of the one over gRPC
    assert told == [ContentVerdict(decision=each, labels=("a",), reason="so") for each in Decision]
    assert (hook.asked[0].prompt, hook.asked[0].images[0].data) == ("a fox", b"png")
    expected = signature_headers(KEY, message_id="request_1", now_s=NOW_S, body=b"")
    assert expected.items() <= hook.metadata[0].items()


async def test_what_is_no_answer_over_grpc_is_an_error() -> None:
    with pytest.raises(FailedPrecondition, match="without a decision"):
        await over_grpc(JUDGED())
    with pytest.raises(FailedPrecondition, match="UNKNOWN"):
        await over_grpc(grpc.StatusCode.UNKNOWN)


async def test_a_hook_over_grpc_that_hangs_can_be_left() -> None:
    async def hang() -> moderation_pb2.JudgeResponse:
        await asyncio.sleep(60)
        return JUDGED()

    async with grpc_hook(GrpcHook(hang)) as url:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await asking(url).judge(QUESTION)


async def test_a_hook_inside_is_asked_only_where_the_operator_allows_it() -> None:
    def now_s() -> float:
        return NOW_S

    over_http = HttpModeration("http://127.0.0.1:9", WebhookHttp(()), KEY, now_s)
    over_grpc = GrpcModeration("127.0.0.1:9", is_secure=False, allowed=(), key=KEY, now_s=now_s, limit_bytes=1_000)
    for hook in (over_http, over_grpc):
        with pytest.raises(FailedPrecondition, match="internal address"):
            await hook.judge(QUESTION)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"moderation_url": "ftp://judge.example"}, "MODERATION_URL"),
        ({"moderation_url": "grpc://judge.example"}, "MODERATION_URL"),
        ({"moderation_url": "http://127.0.0.1/judge"}, "MODERATION_URL"),
        ({"moderation_url": "https://judge.example", "moderation_networks": "10.0.0.0/99"}, "MODERATION_NETWORKS"),
        ({"moderation_url": "https://judge.example", "moderation_secret": "whsec_!"}, "MODERATION_SECRET"),
    ],
)
def test_wrong_settings_of_the_moderation_are_named(changes: dict[str, str], setting: str) -> None:
    with pytest.raises(SettingsError, match=setting):
        moderation_of(GatewaySettings(**changes))


def test_the_settings_become_options() -> None:
    settings = GatewaySettings(
        moderation_url="grpcs://judge.example:443",
        moderation_secret=SECRET,
        moderation_failure="open",
        moderation_images="bytes",
        moderation_timeout_s=3,
        moderation_places=2,
    )
    found = moderation_of(settings)
    assert (found.timeout_s, found.fails_open, found.sends_bytes, found.places) == (3, True, True, 2)
    assert not moderation_of(GatewaySettings(moderation_url="https://judge.example")).fails_open
