"""Bytes that a node fetches until its first ControlNet picture: our images and weights beside the layout they replace.

usage: python -m benchmarks.images_bytes     after `make images`; asks no network

Ours is counted: the layers in dist/images, and the plan of `fanlight weights`. The replaced layout is arithmetic, its
weights are not on this machine: a preprocessor with all its annotators' files and a diffusion image with every
ControlNet, as its Dockerfiles of 2023 lay them out, on our base image and with the same build of torch as ours.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYOUT = ROOT / "dist" / "images"
PLAN = ("weights", "plan", "first-controlnet-image", "--pipeline", "controlnet", "--json")

# Weights, from the pointers in the repositories that the Dockerfiles copy or download from.
ANNOTATORS = 2_433_517_572 + 2_564_550_879  # thirteen files of lllyasviel/Annotators, and SAM's vit_h
SAFETY_CHECKER = 1_216_061_799 + 605_000_000  # fp32, and the CLIP beside it
STABLE_DIFFUSION_FP32 = 3_438_167_540 + 492_265_874 + 334_643_276
CONTROLNETS, CONTROLNET_FP16, CONTROLNET_FP32 = 12, 722_598_642, 1_445_157_124
# Wheels beside torch, as the index sizes them.
PREPROCESSOR_WHEELS = 61_204_038 + 70_000_000 + 36_000_000 + 24_000_000 + 37_000_000 + 14_000_000 + 60_000_000
DIFFUSION_WHEELS = 13_336_114 + 6_355_908 + 3_396_193 + 16_918_164 + 7_140_667
TORCH_CPU, TORCH_CUDA = 191_794_682, 2_740_000_000
# What the published images weighed, GPU and all.
PUBLISHED = 7_500_000_000 + 21_100_000_000


def main() -> int:
    if not (LAYOUT / "index.json").exists():
        print("dist/images is not there: `make images` writes it", file=sys.stderr)
        return 2
    done = subprocess.run([sys.executable, "-m", "fanlight.cli.main", *PLAN], cwd=ROOT, capture_output=True, check=True)
    weights = json.loads(done.stdout)["fetch_bytes"]
    layers = layers_of("preprocessor") | layers_of("diffusion")
    ours, base = sum(layers.values()) + weights, next(iter(layers_of("base").values()))
    print(f"ours: {gigabytes(ours)}, of it weights {gigabytes(weights)}")
    for name, controlnet in (("fp16 ControlNets", CONTROLNET_FP16), ("fp32 ControlNets", CONTROLNET_FP32)):
        theirs = replaced(base, controlnet)
        print(f"replaced, {name}: {gigabytes(theirs)}; ours is 1/{theirs / ours:.1f}")
    with_cuda = ours - TORCH_CPU + TORCH_CUDA
    print(f"with CUDA, ours: {gigabytes(with_cuda)}; published: {gigabytes(PUBLISHED)}, 1/{PUBLISHED / with_cuda:.1f}")
    return 0


def gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def replaced(base: int, controlnet: int) -> int:
    preprocessor = TORCH_CPU + PREPROCESSOR_WHEELS + ANNOTATORS
    models = SAFETY_CHECKER + STABLE_DIFFUSION_FP32 + CONTROLNETS * controlnet
    # The base is shared; torch is not: each image installs its own.
    return base + preprocessor + TORCH_CPU + DIFFUSION_WHEELS + models


def layers_of(tag: str) -> dict[str, int]:
    index = json.loads((LAYOUT / "index.json").read_text())
    digests = [each["digest"] for each in index["manifests"] if tag in each["annotations"].values()]
    manifest = json.loads((LAYOUT / "blobs" / digests[-1].replace(":", "/")).read_text())
    return {layer["digest"]: layer["size"] for layer in manifest["layers"]}


if __name__ == "__main__":
    sys.exit(main())
