"""Names of files, revisions and versions as people give them: each is fetched alone and with its repository."""

import hashlib
import json
import unicodedata

import pytest

from fanlight.errors import InvalidField, NotFound
from services.weights.references.manifest import manifest_from_json
from tests.fakes.weight_sites import put_repository, safetensors
from tests.fakes.weight_stores import open_store

BODY = safetensors({"w": b"1234" * 600})
SMALL = safetensors({"w": b"5678" * 300})
NAMES = (
    "My Style v2.safetensors",
    "style (1) [final]{x}.safetensors",
    "style+v2.safetensors",
    "100% real.safetensors",
    "50%25 off.safetensors",
    'it\'s "mine".safetensors',
    "what? #1 & more=yes.safetensors",
    "-rf.safetensors",
    "--help/-x.safetensors",
    "a@main/b@2.safetensors",
    "画風　二.safetensors",
    "می‌خواهم.safetensors",
    "стиль: новый.safetensors",
    "👩‍🎨.safetensors",
    "a~b,c;d!$.safetensors",
)


@pytest.mark.parametrize("name", NAMES)
async def test_a_file_with_an_odd_name_is_fetched_alone_and_with_its_repository(server, settings, tmp_path, name):
    put_repository(server, "org/odd", {name: BODY})
    async with open_store(settings()) as store:
        alone = await store.fetch(f"hf:org/odd/{name}", store.selection())
        assert alone.path.read_bytes() == BODY
    async with open_store(settings(dir=tmp_path / "other")) as store:
        whole = await store.ensure("hf:org/odd")
        assert [path.read_bytes() for path in whole.rglob("*.safetensors")] == [BODY]


async def test_a_name_that_ends_with_a_blank_does_not_stop_its_repository(server, store):
    put_repository(server, "org/m", {"m.safetensors": BODY, "notes.json ": b"{}"})
    assert (await store.ensure("hf:org/m")).is_dir()


async def test_an_accent_may_be_written_in_either_way_and_a_blank_as_percent_20(server, store):
    listed = unicodedata.normalize("NFD", "Créé été.safetensors")
    put_repository(server, "org/m", {listed: BODY})
    for written in (unicodedata.normalize("NFC", listed), "Créé%20été.safetensors"):
        assert (await store.ensure(f"hf:org/m/{written}")).read_bytes() == BODY


def put_revision(server, repo, revision, files):
    put_repository(server, repo, files)
    server.files[f"/api/models/{repo}/revision/{revision}"] = server.files.pop(f"/api/models/{repo}/revision/main")


@pytest.mark.parametrize(
    ("revision", "written"),
    [
        ("refs/pr/1", "refs/pr/1"),
        ("refs/pr/1", "refs%2Fpr%2F1"),
        ("feature/x", "feature%2Fx"),
        ("feature/x", "feature/x"),
        ("a/b/c", "a/b/c"),
        ("v1.0+fp16", "v1.0+fp16"),
    ],
)
async def test_a_revision_may_have_slashes(server, settings, tmp_path, revision, written):
    put_revision(server, "org/m", revision, {"sub dir/m.safetensors": BODY, "config.json": b"{}"})
    for number, path in enumerate(("", "/sub dir", "/sub dir/m.safetensors")):
        async with open_store(settings(dir=tmp_path / str(number))) as store:
            found = await store.ensure(f"hf:org/m@{written}{path}")
            assert BODY in [each.read_bytes() for each in [found, *found.rglob("*")] if each.is_file()]


async def test_a_revision_that_is_not_there_is_named_as_it_was_written(server, store):
    put_repository(server, "org/m", {"m.safetensors": BODY})
    with pytest.raises(NotFound, match="hf:org/m@none/x"):
        await store.ensure("hf:org/m@none/x")


@pytest.mark.parametrize("bad", ["../../etc/x.safetensors", "a//b.safetensors", "a\nb.safetensors", "a\u202eb.bin"])
async def test_a_name_that_leaves_its_folder_or_hides_what_it_is_stays_refused(server, store, bad):
    put_repository(server, "org/m", {bad: BODY})
    for reference in ("hf:org/m", f"hf:org/m/{bad}"):
        with pytest.raises(InvalidField):
            await store.ensure(reference)


async def test_an_address_that_was_copied_with_its_blanks_is_fetched(server, store):
    server.put("/files/My Style (1).safetensors", BODY)
    assert (await store.ensure(f"{server.url}/files/My Style (1).safetensors")).read_bytes() == BODY


def put_version(server, *rows):
    """A Civitai version of (number, name, body, type, precision, is_primary)."""
    files = []
    for number, name, body, kind, precision, is_primary in rows:
        url = server.put(f"/api/download/models/7/{number}", body)
        files.append(
            {
                "id": number,
                "name": name,
                "type": kind,
                "primary": is_primary,
                "sizeKB": len(body) / 1024,
                "metadata": {"fp": precision, "format": "SafeTensor"},
                "hashes": {"SHA256": hashlib.sha256(body).hexdigest().upper()},
                "downloadUrl": url,
            }
        )
    server.put_json("/api/v1/model-versions/7", {"id": 7, "model": {"type": "Checkpoint"}, "files": files})


VERSION = (
    (10, "m.vae.safetensors", SMALL, "VAE", "fp16", False),
    (12, "m_fp8.safetensors", SMALL, "Pruned Model", "fp8", False),
    (11, "m_fp16.safetensors", BODY, "Model", "fp16", True),
    (13, "m_fp32.safetensors", BODY + BODY, "Model", "fp32", False),
)


@pytest.mark.parametrize(
    ("reference", "precision", "name"),
    [
        ("civitai:5@7", "fp16", "m_fp16.safetensors"),
        ("civitai:5@7", "fp32", "m_fp32.safetensors"),
        ("civitai:5@7+12", "fp32", "m_fp8.safetensors"),
        ("civitai:5@7+10", "fp16", "m.vae.safetensors"),
        ("civitai:5@7.safetensors", "fp16", "m_fp16.safetensors"),
    ],
)
async def test_of_a_civitai_version_comes_the_primary_or_the_asked_for_file(server, store, reference, precision, name):
    put_version(server, *VERSION)
    [plan] = await store.plan([reference], store.selection(precision=precision))
    assert [item.file.path for item in plan.files] == [name]


async def test_a_civitai_file_may_be_named_by_its_digest(server, store):
    put_version(server, *VERSION)
    sha256 = hashlib.sha256(BODY + BODY).hexdigest()
    [plan] = await store.plan(["civitai:5@7"], store.selection(), sha256=sha256)
    assert [item.file.path for item in plan.files] == ["m_fp32.safetensors"]


async def test_a_civitai_version_without_a_primary_file_gives_its_first_model(server, store):
    put_version(server, *((*row[:5], False) for row in VERSION))
    [plan] = await store.plan(["civitai:5@7"], store.selection())
    assert [item.file.path for item in plan.files] == ["m_fp16.safetensors"]


async def test_where_a_download_address_is_dead_the_files_number_leads_to_it(server, store):
    put_version(server, (11, "m.safetensors", BODY, "Model", "fp16", True))
    del server.files["/api/download/models/7/11"]
    server.put("/api/download/models/7", BODY)
    assert (await store.ensure("civitai:5@7")).read_bytes() == BODY
    assert server.seen[-1].path == "/api/download/models/7?fileId=11"


async def test_a_manifest_of_several_precisions_survives_being_written_and_read(server, store):
    put_version(server, *VERSION)
    manifest = (await store.plan(["civitai:5@7"], store.selection()))[0].manifest
    assert manifest_from_json(json.loads(manifest.to_text())) == manifest
