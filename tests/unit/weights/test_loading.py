import hashlib

import pytest

from services.kernel.errors import FailedPrecondition
from services.weights.loading import load_checkpoint, load_pickle, load_safetensors
from services.weights.tensors import BadHeader
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
