"""/openapi.json: FastAPI's description of the paths, with the schemas of our messages and errors."""

import json
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.http.schemas import Schema, Words, reference, schemas_of

MESSAGES = (
    gateway_pb2.CreateJobRequest,
    gateway_pb2.CreateJobsRequest,
    gateway_pb2.CreateJobsResponse,
    gateway_pb2.Job,
    gateway_pb2.JobExplanation,
    gateway_pb2.DeadLetter,
    gateway_pb2.ListDeadLettersResponse,
    gateway_pb2.Webhook,
    gateway_pb2.ListJobsResponse,
    gateway_pb2.ListAnnotatorsResponse,
    gateway_pb2.ListModelsResponse,
    gateway_pb2.ListWorkersResponse,
    gateway_pb2.TaskProgress,
)
DESCRIPTION = (
    "Stable Diffusion with ControlNet, served from many small machines. Bodies are the messages of the gRPC services "
    "as JSON, by the names of the protos: 64-bit numbers are texts, bytes are base64."
)


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": "number", "minimum": 0}
OWN_SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(
            reason={"type": "string", "examples": ["INVALID_FIELD"]},
            message=_TEXT,
            field={"type": "string", "examples": ["generation.controls[0].annotator"]},
            retry_after_s=_SECONDS,
        )
        | {"required": ["reason", "message"]}
    )
    | {"required": ["error"]},
    "Queue": _object(lines={"type": "array", "items": reference("QueueLine")}),
    "QueueLine": _object(
        stage=_TEXT, checkpoint=_TEXT, waiting=_COUNT, blocked=_COUNT, leased=_COUNT, oldest_age_s=_SECONDS
    ),
    "Status": _object(status=_TEXT),
}


def describe(app: FastAPI) -> None:
    """Let the application tell of itself; the document is made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=version("fanlight"), description=DESCRIPTION, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            # FastAPI's own shape of errors, which never leaves.
            operation["responses"].pop("422", None)
    document["components"] = {
        "schemas": schemas_of(MESSAGES, _words()) | OWN_SCHEMAS,
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{"token": []}, {}]
    return document


def _words() -> Words:
    """The protos' own comments, which `make protos` keeps beside the stubs."""
    said: dict[str, str] = json.loads(files("fanlight").joinpath("words.json").read_text())

    def words(message: str, field: str) -> str:
        name = f".{field}" if field else ""
        return said.get(message + name, "")

    return words
