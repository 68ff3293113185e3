"""What an index forgets with an object: nothing leads to it any more."""

from pathlib import Path

import pytest

from services.weights.references.manifest import TensorEntry, TensorTable
from services.weights.store.index import Index, ObjectRow

SHA, ALIAS, TENSOR = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def index(tmp_path: Path) -> Index:
    index = Index(tmp_path / "index.sqlite")
    index.add(
        ObjectRow(sha256=SHA, size_bytes=9, autov2=SHA[:10], autov3="", component="k", used_s=1.0, is_pinned=False)
    )
    index.add_alias(ALIAS, SHA)
    index.set_links("me/m", [("m.bin", SHA)])
    entry = TensorEntry(name="t", dtype="U8", shape=(8,), begin=1, end=9, sha256=TENSOR)
    index.add_table("", SHA, TensorTable(header_bytes=1, tensors=(entry,)))
    return index


def test_an_object_is_found_by_all_that_leads_to_it(index: Index) -> None:
    assert [index.find(name) for name in (SHA, SHA[:10], ALIAS)] == [SHA] * 3
    assert index.find_component("k") == SHA
    assert index.tensor_at(TENSOR, 8) == (SHA, 1)
    holdings = index.holdings()
    assert (holdings.objects, holdings.components, holdings.tensors) == ({SHA, ALIAS}, {"k"}, {TENSOR})


def test_nothing_leads_to_an_object_that_was_forgotten(index: Index) -> None:
    assert index.forget(SHA) == [("me/m", "m.bin")]
    assert [index.find(name) for name in (SHA, SHA[:10], ALIAS)] == [None] * 3
    assert (index.find_component("k"), index.tensor_at(TENSOR, 8), index.links()) == (None, None, [])
    holdings = index.holdings()
    assert (holdings.objects, holdings.components, holdings.tensors) == (set(), set(), set())
