"""Every command of `benchmarks/` runs, with tiny numbers, and writes figures.

Each is a process of its own, forked from one that has imported torch and diffusers once for all of them.
"""

import importlib
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from benchmarks.commands import COMMANDS, PARTS, ROOT, Command
from benchmarks.figures import load

LIMIT_S = 240.0
# What most of the processes import; the rest is theirs.
PRELOADED = ["benchmarks.models", "benchmarks.diffusion_shapes"]


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # The server and the services that benchmarks start must find this checkout. One thread: the numbers are nothing
        # to share, and threads of several processes on few cores wait for one another.
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


def smoke(words: list[str], figures: Path, log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main = importlib.import_module(f"benchmarks.{words[0]}").main
    code = main([*words[1:], "--smoke", "--json", str(figures)])
    sys.stdout.flush()
    sys.exit(code)


# Those that differ only in a full run's options are one here.
KINDS = list({tuple(each.words): each for each in reversed(COMMANDS)}.values())[::-1]


@pytest.mark.parametrize("command", KINDS, ids=[" ".join(each.words) for each in KINDS])
def test_every_benchmark_runs_and_writes_its_figures(
    command: Command, forks: ForkServerContext, tmp_path: Path
) -> None:
    if reason := command.missing(smoke=True):
        pytest.skip(reason)
    path, log = tmp_path / "figures.json", tmp_path / "log"
    process = forks.Process(target=smoke, args=(command.words, path, log))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    figures = load(path)
    assert figures, "no figure was written"
    assert all(math.isfinite(each.value) and each.what for each in figures)
    assert [each.to_json() for each in figures] == json.loads(path.read_text())
    keys = [(each.what, each.against, each.column) for each in figures]
    assert len(set(keys)) == len(keys), "two figures have one name"


def test_no_command_is_left_out() -> None:
    has_main = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if has_main.search(path.read_text())}
    assert runnable == {each.module for each in COMMANDS} | set(PARTS)
