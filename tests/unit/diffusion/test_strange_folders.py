"""Whatever lies in a models' folder, the service starts, says what it left out, and serves the rest."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fanlight.errors import FanlightError
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.loading import LoadTarget, load_unet, load_vae
from services.diffusion.models.scan import scan
from services.diffusion.wire import models_to_proto
from services.weights.references.tensors import BadHeader, read_table

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 3.5, 10**30, "", "text", "\ud800", [], [[1]], [None], ["a", {}], {}, {"a": [1]}, [1] * 10_000,
)  # fmt: skip


def served(folder: Path) -> list[str]:
    """The ids that a worker reports; building the report must not fail either."""
    catalog = scan([folder])
    for message in models_to_proto(catalog):
        message.SerializeToString()
    assert_looked_up(catalog)
    return [entry.id for entry in catalog.checkpoints]


def assert_looked_up(catalog: ModelCatalog) -> None:
    for checkpoint in catalog.checkpoints:
        catalog.controlnets_of(checkpoint)
        catalog.embeddings_of(checkpoint)
        catalog.tiny_vae_of(checkpoint)


@pytest.fixture
def folders(models: Path, tmp_path: Path) -> Path:
    """`good/` and `strange/`, two checkpoints, and a ControlNet."""
    for name in ("good", "strange"):
        shutil.copytree(models / "model", tmp_path / name)
    shutil.copytree(models / "controlnet-canny", tmp_path / "controlnet-canny")
    return tmp_path


def configs(folders: Path) -> Iterator[Path]:
    yield from (path for path in sorted((folders / "strange").rglob("*.json")) if path.name not in ("vocab.json",))
    yield folders / "controlnet-canny" / "config.json"


def test_no_value_in_any_config_stops_the_scan_or_the_report(folders: Path) -> None:
    assert set(served(folders)) == {"good", "strange"}
    tried = 0
    for path in configs(folders):
        before = path.read_text()
        known = json.loads(before)
        for key in known:
            for value in STRANGE:
                path.write_text(json.dumps({**known, key: value}))
                assert "good" in served(folders), (path.name, key, value)
                tried += 1
            path.write_text(json.dumps({name: each for name, each in known.items() if name != key}))
            assert "good" in served(folders), (path.name, key)
        path.write_text(before)
    assert tried > 500


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"3", b"null", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000,
        b'{"_class_name": ["pipeline", "MyPipeline"]}', b" " * 5_000_000,
    ],
    ids=lambda content: repr(content[:16]),
)  # fmt: skip
def test_no_file_in_place_of_a_config_stops_the_scan(folders: Path, content: bytes) -> None:
    for path in configs(folders):
        before = path.read_bytes()
        path.write_bytes(content)
        assert "good" in served(folders), path
        path.write_bytes(before)


def test_pipes_loops_and_broken_links_in_place_of_files_stop_nothing(folders: Path) -> None:
    config = folders / "strange" / "unet" / "config.json"
    config.unlink()
    os.mkfifo(config)
    os.mkfifo(folders / "pipe.safetensors")
    (folders / "loop").symlink_to(folders)
    (folders / "self.safetensors").symlink_to(folders / "self.safetensors")
    (folders / "nothing.safetensors").symlink_to(folders / "is-not-there")
    (folders / "good" / "unet" / "link.safetensors").symlink_to(folders / "is-not-there")
    assert served(folders) in (["good"], [])
    (folders / "good" / "unet" / "link.safetensors").unlink()
    assert served(folders) == ["good"]


def test_names_that_no_id_can_have_are_left_out(folders: Path) -> None:
    for name in (b"\xff\xfe", b"a:b", b"<lora>", b"line\nbreak", b"x" * 255):
        shutil.copytree(folders / "good", os.path.join(os.fsencode(folders), name))
    assert set(served(folders)) == {"good", "strange", "x" * 255}


def header_file(header: Any, size_bytes: int = 0) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + b"\x00" * size_bytes


def tensor(**changed: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}}


HEADERS = {
    "overflow": header_file(tensor(shape=[2**59, 2**59, 0], data_offsets=[0, 0])),
    "list as dtype": header_file(tensor(dtype=["F32"]), 4),
    "object as shape": header_file(tensor(shape={"a": 1}), 4),
    "text in shape": header_file(tensor(shape=["1"]), 4),
    "offsets turned": header_file(tensor(data_offsets=[4, 0]), 4),
    "no object": header_file([1]),
    "deep": header_file(b"[" * 100_000),
    "metadata list": header_file({**tensor(), "__metadata__": ["a"]}, 4),
    "length lies": struct.pack("<Q", 2**63) + b"{}",
    "short": b"\x01",
    "html": b"<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("name", HEADERS)
def test_no_safetensors_header_stops_the_scan(folders: Path, name: str) -> None:
    (folders / "strange.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(BadHeader):
        read_table(folders / "strange.safetensors")
    assert set(served(folders)) == {"good", "strange"}


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_config_that_the_scan_lets_pass_fails_with_an_error_of_ours(folders: Path, part: str) -> None:
    import torch

    path = folders / "strange" / part / "config.json"
    known = json.loads(path.read_text())
    refused = 0
    for key in known:
        for value in STRANGE:
            path.write_text(json.dumps({**known, key: value}))
            entries = [entry for entry in scan([folders / "strange"]).checkpoints if entry.id == "strange"]
            for entry in entries:
                try:
                    (load_unet if part == "unet" else load_vae)(entry, LoadTarget(dtype=torch.float32))
                except FanlightError:
                    refused += 1
    assert refused > 10
