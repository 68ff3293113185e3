"""JSON of any form, from hubs, mirrors, operators and the index, is a typed error or left out; it stops nothing."""

import json
import os
import sqlite3
from types import SimpleNamespace

import pytest

from fanlight.errors import FailedPrecondition, FanlightError, InvalidField, NodeFault, NotFound
from services.weights.mirror.mirrors import read_mirrors
from services.weights.planning.resolve import Resolver
from services.weights.provision import Provision
from services.weights.references.catalog import Catalog, with_folder
from services.weights.references.manifest import manifest_from_json
from services.weights.settings import WeightsSettings
from services.weights.store.index import INDEX_FILE, Index

ENTRY = {"name": "one", "view": "some/one", "kind": "lora", "files": [{"path": "a.safetensors", "bytes": 1}]}
CATALOG = {"entries": [ENTRY], "aliases": {}, "profiles": {}, "packed": {}, "tensor_tables": {}}
STRANGE = (None, True, -1, 1e999, 10**400, "text", "\ud800", [], [1], [[None]], {}, {"a": 1})
DEEP = b'{"entries":' + b"[" * 100_000


def documents():
    """The catalog with a strange value in each place, one at a time."""
    for value in STRANGE:
        yield value
        yield from ({**CATALOG, key: value} for key in CATALOG)
        yield {**CATALOG, "packed": {"0" * 64: value}, "tensor_tables": {"0" * 64: value}}
        yield from ({**CATALOG, "entries": [{**ENTRY, key: value}]} for key in ENTRY)
        yield from (
            {**CATALOG, "entries": [{**ENTRY, "files": [{**ENTRY["files"][0], key: value}]}]}
            for key in ("path", "bytes", "sha256", "sources", "chunks", "packed", "tensors")
        )


async def test_no_catalog_of_a_mirror_stops_fetching(tmp_path):
    bodies = [json.dumps(each).encode() for each in documents()] + [DEEP, b"", b"\xff", b"<html>"]

    class Web:
        async def body(self, url, *, limit_bytes):
            return bodies[-1], None

    async def address(base):
        return base

    while bodies:
        found = await read_mirrors(
            ["https://mirror.example"], web=Web(), address=address, cache=tmp_path, is_offline=False
        )
        assert isinstance(found, Catalog)
        bodies.pop()


def test_no_file_among_the_operators_catalogs_is_a_crash(tmp_path):
    file = tmp_path / "own.json"
    for document in documents():
        file.write_text(json.dumps(document))
        try:
            with_folder(Catalog(), tmp_path)
        except FanlightError:
            continue
    file.write_bytes(DEEP)
    with pytest.raises(FailedPrecondition, match=r"own\.json is not a catalog file"):
        with_folder(Catalog(), tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FailedPrecondition, match="no ordinary file"):
        with_folder(Catalog(), tmp_path)


@pytest.mark.parametrize("reference", ["hf:some/one", "urn:air:sd1:lora:civitai:1@2", "urn:air:sd1:lora:civitai:1"])
async def test_no_answer_of_a_hub_is_an_internal_error(reference):
    answers = [
        *STRANGE,
        *({"siblings": [value]} for value in STRANGE),
        *({"siblings": [{"rfilename": "a.safetensors", "size": value, "lfs": value}]} for value in STRANGE),
        *({"siblings": [{"rfilename": value}], "tags": value, "sha": value} for value in STRANGE),
        *({"files": value, "model": value, "modelVersions": value} for value in STRANGE),
        *({"files": [{"name": "a.safetensors", "sizeKB": value, "hashes": value}]} for value in STRANGE),
        *({"modelVersions": [{"id": value}]} for value in STRANGE),
    ]

    async def call(work, *_):
        return await work()

    failed = 0
    for answer in answers:

        async def told(url, answer=answer):
            return answer, {}

        tools = SimpleNamespace(web=SimpleNamespace(json=told), retry_probe=call)
        resolver = Resolver(tools=tools, catalog=Catalog(), settings=WeightsSettings())
        try:
            await resolver.manifest(reference)
        except FanlightError as error:
            failed += error.part.startswith("source:") or isinstance(error, InvalidField | NotFound)
    assert failed > len(answers) / 2


def test_a_damaged_row_of_the_index_is_as_good_as_none(tmp_path):
    index = Index(tmp_path / INDEX_FILE)
    manifest = manifest_from_json({"reference": "hf:a/b", "view": "a/b", "files": [{"path": "x", "bytes": 1}]})
    index.remember_manifest("hf:a/b", manifest)
    assert index.recall_manifest("hf:a/b") == manifest
    for text in ("", "[]", "5", '{"files": 3}', "[" * 100_000, '{"header_bytes": 1e999, "tensors": []}'):
        with sqlite3.connect(tmp_path / INDEX_FILE) as db:
            db.execute("UPDATE manifests SET manifest_json=?", (text,))
            db.execute("INSERT OR REPLACE INTO tables VALUES ('x', ?)", (text,))
        assert index.recall_manifest("hf:a/b") is None
        assert index.table("x") is None


async def test_an_index_that_is_damaged_while_it_is_used_is_the_nodes_fault(tmp_path):
    async with Provision(WeightsSettings(dir=tmp_path, offline=True)) as provision:
        await provision.store()
        for file in tmp_path.glob(f"{INDEX_FILE}*"):
            file.write_bytes(b"no database at all " * 500)
        with pytest.raises(NodeFault, match="store of weights"):
            async with provision.obtain("hf:some/one"):
                pass
