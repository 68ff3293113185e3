"""What the package index says of a pinned package: the sha256 of the wheel that the images take, and its license."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

PYTHON = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none")
# Up to the oldest glibc that the base image's Debian or Ubuntu may have, what wheels call those that they need. pip
# takes the wheel of the first: what is built for a newer glibc is built by newer compilers, with newer libraries in it.
GLIBCS = (*(f"_2_{minor}" for minor in range(28, 16, -1)), "2014")
PLATFORMS = [part for tag in GLIBCS for part in ("--platform", f"manylinux{tag}_x86_64")]
WHEELS_OF_THE_IMAGES = ("--only-binary=:all:", *PYTHON, *PLATFORMS, "--platform", "linux_x86_64")
# Longer texts in a package's field `License` are the license itself, not its name.
LICENSE_NAME_LIMIT = 60
# What packages write there or in their classifiers, and the SPDX identifier that it stands for.
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD-like": "BSD License",
    "Expat": "MIT",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSF": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 3-Clause": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "new BSD": "BSD-3-Clause",
}
# What some write there and is no license.
NO_LICENSE = {"", "UNKNOWN", "Dual License"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    sha256: str
    # An SPDX expression where the package's metadata has one, else a name; empty where it says nothing.
    license: str


def ask(pins: Sequence[str], *, folders: Iterable[Path] = ()) -> Mapping[str, Wheel]:
    """By canonical name, what pip would take for each `name==version`, by this machine's pip settings.

    `folders`: where to look for wheels besides. CalledProcessError where pip does not find one.
    """
    beside = [part for folder in folders for part in ("--find-links", str(folder))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        how = ["--dry-run", "--no-deps", "--ignore-installed", "--target", folder, "--quiet", "--report", str(report)]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
        subprocess.run([*command, *how, *WHEELS_OF_THE_IMAGES, *beside, *pins], check=True)
        found = json.loads(report.read_text())["install"]
    return {canonicalize_name(each["metadata"]["name"]): _wheel(each) for each in found}


def _wheel(found: Mapping[str, Any]) -> Wheel:
    return Wheel(sha256=found["download_info"]["archive_info"]["hashes"]["sha256"], license=_license(found["metadata"]))


def _license(metadata: Mapping[str, Any]) -> str:
    if expression := metadata.get("license_expression"):
        return str(expression)
    stated = str(metadata.get("license") or "").strip()
    classifiers = [
        each.rpartition(" :: ")[2] for each in metadata.get("classifier", ()) if each.startswith("License ::")
    ]
    if stated in NO_LICENSE or "\n" in stated or len(stated) > LICENSE_NAME_LIMIT:
        stated = " AND ".join(sorted({SPDX.get(each, each) for each in classifiers}))
    return SPDX.get(stated, stated)
