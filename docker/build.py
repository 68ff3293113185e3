"""Builds our images with podman: `python docker/build.py IMAGE... [--build-arg NAME=VALUE]...`.

IMAGE: wheels, wheels-cuda or wheels-cuda126 (what the others are made of), wheels-plain (what an image without our
layers is made of, for `benchmarks.cold_start`), or gateway, preprocessor, preprocessor-neural, diffusion; the last two
also with -cuda, or with -cuda126 for older cards. Build arguments are those of docker/Dockerfile. WEIGHTS names
references or profiles: the files of their plan are fetched here and become a layer each, on top of the image.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lock
import lock_index
import repack
import weights_layers
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / "dist" / "wheels"
LOCKS = sorted((ROOT / "docker" / "locks").glob("*.txt"))
PREFIX = "localhost/fanlight"
BASE = f"{PREFIX}/base:bookworm"
TARGETS = ("gateway", "preprocessor", "preprocessor-neural", "diffusion")
# By the end of an image's name, the list of its torch layer.
CUDA_LISTS = {"cuda": "torch-cuda", "cuda126": "torch-cuda126"}
# Lists whose wheels lie in a folder of their own: pip would take their torch for the newest build of the CPU's.
APART = ("torch-cuda126",)
WITH_CUDA = ("preprocessor-neural", "diffusion")


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the images of Fanlight with podman.")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help=f"wheels or wheels-cuda first, then {', '.join(TARGETS)}; or X-cuda, X-cuda126",
    )
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="one of the Dockerfile's, or WEIGHTS"
    )
    parser.add_argument("--tag", default="", help="instead of `latest`, or of a name made from the weights")
    parser.add_argument("--export", type=Path, metavar="DIR", help="build nothing: write them to an OCI layout, zstd")
    asked = parser.parse_args()
    arguments = dict(each.split("=", 1) for each in asked.build_arg)
    for image in asked.images:
        if asked.export:
            export(image, asked.export)
        elif image == "wheels" or image.removeprefix("wheels-") in CUDA_LISTS:
            make_wheels(cuda=CUDA_LISTS.get(image.removeprefix("wheels-"), ""))
        elif image == "wheels-plain":
            make_plain_wheels()
        else:
            print(build(image, arguments, tag=asked.tag))
    return 0


def make_wheels(*, cuda: str = "") -> None:
    """Everything that the images install, by this machine's own pip settings; and our own wheel.

    `cuda`: the list of a torch with CUDA, which is made too.
    """
    WHEELS.mkdir(parents=True, exist_ok=True)
    lists = [path for path in LOCKS if path.stem == cuda or path.stem not in CUDA_LISTS.values()]
    together = [path for path in lists if path.stem not in APART]
    pins = {str(pin): pin for path in together for pin in lock.read(path)}
    if missing := sorted(line for line, pin in pins.items() if not _is_here(pin)):
        _download(*missing)
    for path in (each for each in lists if each.stem in APART):
        _download_apart(path, folder=WHEELS / path.stem)
    for stale in WHEELS.glob("fanlight-*.whl"):
        stale.unlink()
    # What builds it comes from those wheels too.
    offline = ["--no-index", "--find-links", str(WHEELS)]
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "--no-deps", "--wheel-dir", str(WHEELS), str(ROOT))
    if list(WHEELS.glob("fanlight-*-none-any.whl")):
        raise SystemExit("error: canny's loop was not compiled: apt-get install gcc libc6-dev, or set CC")


def make_plain_wheels() -> None:
    """Beside those, everything that `pip install` of the diffusion service asks for, needed or not.

    What no lock has is not held to a hash: it is measured, and in no image of ours.
    """
    make_wheels()
    if missing := [str(pin) for pin in plain_pins() if not _is_here(pin)]:
        _download(*missing)


def plain_pins() -> list[lock.Pin]:
    """What `fanlight[diffusion]` and each of its packages ask for, as they ask for it."""
    pins = lock._pins(ROOT / "constraints.txt")
    names = lock.closure([Requirement(f"{lock.PROJECT}[diffusion]")]) - {lock.PROJECT}
    return [lock.Pin(name=name, version=pins[name]) for name in sorted(names)]


def _download_apart(path: Path, *, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    pins = lock.read(path)
    if unhashed := [pin.requirement for pin in pins if not pin.sha256]:
        raise SystemExit(
            f"error: {path.name} has no sha256 for {', '.join(unhashed)}; get the wheel, compare it with what its "
            "publisher says, and run `python docker/lock.py --wheels DIR`"
        )
    if missing := [str(pin) for pin in pins if not _is_here(pin) and not _is_here(pin, folder)]:
        _download(*missing, into=folder)


def _is_here(pin: lock.Pin, folder: Path | None = None) -> bool:
    """Whether the wheel lies in the folder."""
    # 2.13.0 is also what 2.13.0+cpu is called, but not where it says === 2.13.0.
    patterns = [f"{pin.name.replace('-', '_')}-{pin.version}-*.whl"]
    if pin.equals == "==":
        patterns.append(f"{pin.name.replace('-', '_')}-{pin.version}+*.whl")
    return any(
        fnmatch.fnmatch(path.name.lower(), pattern) for path in (folder or WHEELS).iterdir() for pattern in patterns
    )


def _download(*lines: str, into: Path | None = None) -> None:
    """What lines of a lock say. pip refuses what has another hash; and as soon as one line has a hash, all must."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lock.txt")
        path.write_text("".join(f"{line}\n" for line in lines))
        only = ["--quiet", "--no-deps", *lock_index.WHEELS_OF_THE_IMAGES, "--requirement", str(path)]
        _run(sys.executable, "-m", "pip", "download", *only, "--dest", str(into or WHEELS))


def build(image: str, arguments: dict[str, str], *, tag: str = "") -> str:
    """The name of the image that was built."""
    target = image.removesuffix("-cuda126").removesuffix("-cuda")
    if target not in TARGETS or (image != target and target not in WITH_CUDA):
        raise SystemExit(f"error: {image} is no image of ours: {', '.join(TARGETS)}")
    weights = arguments.get("WEIGHTS", "")
    name = f"{PREFIX}/{image}:{tag if tag and not weights else 'latest'}"
    base = by_digest(arguments.get("BASE_IMAGE", BASE))
    _podman_build(name, target, {**_variant(image), **arguments, "BASE_IMAGE": base})
    if not weights:
        return name
    baked = f"{PREFIX}/{image}:{tag or _tag_of(weights)}"
    weights_layers.bake(name, baked, weights.split(), pipeline=arguments.get("PIPELINE", ""))
    return baked


def by_digest(base: str) -> str:
    """The name of a base image with its digest, which one that was made here has by now. SystemExit without any."""
    if "@sha256:" in base:
        return base
    if not base.startswith("localhost/"):
        raise SystemExit(f"error: BASE_IMAGE={base} may be another image tomorrow; name it as {base}@sha256:DIGEST")
    command = ["podman", "image", "inspect", "--format", "{{.Digest}}", base]
    digest = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not digest.startswith("sha256:"):
        raise SystemExit(f"error: there is no image {base}; run docker/base/make.sh {base}")
    return f"{base.rpartition(':')[0]}@{digest}"


def _variant(image: str) -> dict[str, str]:
    cuda = CUDA_LISTS.get(image.rpartition("-")[2])
    return {"TORCH": cuda} if cuda else {}


def _tag_of(weights: str) -> str:
    return f"weights-{hashlib.sha256(weights.encode()).hexdigest()[:12]}"


def _podman_build(name: str, target: str, arguments: dict[str, str]) -> None:
    """The same sources give the same layers: no time of day is in them. No network: the wheels lie here."""
    passed = [part for key, value in arguments.items() if key not in ("WEIGHTS", "PIPELINE")
              for part in ("--build-arg", f"{key}={value}")]  # fmt: skip
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    how = ["--quiet", "--layers", "--timestamp", "0", "--network", "none", "--file", "docker/Dockerfile"]
    stamp = ["--build-arg", f"REVISION={revision.stdout.strip() or 'unknown'}"]
    _run("podman", "build", *how, *passed, *stamp, "--target", target, "--tag", name, ".")


def export(image: str, folder: Path) -> None:
    """With zstd layers, which unpack many times as fast as gzip's and are smaller. `image` may have a tag."""
    name = BASE if image == "base" else f"{PREFIX}/{image if ':' in image else f'{image}:latest'}"
    folder.mkdir(parents=True, exist_ok=True)
    tag = image.replace(":", "-")
    how = ["--quiet", "--dest-oci-accept-uncompressed-layers"]
    _run("skopeo", "copy", *how, f"containers-storage:{name}", f"oci:{folder}:{tag}")
    repack.repack(folder, tag)
    drop_stale(folder)


def drop_stale(folder: Path) -> None:
    """What an earlier build left in a layout: manifests that lost their name to a later one, and blobs of theirs."""
    index = json.loads((folder / "index.json").read_text())
    index["manifests"] = [each for each in index["manifests"] if each.get("annotations")]
    (folder / "index.json").write_text(json.dumps(index))
    blobs = folder / "blobs" / "sha256"
    kept = {each["digest"].partition(":")[2] for each in index["manifests"]}
    for name in list(kept):
        manifest = json.loads((blobs / name).read_text())
        kept |= {each["digest"].partition(":")[2] for each in (manifest["config"], *manifest["layers"])}
    for path in blobs.iterdir():
        if path.name not in kept:
            path.unlink()


def _run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})


if __name__ == "__main__":
    sys.exit(main())
