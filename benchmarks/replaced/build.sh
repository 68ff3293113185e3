#!/usr/bin/env bash
# Builds the two images that Fanlight replaces, without their weights, into dist/replaced: gzip layers, as Docker pushes
# them. benchmarks/images_bytes.py counts them. Nothing but torch is held to a version.
#
#   benchmarks/replaced/build.sh      as root, after `make images`; needs debootstrap, podman, skopeo, Debian's archive
set -euo pipefail
cd "$(dirname "$0")/../.."

out=dist/replaced
base=localhost/fanlight-bench/debian:bookworm
torch=$(grep '^torch==' constraints.txt)
mkdir -p "$out/wheels"
.venv/bin/python -m pip download --quiet --dest "$out/wheels" --find-links dist/wheels "$torch" pip \
    waitress controlnet_aux Flask mediapipe rembg onnxruntime diffusers transformers accelerate compel torchsde timm

if ! podman image exists "$base"; then
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/fanlight-replaced.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$work/tree" > "$work/log" 2>&1 ||
        { tail -20 "$work/log" >&2; exit 1; }
    rm -rf "$work/tree/var/cache/apt/"* "$work/tree/var/lib/apt/lists/"*
    tar --directory "$work/tree" --numeric-owner --exclude='./dev/*' -cf "$work/base.tar" .
    podman import --quiet "$work/base.tar" "$base" > /dev/null
fi
for image in preprocessor diffusion; do
    podman build --quiet --network host --build-arg "BASE_IMAGE=$base" \
        --file "benchmarks/replaced/$image.Dockerfile" --tag "localhost/fanlight-bench/$image" "$out"
    skopeo copy --quiet --dest-compress-format gzip "containers-storage:localhost/fanlight-bench/$image:latest" \
        "oci:$out:$image"
done
