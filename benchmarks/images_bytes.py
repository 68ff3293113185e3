"""Bytes that a node fetches until its first ControlNet image: our images and weights beside the layout they replace.

usage: python -m benchmarks.images_bytes     after `make images` and benchmarks/replaced/build.sh; asks no network

Ours is counted: the layers in dist/images, and the plan of `fanlight weights`. Of the replaced layout the images are
built from its Dockerfiles of 2023, with the same build of torch, and counted above their base, for which ours is taken;
its weights are not on this machine and are added as the sizes of the files that its Dockerfiles copy: a preprocessor
with all its annotators, a diffusion image with every ControlNet.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import RATIO, Report, arguments

ROOT = Path(__file__).parent.parent
OURS, REPLACED = ROOT / "dist" / "images", ROOT / "dist" / "replaced"
PLAN = ("weights", "plan", "first-controlnet-image", "--pipeline", "controlnet", "--json")
# The same plan where another node has published its tensors' digests, and from a mirror of one's own that has packed
# them: `python -m benchmarks.weights_bytes` counts both at the server, divided by 256.
WITH_DIGESTS, FROM_A_MIRROR = 10_892_917 * 256, 9_186_003 * 256

# Weights, from the pointers in the repositories that the Dockerfiles copy or download from.
ANNOTATORS = 2_433_517_572 + 2_564_550_879  # thirteen files of lllyasviel/Annotators, and SAM's vit_h
SAFETY_CHECKER = 1_216_061_799 + 605_000_000  # fp32, and the CLIP beside it
STABLE_DIFFUSION_FP32 = 3_438_167_540 + 492_265_874 + 334_643_276
# Until September 2023, when 21.1 GB were published, the ControlNets were copied in fp32; then in fp16.
CONTROLNETS, CONTROLNET_FP16, CONTROLNET_FP32 = 12, 722_598_642, 1_445_157_124
FORMS = {"fp32 ControlNets, as published": CONTROLNET_FP32, "fp16 ControlNets, its last form": CONTROLNET_FP16}


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments(__doc__).parse_args(argv)
    if missing := [str(path) for path in (OURS, REPLACED) if not (path / "index.json").exists()]:
        print(f"{', '.join(missing)}: not there; see {__name__}", file=sys.stderr)
        return 2
    report = Report()
    done = subprocess.run([sys.executable, "-m", "fanlight.cli.main", *PLAN], cwd=ROOT, capture_output=True, check=True)
    images = sum((layers_of(OURS, "preprocessor") | layers_of(OURS, "diffusion")).values())
    base = next(iter(layers_of(OURS, "base").values()))
    others = sum(sum(list(layers_of(REPLACED, name).values())[1:]) for name in ("preprocessor", "diffusion"))
    weights = {
        "weights from the hub": json.loads(done.stdout)["fetch_bytes"],
        "from the hub, tensor digests known": WITH_DIGESTS,
        "from a mirror of one's own": FROM_A_MIRROR,
    }
    for source, size in weights.items():
        report.add(source, (images + size) / 1e9, "GB", column="GB")
    for form, controlnet in FORMS.items():
        theirs = base + others + ANNOTATORS + SAFETY_CHECKER + STABLE_DIFFUSION_FP32 + CONTROLNETS * controlnet
        for source, size in weights.items():
            column = f"of the replaced, {form}, {theirs / 1e9:.2f} GB"
            report.add(source, (images + size) / theirs, RATIO, column=column, goal=1 / 8)
    report.save(asked.json)
    return 0


def layers_of(layout: Path, tag: str) -> dict[str, int]:
    index = json.loads((layout / "index.json").read_text())
    digests = [each["digest"] for each in index["manifests"] if tag in each.get("annotations", {}).values()]
    manifest = json.loads((layout / "blobs" / digests[-1].replace(":", "/")).read_text())
    return {layer["digest"]: layer["size"] for layer in manifest["layers"]}


if __name__ == "__main__":
    sys.exit(main())
