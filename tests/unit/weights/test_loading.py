import ctypes
import hashlib
import mmap
from itertools import pairwise

import pytest

from fanlight.errors import FailedPrecondition
from services.weights import loading
from services.weights.loading import load_checkpoint, load_pickle, load_safetensors
from services.weights.references.tensors import BadHeader
from tests.fakes.weight_sites import safetensors

torch = pytest.importorskip("torch")


@pytest.fixture
def tensors():
    return {
        "a": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "b": torch.tensor([1, 2, 3], dtype=torch.int64),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(1.5, dtype=torch.bfloat16),
    }


def test_tensors_are_those_that_safetensors_wrote(tmp_path, tensors):
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    loaded = load_safetensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_writing_to_a_tensor_changes_no_file(tmp_path, tensors):
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    before = path.read_bytes()
    load_safetensors(path)["a"].fill_(9)
    assert path.read_bytes() == before


def test_the_parts_of_a_checkpoint_are_one_checkpoint_again(tmp_path):
    for name in ("unet", "vae_decoder"):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors({f"{name}.w": b"123"}))
    assert set(load_checkpoint(tmp_path)) == {"unet.w", "vae_decoder.w"}


def test_a_file_that_is_too_short_is_refused_before_it_is_mapped(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors({"a": b"12345678"})[:-1])
    with pytest.raises(BadHeader, match="end at byte"):
        load_safetensors(path)


def test_threads_read_every_page_of_the_wanted_part_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "STEP_BYTES", 64 * 1024)
    path = tmp_path / "m"
    path.write_bytes(bytes(range(256)) * 4096)
    asked, real = [], loading._madvise()
    monkeypatch.setattr(loading, "_madvise", lambda: lambda *call: asked.append(call) or real(*call))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    for thread in loading.read_ahead(mapped, 100_000, 1_000_000):
        thread.join()
    spans = sorted((at - base, at - base + size) for at, size, advice in asked if advice == loading.POPULATE_READ)
    assert spans[0][0] <= 100_000
    assert spans[-1][1] == 1_000_000
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert bytes(mapped[:256]) == bytes(range(256))


def test_a_kernel_that_maps_no_pages_ahead_is_asked_for_them_in_small_pieces(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(bytes(1_000_000))
    asked = []

    def old(address, size, advice):
        asked.append((address, size, advice))
        return -1 if advice == loading.POPULATE_READ else 0

    monkeypatch.setattr(loading, "_madvise", lambda: old)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for thread in loading.read_ahead(mapped, 0, len(mapped)):
        thread.join()
    pieces = [size for _, size, advice in asked if advice == loading.WILLNEED]
    assert sum(pieces) == 1_000_000
    assert max(pieces) <= loading.WILLNEED_BYTES


def test_a_pickle_needs_a_pin_or_leave_and_runs_no_code(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(FailedPrecondition, match="pins"):
        load_pickle(path, pinned=frozenset())
    pinned = frozenset({hashlib.sha256(path.read_bytes()).hexdigest()})
    assert torch.equal(load_pickle(path, pinned=pinned)["w"], torch.ones(3))
    torch.save({"w": print}, path)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_pickle(path, pinned=frozenset(), allow=True)
