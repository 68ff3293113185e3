"""Files that are no files, have no end or hold garbage are refused by name, and nobody waits for them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler

from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Generation
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from services.diffusion.models.tokenizer import ADDED_LIMIT
from services.kernel.files import StrangeFile, open_ordinary, read_limited
from services.weights.loading import load_pickle
from services.weights.references.tensors import BadHeader, read_table
from tests.unit.diffusion.test_strange_folders import link_tree

# A sparse file takes no disk.
HUGE_BYTES = 1 << 40


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer is in vocab.json and merges.txt."""
    link_tree(models / "model", tmp_path / "strange")
    (tmp_path / "strange" / "tokenizer" / "tokenizer.json").unlink()
    return tmp_path / "strange"


def begin(folder: Path) -> None:
    checkpoint = scan([folder]).default()
    TorchBackend(ModelManager(device="cpu"), threads=1).begin(
        Generation(checkpoint=checkpoint, prompt="a cat", width_px=64, height_px=64, steps=2, scheduler="ddim", seed=1)
    )


def pipe(file: Path) -> None:
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def huge(file: Path) -> None:
    file.touch()
    os.truncate(file, HUGE_BYTES)


@pytest.mark.parametrize("make", [pipe, endless, huge])
@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer/merges.txt", "unet/more.safetensors"])
def test_no_file_of_a_model_makes_the_device_wait(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(UnusableModel) as raised:
        begin(folder)
    assert raised.value.part == "checkpoint:strange"


def test_a_pipe_is_no_tensors_and_no_pickle(tmp_path: Path) -> None:
    pipe(tmp_path / "pipe")
    with pytest.raises(BadHeader, match="no ordinary file"):
        read_table(tmp_path / "pipe")
    for allow in (True, False):
        with pytest.raises(StrangeFile):
            load_pickle(tmp_path / "pipe", pinned=frozenset(), allow=allow)


def test_an_ordinary_file_is_read_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_limited(tmp_path / "link", 5) == b"12345"
    with pytest.raises(StrangeFile, match="more than 4 bytes"):
        read_limited(tmp_path / "file", 4)
    with pytest.raises(OSError):
        open_ordinary(tmp_path)


def test_infinities_in_a_scheduler_are_read_as_diffusers_writes_them(folder: Path) -> None:
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    begin(folder)


def added(count: int) -> dict[str, object]:
    return {"added_tokens_decoder": {str(number): {"content": f"<{number}>"} for number in range(count)}}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", {}),
        ("vocab.json", []),
        ("vocab.json", {"a": "b", "<|startoftext|>": 0, "<|endoftext|>": 1}),
        ("vocab.json", {"a": -1, "<|startoftext|>": 0, "<|endoftext|>": 1}),
        ("vocab.json", {"a": 2**40, "<|startoftext|>": 0, "<|endoftext|>": 1}),
        ("merges.txt", b"\xff\xfe\x00" * 1000),
        ("merges.txt", b"#version\nq zz\n"),
        ("tokenizer_config.json", {"unk_token": 5}),
        ("tokenizer_config.json", {"pad_token": ""}),
        ("tokenizer_config.json", {"eos_token": "\ud800"}),
        ("tokenizer_config.json", {"added_tokens_decoder": "x"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("tokenizer_config.json", added(ADDED_LIMIT + 1)),
        ("special_tokens_map.json", {"bos_token": {"content": 1}}),
        ("tokenizer.json", {"model": []}),
        ("tokenizer.json", {"model": {"vocab": {"a": 1}, "merges": [1]}}),
        ("tokenizer.json", b'{"a":' * 100_000),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_strange_tokenizer_is_the_checkpoints_fault(folder: Path, file: str, content: object) -> None:
    place = folder / "tokenizer" / file
    config = folder / "tokenizer" / "tokenizer_config.json"
    if file == "special_tokens_map.json":
        config.unlink()
    elif file == config.name and isinstance(content, dict):
        content = {**json.loads(config.read_text()), **content}
    place.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UnusableModel) as raised:
        begin(folder)
    assert raised.value.part == "checkpoint:strange"
