"""Compiles what is written in C, where there is a C compiler; without it a library does the same, slower."""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("services/preprocessor/annotators/gradient.c")
LIBRARY = SOURCE.with_name("libgradient.so")
FLAGS = ("-std=c11", "-O3", "-Wall", "-Wextra", "-fPIC", "-shared", "-s")


class Compiled(BuildHookInterface[BuilderConfig]):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if problem := compile_into(Path(self.root)):
            self.app.display_warning(f"canny will take more time: {problem}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
        build_data.update(pure_python=False, tag=f"py3-none-{platform}")


def compile_into(root: Path) -> str:
    """What went wrong; empty where the library was made. An old one never stays."""
    (root / LIBRARY).unlink(missing_ok=True)
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, "-o", str(LIBRARY), str(SOURCE)], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"no C compiler runs as {shlex.join(compiler)}: {error.strerror}"
    return f"{shlex.join(compiler)} says {done.stderr.strip()}" if done.returncode else ""
