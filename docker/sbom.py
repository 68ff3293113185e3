"""Writes dist/sbom/: what is in each image and in our wheel, as CycloneDX JSON, valid by its schema.

Packages with version, sha256 and license as docker/locks says; Debian's packages of the base image are its scanner's
to list, and weights are `fanlight weights list`'s.

usage: .venv/bin/python docker/sbom.py [--out DIR] [--base NAME@sha256:DIGEST]
"""

import argparse
import hashlib
import json
import sys
import tomllib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lock
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT = lock.HERE.parent
OUT = ROOT / "dist" / "sbom"
WHEELS = ROOT / "dist" / "wheels"
# By the end of an image's name, the list of its torch.
TORCHES = {"": "torch", "-cuda": "torch-cuda", "-cuda126": "torch-cuda126"}
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:fanlight:sbom")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--base", default="", help="the base image that was taken; the Dockerfile's without it")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, bom in boms(base=asked.base or base_of_dockerfile()).items():
        path = asked.out / f"{name}.cdx.json"
        path.write_text(text_of(bom))
        print(f"{path}: {len(bom.components)} components")
    return 0


def boms(*, base: str) -> Mapping[str, Bom]:
    """By the name of the image, or `wheel`."""
    licenses = json.loads(lock.LICENSES.read_text())
    made = {
        name: _bom(_image(name), [_base(base), _own(), *_packages(pins, licenses)]) for name, pins in images().items()
    }
    return {**made, "wheel": _bom(_own(), _packages(wheel(), licenses))}


def images() -> Mapping[str, Sequence[lock.Pin]]:
    """Every image and its variants, and the packages of each."""
    described = tomllib.loads((lock.HERE / "layers.toml").read_text())["images"]
    return {
        f"{name}{ending}": _unique(pin for each in lists for pin in _read(torch if each == "TORCH" else each))
        for name, lists in described.items()
        for ending, torch in TORCHES.items()
        if "TORCH" in lists or not ending
    }


def wheel() -> Sequence[lock.Pin]:
    """What `pip install` of our wheel brings, without extras; the locks have all of it."""
    needed = lock.closure([Requirement(lock.PROJECT)]) - {lock.PROJECT}
    return _unique(pin for name in ("common", "gateway", "worker") for pin in _read(name) if pin.name in needed)


def text_of(bom: Bom) -> str:
    """The same for the same locks: no time of day, no random number. ValueError if the schema refuses it."""
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    document = json.loads(text)
    document["metadata"].pop("timestamp", None)
    document["serialNumber"] = ""
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(NAMESPACE, json.dumps(document, sort_keys=True))}"
    text = json.dumps(document, indent=1) + "\n"
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"not valid CycloneDX 1.6: {fault}")
    return text


def base_of_dockerfile() -> str:
    lines = (lock.HERE / "Dockerfile").read_text().splitlines()
    return next(line for line in lines if line.startswith("ARG BASE_IMAGE=")).partition("=")[2]


def _bom(root: Component, parts: Iterable[Component]) -> Bom:
    bom = Bom(components=parts)
    bom.metadata.component = root
    bom.register_dependency(root, bom.components)
    return bom


def _image(name: str) -> Component:
    return Component(name=f"fanlight/{name}", version=_version(), type=ComponentType.CONTAINER, bom_ref=f"image:{name}")


def _base(name: str) -> Component:
    tagged, _, digest = name.partition("@sha256:")
    repository, _, tag = tagged.rpartition(":") if ":" in tagged.rpartition("/")[2] else (tagged, "", "")
    return Component(
        name=repository,
        version=tag or f"sha256:{digest}",
        type=ComponentType.CONTAINER,
        bom_ref=f"base:{name}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        scope=ComponentScope.REQUIRED,
    )


def _own() -> Component:
    """Our wheel; with its hash where `docker/build.py wheels` has made it."""
    made = sorted(WHEELS.glob(f"{lock.PROJECT}-{_version()}-*.whl"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in made]
    return Component(
        name=lock.PROJECT,
        version=_version(),
        type=ComponentType.APPLICATION,
        bom_ref=f"pkg:pypi/{lock.PROJECT}@{_version()}",
        purl=PackageURL("pypi", name=lock.PROJECT, version=_version()),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=each) for each in hashes[:1]],
        licenses=[LicenseFactory().make_from_string("Apache-2.0")],
    )


def _packages(pins: Iterable[lock.Pin], licenses: Mapping[str, str]) -> Sequence[Component]:
    return [_package(pin, licenses.get(pin.requirement, "")) for pin in pins]


def _package(pin: lock.Pin, stated: str) -> Component:
    purl = PackageURL("pypi", name=pin.name, version=pin.version)
    return Component(
        name=pin.name,
        version=pin.version,
        type=ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        purl=purl,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=pin.sha256)] if pin.sha256 else [],
        licenses=[_license(stated)] if stated else [],
    )


def _license(stated: str) -> License:
    """By its SPDX identifier or expression where it is one, else by the name that the package gives it."""
    found: License = LicenseFactory().make_from_string(stated)
    return found


def _read(name: str) -> Sequence[lock.Pin]:
    return lock.read(lock.LOCKS / f"{name}.txt")


def _unique(pins: Iterable[lock.Pin]) -> Sequence[lock.Pin]:
    return sorted({pin.requirement: pin for pin in pins}.values(), key=str)


def _version() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


if __name__ == "__main__":
    sys.exit(main())
