"""Whatever lies in a models' folder, the service starts, says what it left out, and serves the rest."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanlight.errors import FanlightError
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Generation
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from services.diffusion.wire import models_to_proto
from services.weights.references.tensors import BadHeader, read_table

# Of every kind that JSON has, and what breaks libraries: too large, nested, no text of Unicode.
STRANGE: tuple[Any, ...] = (
    None, True, -1, 3.5, 10**30, "text", "\ud800", [], [[1]], ["a", {}], {"a": [1]}, [1] * 10_000,
)  # fmt: skip
# What is tried with each name in the tests that do more than scan.
A_FEW = 4


def some_values(number: int) -> tuple[Any, ...]:
    """A few of the strange values, others for each number."""
    return tuple(STRANGE[(number * A_FEW + each) % len(STRANGE)] for each in range(A_FEW))


def one_value(number: int) -> tuple[Any, ...]:
    return (STRANGE[number % len(STRANGE)],)


def link_tree(source: Path, target: str | Path | bytes) -> None:
    """A copy whose weights are links; configs are written by tests."""

    def link(from_: str, to: str) -> None:
        (os.symlink if from_.endswith(".safetensors") else shutil.copy)(from_, to)

    shutil.copytree(source, os.fsdecode(target), copy_function=link)


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
        link_tree(models / "model", tmp_path / name)
    link_tree(models / "controlnet-canny", tmp_path / "controlnet-canny")
    return tmp_path


def configs(folders: Path) -> list[Path]:
    found = [path for path in sorted((folders / "strange").rglob("*.json")) if "tokenizer" not in path.parent.name]
    return [*found, folders / "controlnet-canny" / "config.json"]


def variants(config: Path, values: Callable[[int], tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    """Writes the config with other values for each name; the original again at the end."""
    before = config.read_text()
    known = json.loads(before)
    for number, key in enumerate(known):
        for value in values(number):
            config.write_text(json.dumps({**known, key: value}))
            yield key, value
    config.write_text(before)


def test_a_list_as_the_class_of_a_pipeline_leaves_that_folder_out_alone(folders: Path) -> None:
    index = folders / "strange" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": ["pipeline", "MyPipeline"]}))
    assert served(folders) == ["good"]


def test_no_value_in_any_config_stops_the_scan_or_the_report(folders: Path) -> None:
    tried = 0
    for config in configs(folders):
        model = folders / config.relative_to(folders).parts[0]
        for _ in variants(config, some_values):
            served(model)
            tried += 1
    assert tried > 400
    assert set(served(folders)) == {"good", "strange"}


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
        served(folders / path.relative_to(folders).parts[0])
        path.write_bytes(before)


def test_pipes_loops_and_broken_links_in_place_of_files_stop_nothing(folders: Path) -> None:
    config = folders / "strange" / "unet" / "config.json"
    config.unlink()
    os.mkfifo(config)
    os.mkfifo(folders / "pipe.safetensors")
    os.mkfifo(folders / "controlnet-canny" / "pipe.safetensors")
    (folders / "loop").symlink_to(folders)
    (folders / "self.safetensors").symlink_to(folders / "self.safetensors")
    (folders / "nothing.safetensors").symlink_to(folders / "is-not-there")
    (folders / "good" / "unet" / "link.safetensors").symlink_to(folders / "is-not-there")
    assert served(folders) in (["good"], [])
    (folders / "good" / "unet" / "link.safetensors").unlink()
    assert served(folders) == ["good"]


def test_names_that_no_id_can_have_are_left_out(folders: Path) -> None:
    for name in (b"\xff\xfe", b"a:b", b"<lora>", b"line\nbreak", b"x" * 255):
        link_tree(folders / "good", os.path.join(os.fsencode(folders), name))
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


def loads(folder: Path) -> int:
    """Loads all that a scan finds and begins an image; how often that was refused, by nothing but errors of ours."""
    catalog, refused = scan([folder]), 0
    manager = ModelManager(device="cpu")
    backend = TorchBackend(manager, threads=1)
    for checkpoint in catalog.checkpoints:
        generation = Generation(
            checkpoint=checkpoint, prompt="a cat", width_px=64, height_px=64, steps=2, scheduler="ddim", seed=1
        )
        if (error := error_of(backend, generation)) is not None:
            assert isinstance(error, FanlightError)
            assert error.part == f"checkpoint:{checkpoint.id}", error
            refused += 1
    return refused


def error_of(backend: TorchBackend, generation: Generation) -> Exception | None:
    try:
        row = backend.begin(generation)
        [step] = backend.advance([row])
        return step.error or (backend.finish(row) and None)
    except FanlightError as error:
        return error


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_config_that_the_scan_lets_pass_fails_with_an_error_of_ours(folders: Path, part: str) -> None:
    config = folders / "strange" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    assert sum(loads(folders / "strange") for _ in variants(config, one_value)) > 1
