"""Textual inversions as pickles: all forms that people share are read, and nothing of a pickle runs."""

import argparse
import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fanlight.errors import FailedPrecondition
from services.diffusion.engine.backend import assemble
from services.diffusion.models.embedding_files import EMBEDDING_LIMIT_BYTES
from services.diffusion.models.embedding_pickles import pickled_shapes, pickled_tensors
from services.diffusion.models.embeddings import read_embedding
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.scan import scan
from tests.fakes.sparse_files import sparse_file

VECTORS = torch.arange(32, dtype=torch.float32).reshape(2, 16) / 8


def old_parameter_dict():
    """As torch before 1.12 saved it."""
    made = nn.ParameterDict()
    del made.__dict__["_keys"]
    made.__dict__["_parameters"] = OrderedDict({"*": nn.Parameter(VECTORS)})
    return made


FORMS = {
    "parameter dict": {"string_to_token": {"*": torch.tensor(265)},
                       "string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)})},
    "old parameter dict": {"string_to_param": old_parameter_dict()},
    "a1111": {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(VECTORS)}, "name": "x", "step": 9,
              "sd_checkpoint": None, "sd_checkpoint_name": None},
    "raw tensor": VECTORS,
    "raw parameter": nn.Parameter(VECTORS),
    "diffusers": {"<mint>": VECTORS},
    "one vector each": {"<mint>": VECTORS[0]},
    "emb_params": {"emb_params": VECTORS, "step": torch.tensor(3)},
    "ordered": OrderedDict({"<mint>": VECTORS}),
    "numpy scalars": {"string_to_param": {"*": VECTORS}, "step": np.int64(3), "loss": np.float64(0.1),
                      "lr": np.float32(0.1)},
    "namespace": {"string_to_param": {"*": VECTORS}, "args": argparse.Namespace(lr=1)},
    "half": {"<mint>": VECTORS.half()},
    "bfloat": {"<mint>": VECTORS.bfloat16()},
    "double": {"<mint>": VECTORS.double()},
    "a part of a table": {"<mint>": torch.cat([torch.zeros(3, 16), VECTORS])[3:]},
    "transposed": {"<mint>": VECTORS.T.contiguous().T},
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_vectors(name, zipped, tmp_path):
    (tmp_path / "embeddings").mkdir()
    torch.save(FORMS[name], tmp_path / "embeddings" / "word.pt", _use_new_zipfile_serialization=zipped)
    [entry] = scan([tmp_path]).entries
    [rows] = read_embedding(entry)
    wanted = VECTORS[:1] if name == "one vector each" else VECTORS
    assert (entry.widths, entry.vectors) == ((16,), len(wanted))
    assert torch.equal(rows, wanted)


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_sdxls_pairs_go_by_kohyas_and_diffusers_names(names, ending, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "embeddings").mkdir()
    file = tmp_path / "embeddings" / f"pair.{ending}"
    tensors = {names[1]: torch.ones(3, 1280), names[0]: torch.zeros(3, 768)}
    save_file(tensors, file) if ending == "safetensors" else torch.save(tensors, file)
    [entry] = scan([tmp_path]).entries
    assert (entry.widths, entry.vectors) == ((768, 1280), 3)
    assert [rows.mean().item() for rows in read_embedding(entry)] == [0.0, 1.0]


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_they_are_found_in_folders_at_any_depth(depth, tmp_path, manager, asked, catalog):
    folder = tmp_path.joinpath("models", "Embeddings", *(f"f{number}" for number in range(depth)))
    folder.mkdir(parents=True)
    torch.save({"string_to_param": {"*": VECTORS}}, folder / "deepword.pt")
    [entry] = scan([tmp_path]).entries
    assert entry.id == "deepword"
    assert assemble(manager, asked(embeddings=(entry,))).texts[0].added["deepword"]


@pytest.mark.parametrize(
    ("path", "id_"),
    [("mint/learned_embeds.bin", "mint"), ("mint/learned_embeds-steps-500.bin", "mint"), ("learned_embeds.bin", None)],
)
def test_a_generic_file_is_called_by_its_folder(path, id_, tmp_path):
    file = tmp_path / "embeddings" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"<mint>": VECTORS}, file)
    assert [entry.id for entry in scan([tmp_path]).entries] == [id_ or "learned_embeds"]


class Runs:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


class Sets:
    """Sets attributes of what its pickle imports."""

    def __reduce__(self):
        return (nn.ParameterDict, (), (None, {"__init__": 3}))


def archive(data, **members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("archive/data.pkl", data)
        for name, content in members.items():
            made.writestr(f"archive/{name}", content)
    return out.getvalue()


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def huge_view():
    """A few numbers, said to be many."""
    return VECTORS[:1, :1].expand(1_000_000_000, 768)


BAD = {
    "code": (saved({"string_to_param": {"*": Runs()}}), ".print"),
    "code beside vectors": (saved({"string_to_param": {"*": VECTORS}, "x": Runs()}), ".print"),
    "os": (archive(b"cposix\nsystem\n(S'echo ran code'\ntR."), "posix.system"),
    "no pickle": (b"nothing of the kind", "cannot be read"),
    "empty": (b"", "cannot be read"),
    "no torch": (pickle.dumps({"a": 1}), "none that torch.save writes"),
    "no whole archive": (b"PK\x03\x04rest", "cannot be read"),
    "cut off": (saved({"<mint>": VECTORS})[:300], "cannot be read"),
    "two tables": (saved({"a": VECTORS, "b": VECTORS}), "not those of a textual inversion"),
    "no tensors": (saved({"a": 1}), "no tensors"),
    "a list": (saved([VECTORS]), "no tensors"),
    "a model": (saved({"state_dict": {"a": VECTORS}}), "no tensors"),
    "four dimensions": (saved({"a": torch.zeros(2, 2, 2, 2)}), "not those of a textual inversion"),
    "huge view": (saved({"a": huge_view()}), "cannot be read"),
    "deep": (archive(b"(" * 100_000 + b"l" * 100_000 + b"."), "no tensors"),
    "long text": (archive(b"\x8d" + (2**62).to_bytes(8, "little")), "cannot be read"),
    "large structure": (archive(b"N" * 2_000_000 + b"."), "larger"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_textual_inversion_is_left_out_with_the_reason(name, tmp_path, capsys):
    content, word = BAD[name]
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "bad.pt").write_bytes(content)
    found = scan([tmp_path])
    assert found.entries == []
    assert word in found.left_out[0].reason
    assert "ran code" not in capsys.readouterr().out


def test_a_pickle_changes_nothing_for_the_next_one(tmp_path):
    (tmp_path / "sets.pt").write_bytes(saved({"a": Sets(), "b": VECTORS}))
    with contextlib.suppress(UnfitFolder):
        pickled_shapes(tmp_path / "sets.pt")
    (tmp_path / "good.pt").write_bytes(saved(FORMS["parameter dict"]))
    assert torch.equal(pickled_tensors(tmp_path / "good.pt")["*"], VECTORS)


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_one_of_two_gigabytes_is_refused_before_it_is_read(ending, tmp_path):
    file = tmp_path / "embeddings" / f"huge.{ending}"
    sparse_file(file, {"emb_params": (1_400_000, 768)})
    assert file.stat().st_size > 2 * 10**9 > EMBEDDING_LIMIT_BYTES
    found = scan([tmp_path])
    assert found.entries == []
    assert found.left_out[0].reason == "it has 2051 MiB, and a textual inversion has at most 16"


def test_values_that_are_not_finite_are_an_error_of_ours(tmp_path, manager, asked):
    (tmp_path / "embeddings").mkdir()
    torch.save({"<mint>": VECTORS * float("nan")}, tmp_path / "embeddings" / "nan.pt")
    [entry] = scan([tmp_path]).entries
    with pytest.raises(FailedPrecondition, match="embedding nan"):
        assemble(manager, asked(embeddings=(entry,)))
