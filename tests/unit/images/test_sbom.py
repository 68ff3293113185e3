"""What is in the images and the wheel, as CycloneDX; and whether a list of vulnerabilities knows it."""

import importlib
import json
import re
import zipfile
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[3] / "docker"
BASE = f"docker.io/library/python:3.11@sha256:{'c' * 64}"


@pytest.fixture
def sbom(monkeypatch):
    monkeypatch.syspath_prepend(DOCKER)
    return importlib.import_module("sbom")


@pytest.fixture
def vulnerabilities(monkeypatch):
    monkeypatch.syspath_prepend(DOCKER)
    return importlib.import_module("vulnerabilities")


def test_every_image_and_the_wheel_have_a_valid_bill_of_their_packages(sbom):
    made = {name: json.loads(sbom.text_of(bom)) for name, bom in sbom.boms(base=BASE).items()}
    assert made.keys() == {
        *("gateway", "preprocessor", "wheel"),
        *(f"{name}{ending}" for name in ("preprocessor-neural", "diffusion") for ending in ("", "-cuda", "-cuda126")),
    }
    parts = {each["name"]: each for each in made["gateway"]["components"]}
    (license_,) = parts["fastapi"]["licenses"]
    assert license_ == {"license": {"id": "MIT"}}
    assert re.fullmatch("[0-9a-f]{64}", parts["fastapi"]["hashes"][0]["content"])
    assert parts["fastapi"]["purl"] == f"pkg:pypi/fastapi@{parts['fastapi']['version']}"
    assert parts["docker.io/library/python"]["hashes"] == [{"alg": "SHA-256", "content": "c" * 64}]
    assert {"fanlight", "grpcio", "cryptography"} <= parts.keys()
    assert "torch" not in parts
    assert {each["name"] for each in made["wheel"]["components"]} >= {"grpcio", "protobuf", "typer"}


def test_no_package_is_without_a_hash_and_few_without_a_license(sbom):
    for name, bom in sbom.boms(base=BASE).items():
        bare = {each.name for each in bom.components if not each.hashes} - {"fanlight"}
        assert bare == ({"torch"} if name.endswith("cuda126") else set()), name
        unlicensed = {each.name for each in bom.components if not each.licenses}
        assert unlicensed <= {"cuda-toolkit", "torch", "docker.io/library/python"}, name


def test_a_bill_is_the_same_bytes_whenever_it_is_written(sbom):
    first, second = (sbom.text_of(sbom.boms(base=BASE)["gateway"]) for _ in range(2))
    assert first == second
    other = sbom.text_of(sbom.boms(base=BASE.replace("c", "d"))["gateway"])
    assert json.loads(other)["serialNumber"] != json.loads(first)["serialNumber"]


def test_the_lists_of_an_image_are_those_that_the_dockerfile_copies(sbom):
    stages = dict(_stages((DOCKER / "Dockerfile").read_text()))
    for name, pins in sbom.images().items():
        if not name.endswith(("-cuda", "-cuda126")):
            lists = _copied(stages, name) - {"app"}
            expected = {pin.requirement for each in lists for pin in sbom.lock.read(DOCKER / "locks" / f"{each}.txt")}
            assert {pin.requirement for pin in pins} == expected, name


def _stages(text):
    for part in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        parent, name = re.match(r"(\S+) AS (\S+)", part).groups()
        yield name, (parent, part)


def _copied(stages, name):
    """The layers that a stage and those that it stands on copy into /opt/fanlight/lib."""
    if name not in stages:
        return set()
    parent, text = stages[name]
    own = set(re.findall(r"^COPY --from=\S+ /layers/(\S+) /opt/fanlight/lib", text, flags=re.MULTILINE))
    return own | _copied(stages, parent)


def record(**affected):
    return {
        "id": "TEST-1",
        "summary": "a hole",
        "affected": [{"package": {"ecosystem": "PyPI", **affected.pop("package")}, **affected}],
    }


def ranges(*events):
    return [{"type": "ECOSYSTEM", "events": list(events)}]


@pytest.mark.parametrize(
    ("events", "is_hit"),
    [
        ([{"introduced": "0"}], True),
        ([{"introduced": "0"}, {"fixed": "0.0.1"}], False),
        ([{"introduced": "0"}, {"fixed": "9999"}], True),
        ([{"introduced": "9999"}], False),
        ([{"introduced": "0"}, {"last_affected": "{version}"}], True),
        ([{"introduced": "0"}, {"fixed": "{version}"}], False),
        ([{"introduced": "{version}"}, {"fixed": "9999"}], True),
        ([{"introduced": "0"}, {"fixed": "0.0.1"}, {"introduced": "{version}"}], True),
    ],
)
def test_a_version_is_found_by_ranges(vulnerabilities, events, is_hit):
    (version,) = {version for name, version in vulnerabilities._pins() if name == "fastapi"}
    events = [{key: text.format(version=version) for key, text in each.items()} for each in events]
    found = vulnerabilities.scan([record(package={"name": "FastAPI"}, ranges=ranges(*events))])
    assert bool(found) is is_hit
    if found:
        assert str(found[0]) == f"fastapi {version} (gateway): TEST-1: a hole"


def test_a_version_is_found_by_its_name_and_a_local_build_by_its_public_part(vulnerabilities):
    found = vulnerabilities.scan([record(package={"name": "torch"}, versions=["2.13.0"])])
    assert {each.version for each in found} == {"2.13.0", "2.13.0+cu126"}


def test_other_ecosystems_and_withdrawn_records_say_nothing(vulnerabilities):
    npm = record(package={"name": "fastapi", "ecosystem": "npm"}, ranges=ranges({"introduced": "0"}))
    withdrawn = {**record(package={"name": "fastapi"}, ranges=ranges({"introduced": "0"})), "withdrawn": "2026-01-01"}
    assert vulnerabilities.scan([npm, withdrawn]) == []


@pytest.mark.parametrize("form", ["folder", "zip", "file"])
def test_a_list_is_a_folder_a_zip_or_a_file_and_the_exit_code_tells(
    vulnerabilities, monkeypatch, tmp_path, capsys, form
):
    text = json.dumps(record(package={"name": "grpcio"}, ranges=ranges({"introduced": "0"})))
    path = tmp_path / "list"
    if form == "folder":
        path.mkdir()
        (path / "TEST-1.json").write_text(text)
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("TEST-1.json", text)
    else:
        path.write_text(f"[{text}]")
    monkeypatch.setattr("sys.argv", ["vulnerabilities", "--osv", str(path)])
    assert vulnerabilities.main() == 1
    assert "grpcio" in capsys.readouterr().out


def test_without_a_list_it_says_how_to_get_one(vulnerabilities, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vulnerabilities"])
    monkeypatch.setattr(vulnerabilities.shutil, "which", lambda name: None)
    assert vulnerabilities.main() == 2
    assert "pip-audit" in capsys.readouterr().err
