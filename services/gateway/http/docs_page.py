"""/docs: the OpenAPI document as one page that loads nothing. Knows the document's form, none of our paths."""

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse

from services.gateway.http.schemas import Schema

# Nothing is loaded, nothing runs: not even an upload's name could make it.
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
    """The page is made when it is first asked for."""
    made: list[str] = []

    async def docs() -> HTMLResponse:
        if not made:
            made.append(page(app.openapi()))
        return HTMLResponse(made[0], headers=HEADERS)

    router = APIRouter()
    router.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.include_router(router)


def page(document: Schema) -> str:
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _words(info["description"]),
        '<p>The same for programs: <a href="/openapi.json">openapi.json</a>.</p>',
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
    """A paragraph; what stands between backticks is code."""
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
    """Cells are HTML."""
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{cells}</table>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _content(media_type: str, content: Schema) -> str:
    return f"{_code(media_type)} {_type(content.get('schema', {}))}"


def _type(schema: Any) -> str:
    """A type in a few words; another message is a link."""
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
