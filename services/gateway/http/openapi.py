"""/openapi.json: FastAPI's description of the paths, with JSON schemas of our messages and errors.

The schemas follow proto3's JSON mapping.
"""

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fanlight.audit_log.v1 import audit_log_pb2
from fanlight.blobs.v1 import blobs_pb2
from fanlight.gateway.v1 import gateway_pb2
from fanlight.keys.v1 import keys_pb2
from fanlight.nodes.v1 import nodes_pb2
from fanlight.records.v1 import records_pb2
from fanlight.tenants.v1 import tenants_pb2

Schema = dict[str, Any]
# Its two implementations have no type in common.
Descriptor = Any
# The comment on a message, by its full name, or on one of its fields; empty for no comment.
Words = Callable[[str, str], str]

_SCALARS: dict[int, Schema] = {
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1},
    # Strings, because JavaScript's numbers are exact only up to 2 to the 53rd. Numbers are accepted too.
    FieldDescriptor.CPPTYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "string", "format": "uint64"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
}
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.Value": {"description": "Any JSON value."},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "required": ["@type"],
        "additionalProperties": True,
    },
}


def reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def schemas_of(messages: Iterable[type[Message]], words: Words) -> dict[str, Schema]:
    """The schemas of the messages and of all that they contain, by the messages' short names."""
    found: dict[str, Descriptor] = {}
    waiting: list[Descriptor] = [message.DESCRIPTOR for message in messages]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in _WELL_KNOWN:
            continue
        if descriptor.name in found:
            assert found[descriptor.name].full_name == descriptor.full_name, f"two messages are named {descriptor.name}"
            continue
        found[descriptor.name] = descriptor
        waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    return {name: _of_message(found[name], words) for name in sorted(found)}


def _of_message(descriptor: Descriptor, words: Words) -> Schema:
    empty = GetMessageClass(descriptor)()
    properties = {
        field.name: _with_description(words(descriptor.full_name, field.name), _of_field(empty, field))
        for field in descriptor.fields
    }
    schema: Schema = {"type": "object", "title": descriptor.name, "properties": properties}
    schema["additionalProperties"] = False
    choices = [
        f"At most one of {', '.join(f'`{field.name}`' for field in oneof.fields)}."
        for oneof in descriptor.oneofs
        if len(oneof.fields) > 1
    ]
    return _with_description(" ".join([words(descriptor.full_name, ""), *choices]).strip(), schema)


def _with_description(text: str, schema: Schema) -> Schema:
    """With the text before the schema's own description."""
    whole = " ".join(filter(None, [text, schema.get("description", "")]))
    return schema | ({"description": whole} if whole else {})


def _of_field(empty: Message, field: Descriptor) -> Schema:
    one = _of_one(field)
    # Only repeated fields have values that can be extended.
    return {"type": "array", "items": one} if hasattr(getattr(empty, field.name), "extend") else one


def _of_one(field: Descriptor) -> Schema:
    if field.message_type is not None:
        name = field.message_type.full_name
        return dict(_WELL_KNOWN[name]) if name in _WELL_KNOWN else reference(field.message_type.name)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "format": "byte", "description": "Base64."}
    return dict(_SCALARS.get(field.cpp_type, {"type": "string"}))


MESSAGES = (
    audit_log_pb2.ListAuditChainsResponse,
    blobs_pb2.DeleteBlobResponse,
    gateway_pb2.CreateJobRequest,
    gateway_pb2.CreateJobsRequest,
    gateway_pb2.CreateJobsResponse,
    gateway_pb2.DeleteJobResponse,
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
    tenants_pb2.DeleteTenantResponse,
    tenants_pb2.ListTenantsResponse,
    tenants_pb2.Quota,
    tenants_pb2.RotateDataKeyResponse,
    tenants_pb2.Sealing,
    tenants_pb2.SetTenantRequest,
    tenants_pb2.Tenant,
    keys_pb2.CreateKeyRequest,
    keys_pb2.CreateKeyResponse,
    keys_pb2.Key,
    keys_pb2.ListKeysResponse,
    keys_pb2.OpenSessionRequest,
    keys_pb2.RotateKeyRequest,
    nodes_pb2.ListNodesResponse,
    nodes_pb2.Node,
    nodes_pb2.PurgeNodeResponse,
    nodes_pb2.RemoveNodeResponse,
    records_pb2.DamagedRecord,
    records_pb2.ListDamagedRecordsResponse,
)
DESCRIPTION = (
    "Stable Diffusion with ControlNet, served from many small machines. Bodies are the messages of the gRPC services "
    "as JSON, by the names of the protos: 64-bit numbers are strings, bytes are base64."
)


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": "number", "minimum": 0}
OWN_SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(
            reason={"type": "string", "examples": ["INVALID_FIELD"]},
            message=_STRING,
            field={"type": "string", "examples": ["generation.controls[0].annotator"]},
            retry_after_s=_SECONDS,
        )
        | {"required": ["reason", "message"]}
    )
    | {"required": ["error"]},
    "Queue": _object(lines={"type": "array", "items": reference("QueueLine")}),
    "QueueLine": _object(
        stage=_STRING, checkpoint=_STRING, waiting=_COUNT, blocked=_COUNT, leased=_COUNT, oldest_age_s=_SECONDS
    ),
    "Status": _object(status=_STRING),
}


def describe(app: FastAPI) -> None:
    """Let the application describe itself; the document is made at the first request for it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=version("fanlight"), description=DESCRIPTION, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            # FastAPI's own shape of errors, which is never sent.
            operation["responses"].pop("422", None)
    document["components"] = {
        "schemas": schemas_of(MESSAGES, _words()) | OWN_SCHEMAS,
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{"token": []}, {}]
    return document


def _words() -> Words:
    """The protos' own comments, which `make protos` writes beside the stubs."""
    comments: dict[str, str] = json.loads(files("fanlight").joinpath("words.json").read_text())

    def words(message: str, field: str) -> str:
        name = f".{field}" if field else ""
        return comments.get(message + name, "")

    return words
