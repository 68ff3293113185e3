"""What /docs says about each path. Words only: nothing here changes how a request is answered."""

from typing import Any

from fastapi.responses import Response

from services.gateway.http.schemas import reference

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
    404: _json("Error", "Something that the request names does not exist."),
    409: _json("Error", "`request_id` was used with other content."),
    413: _json("Error", "More bytes than a limit allows."),
    429: _json("Error", "No room just now; `Retry-After` says when to ask again."),
    503: _json("Error", "Starting, draining, or no worker yet."),
    504: _json("Error", "Not done in the time it was given."),
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
    errors=(404, 409, 413, 429, 503),
    description="Images come as blobs written before, as `data:` URLs, or as files of a form: then the form has a"
    " part `job` with the JSON, and an image's `url` is `part:NAME` for the file part of that name. No other URL is"
    " fetched. The same `request_id`, or `Idempotency-Key`, with the same content answers with the first job.",
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
GET_JOB = _document("Show a job", {200: _json("Job", "The job, ended if it did so in time.")}, errors=(404,))
LIST_JOBS = _document("List jobs, newest first", {200: _json("ListJobsResponse", "A page of jobs.")}, errors=())
CANCEL_JOB = _document(
    "Cancel what has not ended",
    {200: _json("Job", "The job. One that had ended stays as it was.")},
    errors=(404,),
)
EXPLAIN_JOB = _document(
    "Say why a job waits",
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
    description="Send `Last-Event-ID` to go on after a state; browsers do so by themselves.",
)
WRITE_BLOB = _document(
    "Keep bytes",
    {201: _json("Blob", "The blob. Keeping the same bytes again gives the same.")},
    errors=(413, 429),
    description="The body is the bytes themselves, or a form with one file.",
    body=_ANY_BYTES | {"multipart/form-data": {"schema": {"type": "object", "properties": {"file": _BYTES["schema"]}}}},
)
READ_BLOB = _document(
    "Fetch bytes",
    {
        200: {"description": "All of them.", "content": _ANY_BYTES},
        206: {"description": "The part that `Range` asks for.", "content": _ANY_BYTES},
        304: {"description": "`If-None-Match` names it."},
        307: {
            "description": "With `redirect`, where blobs are kept in S3: an address that gives the bytes for a while."
        },
        416: _json("Error", "`Range` lies past the end."),
    },
    errors=(404,),
    description="A blob never changes: caches may keep it for ever.",
)
ANNOTATE = _document(
    "Make a control image",
    {
        200: {
            "description": "The control image. `Fanlight-Job` names the job, `Server-Timing` tells where time went.",
            "content": {"image/png": _BYTES},
        }
    },
    errors=(404, 413, 429, 503, 504),
    description="The body is the picture. Query parameters that are not listed here are the annotator's own; see"
    " `/v1/annotators`.",
    body={"image/*": _BYTES},
)
LIST_ANNOTATORS = _document(
    "List annotators", {200: _json("ListAnnotatorsResponse", "What some worker offers.")}, errors=()
)
LIST_MODELS = _document("List models", {200: _json("ListModelsResponse", "What some worker offers.")}, errors=())
LIST_WORKERS = _document(
    "List workers", {200: _json("ListWorkersResponse", "Those that asked for work lately.")}, errors=()
)
CREATE_JOBS = _document(
    "Create up to 100 jobs",
    {200: _json("CreateJobsResponse", "A job or why there is none, for each request in order.")},
    errors=(413,),
    description="Each for itself: one that is refused leaves the others be. Images come as blobs or `data:` URLs.",
    body={"application/json": {"schema": reference("CreateJobsRequest")}},
)
GET_WEBHOOK = _document(
    "Show the delivery log of a job's webhook",
    {200: _json("Webhook", "Every try, and when the next one comes.")},
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
    "Try a dead letter's job anew",
    {200: _json("Job", "The job, waiting again. What was finished stays finished.")},
    errors=(404, 409),
)
QUEUE = _document(
    "How much waits", {200: _json("Queue", "Tasks by stage and checkpoint, and the oldest one's age.")}, errors=()
)
METRICS = _document(
    "Figures for Prometheus",
    {200: {"description": "Cache, queue and workers.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    errors=(),
)
HEALTHZ = _document("The process answers", {200: _json("Status", "It does.")}, errors=())
READYZ = _document("Requests may be sent", {200: _json("Status", "They may.")}, errors=(503,))
