"""The operator's moderation: what can be judged of a stage's request, and its questions and answers as messages."""

import json

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import DecodeError, Message

from fanlight.contract.images import images_of
from fanlight.contract.names import DEFAULT_SCOPE
from fanlight.errors import FailedPrecondition
from fanlight.moderation.v1 import moderation_pb2
from services.gateway.app.moderation import Content
from services.gateway.domain.job import StageRequest
from services.gateway.domain.moderation import ContentVerdict, Decision, verdict_of
from services.gateway.ports import JudgedImage, Question
from services.gateway.wire.images import blob
from services.gateway.wire.stages import STAGES

_DECISIONS = {
    moderation_pb2.JudgeResponse.DECISION_ALLOW: Decision.ALLOW,
    moderation_pb2.JudgeResponse.DECISION_FLAG: Decision.FLAG,
    moderation_pb2.JudgeResponse.DECISION_BLUR: Decision.BLUR,
    moderation_pb2.JudgeResponse.DECISION_BLOCK: Decision.BLOCK,
}
_PREFIX = "DECISION_"


def content_of(request: StageRequest) -> Content:
    """Nothing of a stage that this gateway does not know."""
    stage = STAGES.get(request.stage)
    try:
        message = stage.request_type.FromString(request.message) if stage else None
    except DecodeError:
        message = None
    if message is None:
        return Content()
    images = [(field, image.blob) for field, image in images_of(message) if image.HasField("blob")]
    return Content(
        prompt=_text(message, "prompt"),
        negative_prompt=_text(message, "negative_prompt"),
        images=tuple((f"{request.field}.{field}", each.scope or DEFAULT_SCOPE, each.digest) for field, each in images),
    )


def _text(message: Message, name: str) -> str:
    found = getattr(message, name, "")
    return found if isinstance(found, str) else ""


def question(value: Question) -> moderation_pb2.JudgeRequest:
    phase = moderation_pb2.JudgeRequest.PHASE_RESULT if value.job else moderation_pb2.JudgeRequest.PHASE_REQUEST
    return moderation_pb2.JudgeRequest(
        id=value.id,
        phase=phase,
        tenant=value.tenant,
        job=value.job,
        task=value.task,
        stage=value.stage,
        prompt=value.prompt,
        negative_prompt=value.negative_prompt,
        images=[_image(each) for each in value.images],
        policy=value.policy,
        nsfw=value.nsfw,
    )


def _image(value: JudgedImage) -> moderation_pb2.JudgedImage:
    return moderation_pb2.JudgedImage(field=value.field, blob=blob(value.blob), data=value.data)


def verdict(message: moderation_pb2.JudgeResponse) -> ContentVerdict:
    """FailedPrecondition for an answer without a decision."""
    decision = _DECISIONS.get(message.decision)
    if decision is None:
        raise FailedPrecondition("answers without a decision")
    return verdict_of(decision, list(message.labels), message.reason)


def body(value: Question) -> bytes:
    """The question as JSON."""
    message = MessageToDict(question(value), preserving_proto_field_name=True)
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


def verdict_of_body(data: bytes) -> ContentVerdict:
    """A decision may also be written as `allow`. FailedPrecondition for what is no answer."""
    message = moderation_pb2.JudgeResponse()
    try:
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(named := found.get("decision"), str):
            found["decision"] = _PREFIX + named.upper().removeprefix(_PREFIX)
        ParseDict(found, message, ignore_unknown_fields=True)
    except (ValueError, ParseError, RecursionError, AttributeError, TypeError) as error:
        raise FailedPrecondition("answers with what is no JudgeResponse in JSON") from error
    return verdict(message)
