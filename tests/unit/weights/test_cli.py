import hashlib
import json

import pytest
import structlog
from typer.testing import CliRunner

from services.weights.cli import app
from tests.fakes.range_server import RangeServer
from tests.fakes.weight_sites import put_repository, safetensors


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in this process. Its loggers must not be cached: their stream closes with the command."""
    configure = structlog.configure
    monkeypatch.setattr(
        structlog, "configure", lambda **values: configure(**{**values, "cache_logger_on_first_use": False})
    )
    monkeypatch.setenv("FANLIGHT_WEIGHTS_DIR", str(tmp_path / "store"))
    return lambda *words: CliRunner().invoke(app, list(words))


@pytest.fixture
def server(monkeypatch):
    with RangeServer() as server:
        monkeypatch.setenv("FANLIGHT_WEIGHTS_HF_ENDPOINT", server.url)
        yield server


def test_a_catalog_entry_is_planned_without_a_network(run, monkeypatch):
    monkeypatch.setenv("FANLIGHT_WEIGHTS_HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("plan", "sd15", "controlnet-canny", "--pipeline", "controlnet", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["fetch_bytes"] == sum(row["fetch_bytes"] for row in data["files"]) == 2_856_793_767
    assert data["skipped_bytes"] == sum(row["bytes"] for row in data["skipped"])


def test_a_plan_can_be_read_by_people(run):
    result = run("plan", "controlnet-depth")
    assert result.exit_code == 0
    assert "left out" in result.stdout
    assert "not proved" in " ".join(result.stdout.split())


def test_the_last_line_of_a_fetch_says_what_it_took(run, server):
    body = bytes(range(256)) * 8192
    url = server.put("/m.bin", body)
    result = run("fetch", url, "--sha256", hashlib.sha256(body).hexdigest(), "--json")
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["bytes"], last["downloaded_bytes"]) == (len(body), len(body))
    assert last["seconds"] >= 0
    with open(last["path"], "rb") as file:
        assert file.read() == body
    again = json.loads(run("fetch", url, "--json").stdout.splitlines()[-1])
    assert (again["path"], again["downloaded_bytes"]) == (last["path"], 0)


def test_a_wrong_hash_is_one_line_and_exit_code_one(run, server):
    url = server.put("/m.bin", b"x" * 3000)
    result = run("fetch", url, "--sha256", "0" * 64, "--json")
    assert result.exit_code == 1
    assert "WRONG_BYTES" in result.stderr
    assert url in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [("plan", "hf:../x"), ("plan", "gs://a/b"), ("plan", "sd15", "--pipeline", "video")])
def test_what_cannot_be_is_one_line_and_exit_code_one(run, words):
    result = run(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: INVALID_FIELD")


def test_a_model_is_listed_pinned_verified_collected_and_removed(run, server):
    put_repository(server, "org/m", {"config.json": b"{}", "model.safetensors": safetensors({"w": b"1" * 2000})})
    assert run("fetch", "hf:org/m").exit_code == 0
    assert run("pin", "org/m").exit_code == 0
    (row,) = json.loads(run("ls", "--json").stdout)
    assert row["name"] == "org/m"
    assert row["is_pinned"]
    assert run("verify").exit_code == 0
    assert json.loads(run("gc", "--json").stdout) == {"freed_bytes": 0}
    assert "tensor_tables" in json.loads(run("digests", "org/m").stdout)
    assert run("rm", "org/m").exit_code == 0
    assert json.loads(run("ls", "--json").stdout) == []
    assert run("rm", "org/m").exit_code == 1


def test_a_setting_that_is_misspelt_is_an_error(run, monkeypatch):
    monkeypatch.setenv("FANLIGHT_WEIGHTS_BUGDET_BYTES", "1")
    result = run("ls")
    assert result.exit_code == 1
    assert "FANLIGHT_WEIGHTS_BUGDET_BYTES" in result.stderr


def test_a_held_model_is_published_and_the_mirror_is_fetched_from(run, server, tmp_path, monkeypatch):
    body = safetensors({"a": bytes(3_000_000)}, dtype="F16")
    put_repository(server, "org/m", {"config.json": b"{}", "model.safetensors": body})
    assert run("fetch", "hf:org/m").exit_code == 0
    result = run("publish", "org/m", "--to", str(tmp_path / "mirror"), "--json")
    assert result.exit_code == 0
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["bytes"] == len(body) + 2
    assert done["mirror_bytes"] == done["written_bytes"] < 100_000
    for path in (tmp_path / "mirror").iterdir():
        server.put(f"/mirror/{path.name}", path)
    monkeypatch.setenv("FANLIGHT_WEIGHTS_MIRRORS", f"{server.url}/mirror")
    plan = json.loads(run("plan", "hf:org/m", "--dir", str(tmp_path / "other"), "--json").stdout)
    assert plan["packed_away_bytes"] > 2_900_000
    last = json.loads(run("fetch", "hf:org/m", "--dir", str(tmp_path / "other"), "--json").stdout.splitlines()[-1])
    assert last["downloaded_bytes"] < 100_000


def test_publishing_what_is_not_held_is_said(run, tmp_path):
    result = run("publish", "org/none", "--to", str(tmp_path / "mirror"))
    assert result.exit_code == 1
    assert "NOT_FOUND" in result.stderr
    assert "org/none" in result.stderr


def test_a_folder_that_cannot_be_a_store_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("ls", "--dir", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'file'}")
    assert "cannot be used: Not a directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_sha256_that_is_none_names_the_reference(run, server):
    result = run("fetch", server.put("/m.bin", b"x"), "--sha256", "zzz")
    assert result.exit_code == 1
    assert f"{server.url}/m.bin: the sha256 must be 64 hexadecimal digits" in result.stderr


def test_a_plan_prints_whole_paths_and_their_references(run):
    result = run("plan", "controlnet-canny", "controlnet-depth")
    assert "…" not in result.stdout
    assert result.stdout.count("diffusion_pytorch_model.safetensors") >= 2
    rows = json.loads(run("plan", "controlnet-canny", "controlnet-depth", "--json").stdout)
    assert {row["reference"] for row in rows["files"]} == {"catalog:controlnet-canny", "catalog:controlnet-depth"}


def test_brackets_in_an_operators_catalog_are_shown_as_they_are(run, tmp_path, monkeypatch):
    entry = {
        "name": "mine",
        "view": "me/mine",
        "kind": "vae",
        "caveats": ["see [docs] and [/b]"],
        "is_chosen": True,
        "files": [
            {"path": "m.safetensors", "bytes": 9, "sources": ["https://weights.example/m.safetensors"]},
            {"path": "n.safetensors", "bytes": 9, "skip": "for [training]"},
        ],
    }
    (tmp_path / "mine.json").write_text(json.dumps({"entries": [entry]}))
    monkeypatch.setenv("FANLIGHT_WEIGHTS_CATALOG_DIR", str(tmp_path))
    result = run("plan", "mine")
    assert result.exit_code == 0
    assert "see [docs] and [/b]" in result.stdout
    assert "for [training]" in result.stdout
