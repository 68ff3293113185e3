import hashlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.weights.references.tensors import FileDigests
from tests.fakes.weight_sites import safetensors


def digested(body: bytes, cuts: list[int]):
    digests = FileDigests(size_bytes=len(body), is_safetensors=True)
    borders = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for begin, end in pairwise(borders):
        digests.update(body[begin:end])
    return digests.finish()


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.lists(st.integers(0, 600), max_size=12))
def test_all_digests_are_those_of_the_bytes_however_they_come(tensors, cuts):
    body = safetensors({f"t{number}": data for number, data in enumerate(tensors)})
    found = digested(body, cuts)
    assert found.fault is None
    assert found.sha256 == hashlib.sha256(body).hexdigest()
    assert found.autov3 == hashlib.sha256(b"".join(tensors)).hexdigest()
    by_name = {t.name: t.sha256 for t in found.table.tensors}
    assert by_name == {f"t{number}": hashlib.sha256(data).hexdigest() for number, data in enumerate(tensors)}


@given(st.binary(max_size=64), st.lists(st.integers(0, 64), max_size=5))
def test_a_file_that_is_no_safetensors_has_a_sha256_and_a_fault(body, cuts):
    found = digested(body, cuts)
    assert found.sha256 == hashlib.sha256(body).hexdigest()
    assert found.table is None
    assert found.fault is not None


def test_a_header_of_terabytes_is_a_fault_at_once():
    digests = FileDigests(size_bytes=10**13, is_safetensors=True)
    digests.update((10**12).to_bytes(8, "little"))
    assert "1000000000000 bytes" in digests.finish().fault.message
