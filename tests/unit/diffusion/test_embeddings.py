"""Textual inversions: the prompt gets their vectors, and nothing that is shared learns of them."""

import pytest
import torch
from safetensors.torch import save_file

from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import FailedPrecondition, NotFound
from services.diffusion.engine.backend import assemble
from services.diffusion.engine.conditioning import ConditioningCache
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.scan import scan
from services.diffusion.parse.prompts import read_prompts
from tests.fakes.families import make_tiny_sdxl

WIDTH = 16


@pytest.fixture
def vectors():
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "embeddings"
    made.mkdir()
    return made


def forms(vectors):
    """What people write: (file's name, how it is saved)."""
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(vectors)},
        "name": "x",
        "step": 9,
    }
    return {
        "a1111.safetensors": lambda file: save_file({"emb_params": vectors}, file),
        "diffusers.safetensors": lambda file: save_file({"<mint>": vectors}, file),
        "a1111.pt": lambda file: torch.save(a1111, file),
        "diffusers.bin": lambda file: torch.save({"<mint>": vectors}, file),
    }


@pytest.mark.parametrize("name", ["a1111.safetensors", "diffusers.safetensors", "a1111.pt", "diffusers.bin"])
def test_each_form_puts_its_vectors_behind_the_tables_end(name, vectors, folder, manager, catalog, asked):
    forms(vectors)[name](folder / name)
    [entry] = scan([folder.parent]).entries
    base = manager.checkpoint(catalog.default())
    made = assemble(manager, asked(embeddings=(entry,)))
    [text] = made.texts
    ids = text.added[entry.id]
    count = base.texts[0].encoder.embeddings.token_embedding.weight.shape[0]
    assert ids == (count, count + 1)
    table = text.encoder.embeddings.token_embedding
    assert torch.equal(table(torch.tensor([ids[0], 5, ids[1]]))[[0, 2]], vectors)
    assert torch.equal(table(torch.tensor([5])), base.texts[0].encoder.embeddings.token_embedding(torch.tensor([5])))


def test_the_pristine_encoder_and_tokenizer_know_nothing_of_it(vectors, folder, manager, catalog, asked):
    save_file({"emb_params": vectors}, folder / "mint.safetensors")
    [entry] = scan([folder.parent]).entries
    before = manager.checkpoint(catalog.default()).texts[0]
    size = len(before.tokenizer), before.encoder.embeddings.token_embedding.weight.shape
    assemble(manager, asked(embeddings=(entry,)))
    after = manager.checkpoint(catalog.default()).texts[0]
    assert after.added == {}
    assert after.encoder is before.encoder
    assert (len(after.tokenizer), after.encoder.embeddings.token_embedding.weight.shape) == size


def test_two_embeddings_have_ids_of_their_own(vectors, folder, manager, asked):
    for name in ("one", "two"):
        save_file({"emb_params": vectors}, folder / f"{name}.safetensors")
    entries = tuple(scan([folder.parent]).entries)
    [text] = assemble(manager, asked(embeddings=entries)).texts
    assert sorted(sum(text.added.values(), ())) == list(range(min(text.added["one"]), min(text.added["one"]) + 4))


def test_a_prompt_with_the_vectors_is_the_prompt_with_a_table_that_has_them(vectors, folder, manager, catalog, asked):
    """Against an encoder whose own table was made longer, as diffusers does it."""
    save_file({"emb_params": vectors}, folder / "mint.safetensors")
    [entry] = scan([folder.parent]).entries
    [text] = assemble(manager, asked(embeddings=(entry,))).texts
    [own] = manager.checkpoint(catalog.default()).texts
    import copy

    resized = copy.deepcopy(own.encoder)
    table = resized.embeddings.token_embedding
    resized.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table.weight, vectors]))
    ids = [text.tokenizer.bos_token_id, 7, *text.added["mint"], 9, text.tokenizer.eos_token_id]
    row = torch.tensor([ids + [text.tokenizer.pad_token_id] * (77 - len(ids))])
    assert torch.equal(text.encoder(row).last_hidden_state, resized(row).last_hidden_state)


@pytest.mark.parametrize(
    ("prompt", "of_step", "plain"),
    [
        ("a [cat:mint:1]", 2, "a mint"),
        ("a [cat|mint]", 2, "a mint"),
        ("a [mint::1] cup", 1, "a mint cup"),
        ("mint AND a cup", 1, "mint"),
        ("a [[mint:cat:1]|dog]", 1, "a mint"),
    ],
)
def test_one_is_found_in_changes_and_beside_and(prompt, of_step, plain, vectors, folder, manager, catalog, asked):
    save_file({"emb_params": vectors}, folder / "mint.safetensors")
    [entry] = scan([folder.parent]).entries
    both = ModelCatalog([*catalog.entries, entry])
    request = GenerateRequest(prompt=prompt, steps=2)
    found = read_prompts(request, both, both.default()).embeddings
    assert found == (entry,)
    changing, fixed = (asked(prompt=text, steps=2, embeddings=found) for text in (prompt, plain))
    own = ConditioningCache().get(changing, assemble(manager, changing)).at(of_step).prompts[0][0].embeds
    assert torch.equal(own, ConditioningCache().get(fixed, assemble(manager, fixed)).at(1).prompts[0][0].embeds)
    without = ConditioningCache().get(asked(prompt=plain, steps=2), manager.checkpoint(catalog.default())).at(1)
    assert not torch.equal(own, without.prompts[0][0].embeds)


def test_sdxls_pairs_go_to_both_encoders(folder, manager, asked, tmp_path):
    from dataclasses import replace

    narrow, wide = torch.randn(3, 16), torch.randn(3, 24)
    save_file({"clip_g": wide, "clip_l": narrow}, folder / "pair.safetensors")
    catalog = scan([make_tiny_sdxl(tmp_path / "xl"), folder])
    entry = catalog.embedding("PAIR", catalog.default())
    assert (entry.widths, entry.vectors) == ((16, 24), 3)
    made = assemble(manager, replace(asked(embeddings=(entry,)), checkpoint=catalog.default()))
    first, second = (text.encoder for text in made.texts)
    assert torch.equal(first.embeddings.token_embedding.rows, narrow)
    assert torch.equal(second.embeddings.token_embedding.rows, wide)


def test_one_of_another_width_is_refused_by_name(folder, manager, catalog, asked):
    save_file({"emb_params": torch.randn(1, 768)}, folder / "large.safetensors")
    found = scan([folder.parent])
    with pytest.raises(FailedPrecondition, match="large is for sd1"):
        found.embedding("large", catalog.default())
    assert found.embeddings_of(catalog.default()) == []
    with pytest.raises(NotFound):
        found.embedding("none", catalog.default())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_of_another_family_both_forms_give_the_same_answer(ending, folder, catalog):
    file = folder / f"large.{ending}"
    torch.save({"string_to_param": {"*": torch.randn(1, 768)}}, file) if ending == "pt" else save_file(
        {"emb_params": torch.randn(1, 768)}, file
    )
    found = scan([folder.parent])
    assert [(entry.widths, entry.vectors) for entry in found.entries] == [((768,), 1)]
    assert [found.family_of(entry) for entry in found.entries] == ["sd1"]
    with pytest.raises(FailedPrecondition, match="embedding large is for sd1, the checkpoint tiny is"):
        found.embedding("large", catalog.default())


class Evil:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


@pytest.mark.parametrize(
    "save",
    [
        lambda file: torch.save({"string_to_param": {"*": Evil()}}, file),
        lambda file: file.write_bytes(b"nothing of the kind"),
        lambda file: torch.save({"a": torch.zeros(1, 16), "b": torch.zeros(1, 16)}, file),
    ],
)
def test_what_is_no_textual_inversion_is_left_out_and_runs_no_code(save, folder, capsys):
    save(folder / "bad.pt")
    found = scan([folder.parent])
    assert found.entries == []
    assert [each.path for each in found.left_out] == ["embeddings/bad.pt"]
    assert "ran code" not in capsys.readouterr().out


def test_one_that_was_damaged_since_is_a_typed_error(vectors, folder, manager, asked):
    torch.save({"string_to_param": {"*": vectors}}, folder / "bad.pt")
    [entry] = scan([folder.parent]).entries
    (folder / "bad.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(UnusableModel, match="embedding bad"):
        assemble(manager, asked(embeddings=(entry,)))


def test_pickles_are_looked_at_in_a_folder_of_embeddings_alone(tmp_path, vectors):
    torch.save({"string_to_param": {"*": vectors}}, tmp_path / "loose.pt")
    found = scan([tmp_path])
    assert found.entries == []
    assert "folders named embeddings" in found.left_out[0].reason
