"""/openapi.json is whole: every reference leads somewhere inside it."""

import re
from collections.abc import Iterator
from typing import Any

import httpx


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


async def test_every_reference_leads_inside_the_document(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    found = set(references(document))
    assert "#/components/schemas/CreateJobRequest" in found
    for reference in found:
        place: Any = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


async def test_every_schema_is_used(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    used = {reference.rsplit("/", 1)[1] for reference in references(document)}
    # Said in the words of the event stream's description.
    assert document["components"]["schemas"].keys() - used == {"TaskProgress"}


async def test_messages_are_described_as_their_json_is(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    generation = schemas["GenerateRequest"]["properties"]
    assert generation["prompt"]["type"] == "string"
    assert (generation["seed"]["type"], generation["seed"]["format"]) == ("string", "uint64")
    assert generation["controls"] == {"type": "array", "items": {"$ref": "#/components/schemas/Control"}}
    assert schemas["Control"]["properties"]["parameters"]["type"] == "object"
    assert "STATE_SUCCEEDED" in schemas["Job"]["properties"]["state"]["enum"]
    assert schemas["Job"]["properties"]["create_time"]["format"] == "date-time"
    assert schemas["ImageSource"]["properties"]["data"]["format"] == "byte"


async def test_fields_are_described_in_the_words_of_the_protos(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    generation = schemas["GenerateRequest"]["properties"]
    assert (
        generation["count"]["description"]
        == "How many images, 1 to 32. Absent means 1. A call to a worker makes one image."
    )
    assert "Absent means the checkpoint's default, else 20." in generation["steps"]["description"]
    assert "to start from" in generation["image"]["description"]
    assert schemas["ImageSource"]["properties"]["data"]["description"] == "The encoded bytes. Base64."
    assert "At most one of" in schemas["ImageSource"]["description"]


async def test_every_operation_lists_its_answers_and_our_shape_of_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (path, method)
            assert "422" not in operation["responses"]
            error = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert error == {"$ref": "#/components/schemas/Error"}


async def test_the_docs_page_lists_every_path_and_message_and_loads_nothing(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    response = await client.get("/docs")
    assert response.status_code == 200
    for path in document["paths"]:
        assert f"<code>{path}</code>" in response.text
    for name in document["components"]["schemas"]:
        assert f'id="{name}"' in response.text
    assert "<script" not in response.text
    # The one other address is a link to our own document.
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', response.text)) == {"/openapi.json"}
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
