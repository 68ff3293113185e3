"""What webhooks are told, and what is told of them."""

import json
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.jobs.deliveries import Delivery, DeliveryState, Try
from services.gateway.jobs.model import Job
from services.gateway.wire import answers

_STATES = {
    DeliveryState.PENDING: gateway_pb2.Webhook.STATE_PENDING,
    DeliveryState.DELIVERED: gateway_pb2.Webhook.STATE_DELIVERED,
    DeliveryState.GIVEN_UP: gateway_pb2.Webhook.STATE_GIVEN_UP,
}


def payload(job: Job) -> bytes:
    """As Standard Webhooks lays a body out; `data` is the job as the HTTP API shows it."""
    body = {
        "type": f"job.{job.state.value}",
        "timestamp": datetime.fromtimestamp(job.end_time_s, UTC).isoformat(),
        "data": MessageToDict(answers.job(job), preserving_proto_field_name=True),
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def webhook(delivery: Delivery) -> gateway_pb2.Webhook:
    return gateway_pb2.Webhook(
        id=delivery.id,
        job=f"jobs/{delivery.job_id}",
        url=delivery.url,
        state=_STATES[delivery.state],
        next_time=answers.moment(delivery.next_s),
        tries=[_try(each) for each in delivery.tries],
    )


def _try(value: Try) -> gateway_pb2.WebhookTry:
    return gateway_pb2.WebhookTry(
        try_time=answers.moment(value.time_s), status=value.status, error=value.error, duration_s=value.duration_s
    )
