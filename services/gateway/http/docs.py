"""What /openapi.json and /docs say about each path, and /docs itself: one page that loads nothing."""

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from starlette.responses import HTMLResponse

from services.gateway.http.openapi import Schema, reference

Document = dict[Any, Any]

_CANNY_JOB = {
    "request_id": "order-17",
    "generation": {
        "prompt": "a red teapot on a wooden table",
        "count": 4,
        "seed": 7,
        "controls": [{"annotator": "canny", "parameters": {"low_threshold": 100}, "image": {"url": "part:photo"}}],
    },
}
_DIGEST = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
_CREATE_EXAMPLES = {
    "text only": {"value": {"generation": {"prompt": "a red teapot on a wooden table", "count": 2}}},
    "a blob": {
        "value": {
            "generation": {
                "prompt": "a red teapot",
                "controls": [{"annotator": "canny", "image": {"blob": {"digest": _DIGEST}}}],
            }
        }
    },
    "a data URL": {
        "value": {"annotation": {"annotator": "canny", "image": {"url": "data:image/png;base64,iVBORw0KGgo..."}}}
    },
}
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_ANY_BYTES = {"*/*": _BYTES}


def _json(name: str, description: str) -> Document:
    return {"description": description, "content": {"application/json": {"schema": reference(name)}}}


_ERRORS = {
    400: _json("Error", "A field is wrong; `field` names it."),
    401: _json("Error", "The token is missing or wrong."),
    403: _json("Error", "You may not do this."),
    404: _json("Error", "Something that the request names does not exist."),
    409: _json("Error", "`request_id` was used with other content."),
    413: _json("Error", "More bytes than a limit allows."),
    415: _json("Error", "`Content-Encoding` is neither `gzip` nor `identity`."),
    429: _json("Error", "A limit is reached; `Retry-After` says when to try again."),
    503: _json("Error", "Starting, draining, no worker yet, or a disk of the gateway is full or fails."),
    504: _json("Error", "Not done in the time that was given."),
}


def _document(
    summary: str, answers: Document, *, errors: tuple[int, ...], description: str = "", body: Document | None = None
) -> Document:
    """Arguments of `add_api_route`."""
    document: Document = {
        "summary": summary,
        "description": description or None,
        "responses": answers | {status: _ERRORS[status] for status in (400, 401, *errors)},
        "response_class": Response,
        "response_model": None,
        "status_code": min(answers),
    }
    if body is not None:
        document["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return document


CREATE_JOB = _document(
    "Create a job",
    {201: _json("Job", "The job. It is durable and will end.")},
    errors=(403, 404, 409, 413, 415, 429, 503),
    description="Images are blobs written before, as `data:` URLs, or as files of a form: then the form has a"
    " part `job` with the JSON, and an image's `url` is `part:NAME` for the part of that name. No other URL is"
    " fetched. The body may be gzip, named by `Content-Encoding`; limits are those of the inflated body. Repeating a"
    " request with the same `request_id` or `Idempotency-Key` and the same content returns the"
    " original job.",
    body={
        "application/json": {"schema": reference("CreateJobRequest"), "examples": _CREATE_EXAMPLES},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["job"],
                "properties": {"job": reference("CreateJobRequest")},
                "additionalProperties": {"type": "string", "format": "binary"},
            },
            "example": {"job": _CANNY_JOB, "photo": "(the file)"},
        },
    },
)
GET_JOB = _document("Show a job", {200: _json("Job", "The job when it ends, or the wait.")}, errors=(404,))
LIST_JOBS = _document("List jobs, newest first", {200: _json("ListJobsResponse", "A page of jobs.")}, errors=())
CANCEL_JOB = _document(
    "Cancel a job's unfinished tasks",
    {200: _json("Job", "The job. A job that had ended stays as it was.")},
    errors=(404,),
)
DELETE_JOB = _document(
    "Delete a job",
    {200: _json("DeleteJobResponse", "How many blobs were deleted with it. A running job is cancelled first.")},
    errors=(404,),
)
EXPLAIN_JOB = _document(
    "Explain why a job waits",
    {200: _json("JobExplanation", "Where its tasks are planned, when they should be done, and why not elsewhere.")},
    errors=(404,),
)
WATCH_JOB = _document(
    "Watch a job",
    {
        200: {
            "description": "Server-sent events: `job` with the whole job as data and its revision as id, `progress`"
            " with a TaskProgress and no id. Ends when the job has ended.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The job has ended, and `Last-Event-ID` was its last state."},
    },
    errors=(404,),
    description="Send `Last-Event-ID` to continue after a state; browsers do so by themselves.",
)
WRITE_BLOB = _document(
    "Store bytes",
    {201: _json("Blob", "The blob. Storing the same bytes again returns the same blob.")},
    errors=(413, 415, 429, 503),
    description="The body is the bytes themselves, or a form with one file; gzip is inflated if `Content-Encoding`"
    " names it.",
    body=_ANY_BYTES | {"multipart/form-data": {"schema": {"type": "object", "properties": {"file": _BYTES["schema"]}}}},
)
READ_BLOB = _document(
    "Fetch bytes",
    {
        200: {"description": "All of them.", "content": _ANY_BYTES},
        206: {"description": "The byte range that `Range` requests.", "content": _ANY_BYTES},
        304: {"description": "`If-None-Match` names it."},
        307: {"description": "With `redirect`, if blobs are stored in S3: a signed address of the bytes that expires."},
        416: _json("Error", "`Range` starts past the end."),
    },
    errors=(404,),
    description="A blob never changes: caches may keep it forever.",
)
ANNOTATE = _document(
    "Make a control image",
    {
        200: {
            "description": "The control image. `Fanlight-Job` names the job, `Server-Timing` reports where time went.",
            "content": {"image/png": _BYTES},
        }
    },
    errors=(403, 404, 413, 415, 429, 503, 504),
    description="The body is the image. Query parameters that are not listed here are the annotator's own; see"
    " `/v1/annotators`.",
    body={"image/*": _BYTES},
)
LIST_ANNOTATORS = _document(
    "List annotators", {200: _json("ListAnnotatorsResponse", "Those that some worker offers.")}, errors=()
)
LIST_MODELS = _document(
    "List models", {200: _json("ListModelsResponse", "Those that some worker offers.")}, errors=(400, 403)
)
LIST_WORKERS = _document(
    "List workers", {200: _json("ListWorkersResponse", "Workers that asked for work lately.")}, errors=()
)
CREATE_JOBS = _document(
    "Create up to 100 jobs",
    {200: _json("CreateJobsResponse", "A job or an error for each request, in order.")},
    errors=(413,),
    description="Each request succeeds or fails by itself. Images are blobs or `data:` URLs.",
    body={"application/json": {"schema": reference("CreateJobsRequest")}},
)
GET_WEBHOOK = _document(
    "Show the delivery log of a job's webhook",
    {200: _json("Webhook", "Every try, and the time of the next one.")},
    errors=(404,),
)
LIST_DEAD_LETTERS = _document(
    "List dead letters",
    {200: _json("ListDeadLettersResponse", "Tasks whose attempts are spent, those of the newest jobs first.")},
    errors=(),
)
GET_DEAD_LETTER = _document(
    "Show a dead letter", {200: _json("DeadLetter", "With every attempt's node and reason.")}, errors=(404,)
)
REDRIVE_DEAD_LETTER = _document(
    "Try a dead letter's job again",
    {200: _json("Job", "The job, waiting again. What was finished stays finished.")},
    errors=(404, 409),
)
LIST_NODES = _document(
    "List nodes", {200: _json("ListNodesResponse", "Those that joined last first.")}, errors=(400, 403)
)
GET_NODE = _document("Show a node", {200: _json("Node", "Who it is and what it may do.")}, errors=(403, 404))
DRAIN_NODE = _document(
    "Drain a node",
    {200: _json("Node", "Its workers finish what they lease, and are leased no more tasks.")},
    errors=(403, 404),
)
UNDRAIN_NODE = _document(
    "End a node's draining", {200: _json("Node", "Its workers are leased tasks again.")}, errors=(403, 404)
)
REVOKE_NODE = _document(
    "Revoke a node",
    {200: _json("Node", "Its credentials and leases have ended; cached control images that it made are dropped.")},
    errors=(400, 403, 404),
)
PURGE_NODE = _document(
    "Drop the cached control images of a node", {200: _json("PurgeNodeResponse", "How many.")}, errors=(403, 404)
)
REMOVE_NODE = _document(
    "Forget a revoked or expired node", {200: _json("RemoveNodeResponse", "Nothing more.")}, errors=(403, 404, 409)
)
LIST_AUDIT_ENTRIES = _document(
    "List the audit log",
    {
        200: {
            "description": "CloudEvents, one a line, the newest first. The header `Next-Page-Token` has the token of"
            " the next page. With `follow`, entries as they are written, until the connection ends.",
            "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        }
    },
    errors=(403, 429),
)
LIST_AUDIT_CHAINS = _document(
    "List the chains of the audit log", {200: _json("ListAuditChainsResponse", "How far each reaches.")}, errors=(403,)
)
DELETE_BLOB = _document(
    "Delete a blob, and the cached control images made of it",
    {200: _json("DeleteBlobResponse", "How many blobs were deleted.")},
    errors=(404, 409),
)
GET_QUOTA = _document(
    "Show a tenant's limits", {200: _json("Quota", "Each limit, and how much of it is used.")}, errors=(403,)
)
LIST_TENANTS = _document("List tenants", {200: _json("ListTenantsResponse", "By name.")}, errors=(403,))
GET_TENANT = _document("Show a tenant", {200: _json("Tenant", "What it is granted.")}, errors=(403,))
SET_TENANT = _document(
    "Change what a tenant is granted",
    {200: _json("Tenant", "As it is now. What the body leaves out stays.")},
    errors=(403, 429),
    body={"application/json": {"schema": reference("SetTenantRequest")}},
)
DELETE_TENANT = _document(
    "Delete a tenant, its data and its data key",
    {200: _json("DeleteTenantResponse", "What was deleted, and what remains.")},
    errors=(403, 409),
)
ROTATE_DATA_KEY = _document(
    "Give a tenant a new data key",
    {200: _json("RotateDataKeyResponse", "The new key's number.")},
    errors=(403, 404, 409),
)
GET_SEALING = _document(
    "Show what is sealed, with which keys, and what is still in clear",
    {200: _json("Sealing", "All of it, by tenant.")},
    errors=(403,),
)
CREATE_KEY = _document(
    "Create an API key",
    {201: _json("CreateKeyResponse", "The key, and its secret, which is shown this once.")},
    errors=(400, 403, 409, 429),
    body={"application/json": {"schema": reference("CreateKeyRequest")}},
)
LIST_KEYS = _document("List API keys", {200: _json("ListKeysResponse", "The newest first.")}, errors=(400, 403))
GET_KEY = _document("Show an API key", {200: _json("Key", "The key.")}, errors=(403, 404))
ROTATE_KEY = _document(
    "Replace an API key",
    {201: _json("CreateKeyResponse", "The new key; the old one ends after the overlap.")},
    errors=(400, 403, 404, 409),
    body={"application/json": {"schema": reference("RotateKeyRequest")}},
)
REVOKE_KEY = _document(
    "Revoke an API key", {200: _json("Key", "It and its sessions have ended, everywhere.")}, errors=(403, 404)
)
OPEN_SESSION = _document(
    "Sign in at a browser",
    {201: _json("Key", "The session. Its secret is in the cookie alone.")},
    errors=(400, 403, 429, 503),
    body={"application/json": {"schema": reference("OpenSessionRequest")}},
)
CLOSE_SESSION = _document("Sign out", {200: _json("OpenSessionRequest", "Nothing more.")}, errors=(503,))
LIST_DAMAGED_RECORDS = _document(
    "List damaged records",
    {200: _json("ListDamagedRecordsResponse", "Records of the store that cannot be read. For the operator.")},
    errors=(503,),
)
GET_DAMAGED_RECORD = _document(
    "Show a damaged record", {200: _json("DamagedRecord", "With its first bytes, in base64.")}, errors=(404, 503)
)
REMOVE_DAMAGED_RECORD = _document(
    "Remove a damaged record", {200: _json("DamagedRecord", "What was removed, for good.")}, errors=(404, 503)
)
QUEUE = _document(
    "Show how much waits", {200: _json("Queue", "Tasks by stage and checkpoint, and the oldest one's age.")}, errors=()
)
METRICS = _document(
    "Metrics for Prometheus",
    {
        200: {
            "description": "Queue and workers; the operator's has the cache too.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
    errors=(),
)
HEALTHZ = _document("Check that the process answers", {200: _json("Status", "It answers.")}, errors=())
READYZ = _document("Check that requests may be sent", {200: _json("Status", "They may be sent.")}, errors=(503,))


# The page loads nothing and runs no script, not even one hidden in a string of the document.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
h2 { border-top: 1px solid #ddd; margin-top: 2rem; padding-top: 1rem; font-size: 1.1rem }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f5f5f5 }
pre { padding: .75rem; overflow: auto } table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
.method { color: #06c; text-transform: uppercase }
"""


def install(app: FastAPI) -> None:
    """The page is made at the first request for it."""
    made: list[str] = []

    async def docs() -> HTMLResponse:
        if not made:
            made.append(page(app.openapi()))
        return HTMLResponse(made[0], headers=HEADERS)

    router = APIRouter()
    router.add_api_route("/docs", docs, methods=["GET", "HEAD"], include_in_schema=False)
    app.include_router(router)


def page(document: Schema) -> str:
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _words(info["description"]),
        '<p>For programs: <a href="/openapi.json">openapi.json</a>.</p>',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body += _operation(path, method, operation)
    body.append("<h1>Messages</h1>")
    for name, schema in document["components"]["schemas"].items():
        body += _message(name, schema)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


def _words(text: str) -> str:
    """A paragraph; text between backticks is code."""
    parts = escape(text).split("`")
    return "<p>" + "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)) + "</p>"


def _operation(path: str, method: str, operation: Schema) -> Iterator[str]:
    yield f'<h2><span class="method">{escape(method)}</span> <code>{escape(path)}</code></h2>'
    yield _words(operation.get("summary", ""))
    if description := operation.get("description"):
        yield _words(description)
    if parameters := operation.get("parameters"):
        yield _table(
            ("parameter", "in", ""),
            [(_code(each["name"]), escape(each["in"]), _words(each.get("description", ""))) for each in parameters],
        )
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Takes {_content(media_type, content)}</p>"
        for name, example in content.get("examples", {}).items():
            yield f"<p>{escape(name)}:</p><pre>{escape(json.dumps(example['value'], indent=2))}</pre>"
    responses = operation.get("responses", {})
    yield _table(("answer", "", ""), [_answer(str(status), response) for status, response in responses.items()])


def _answer(status: str, response: Schema) -> tuple[str, ...]:
    kinds = (_content(media_type, content) for media_type, content in response.get("content", {}).items())
    return escape(status), _words(response.get("description", "")), "; ".join(kinds)


def _message(name: str, schema: Schema) -> Iterator[str]:
    yield f'<h2 id="{escape(name)}">{escape(name)}</h2>'
    if description := schema.get("description"):
        yield _words(description)
    fields = schema.get("properties", {})
    yield _table(
        ("field", "", ""),
        [(_code(field), _type(each), _words(each.get("description", ""))) for field, each in fields.items()],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{cells}</table>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _content(media_type: str, content: Schema) -> str:
    return f"{_code(media_type)} {_type(content.get('schema', {}))}"


def _type(schema: Any) -> str:
    """A short description of a type; a message is a link."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if "enum" in schema:
        return "one of " + ", ".join(_code(str(each)) for each in schema["enum"])
    if "properties" in schema:
        return ", ".join(f"{_code(name)} {_type(each)}" for name, each in schema["properties"].items())
    return escape(" ".join(str(schema[key]) for key in ("type", "format") if key in schema))
