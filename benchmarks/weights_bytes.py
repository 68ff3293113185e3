"""Bytes over the link until the first image, counted at the server, against what others fetch.

Serves fake repositories with the real repositories' files and sizes, divided by `--divide`, over the hub's API on
loopback, and lets Fanlight, diffusers and huggingface_hub each fetch what they take for the same image.
Run: `python -m benchmarks.weights_bytes [--divide 256]`.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from services.weights.catalog import shipped
from services.weights.destinations import FolderDestination
from services.weights.publishing import publish
from services.weights.settings import WeightsSettings
from services.weights.store import WeightStore
from tests.fakes.range_server import RangeServer
from tests.fakes.weight_sites import put_repository, safetensors

SD, CANNY = "runwayml/stable-diffusion-v1-5", "lllyasviel/control_v11p_sd15_canny"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DECODER_SHARE = 99.0 / 167.3
# DreamShaper 8 in one file: bytes of its parts in fp16.
PARTS = {"model.diffusion_model": 1_719_049_000, "cond_stage_model": 246_120_000, "first_stage_model": 167_310_000}


def _body(path: str, size: int, chance: random.Random) -> bytes:
    """A file of about the size; safetensors are sound, a VAE has its two halves, and fp16 is as numbers are trained."""
    if not path.endswith(".safetensors"):
        return chance.randbytes(size)
    size = max(size - 200, 16)
    size -= size % 2
    if not path.startswith("vae/"):
        return safetensors({"w": _numbers(size, chance)}, dtype="F16")
    decoder = int(size * DECODER_SHARE) // 2 * 2
    halves = {"decoder.w": decoder - 8, "post_quant_conv.w": 8, "encoder.w": size - decoder - 8, "quant_conv.w": 8}
    return safetensors({name: _numbers(count, chance) for name, count in halves.items()}, dtype="F16")


def _numbers(size: int, chance: random.Random) -> bytes:
    """fp16 around 0, as far apart as a trained layer's."""
    drawn = np.random.default_rng(chance.getrandbits(32)).normal(0, 0.02, size // 2)
    return drawn.astype(np.float16).tobytes()


def _repository(entry: str, divide: int) -> dict[str, bytes]:
    chance = random.Random(entry)
    files = {}
    for file in shipped().require(entry).files:
        is_small = file.size_bytes < 20_000
        files[file.path] = _body(file.path, file.size_bytes if is_small else file.size_bytes // divide, chance)
    if "model_index.json" in files:
        files["model_index.json"] = json.dumps(INDEX).encode()
    for path in files:
        if path.endswith("config.json"):
            files[path] = b"{}"
    return files


def _checkpoint(seed: str, divide: int, shared: Mapping[str, bytes]) -> bytes:
    unet = random.Random(seed).randbytes(PARTS["model.diffusion_model"] // divide)
    return safetensors({"model.diffusion_model.w": unet, **shared})


async def _ours(server: RangeServer, folder: Path, references: list[str], pipeline: str, **values: object) -> int:
    """Bytes that the server sent for files; listings are not weights and are left out, as for the others."""
    before = _file_bytes(server)
    settings = WeightsSettings(dir=folder, hf_endpoint=server.url, **values)  # type: ignore[arg-type]
    async with WeightStore.open(settings) as store:
        for reference in references:
            await store.ensure(reference, pipeline)
    return _file_bytes(server) - before


def _file_bytes(server: RangeServer) -> int:
    lists = ("/api/", "/mirror/catalog.json")
    return sum(count for path, count in server.sent_bytes.items() if not path.startswith(lists))


def _others(server: RangeServer, code: str) -> int:
    before = _file_bytes(server)
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}
        subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL, timeout=1800)
    return _file_bytes(server) - before


DIFFUSERS = f"""
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
DiffusionPipeline.download("{SD}", variant="fp16", use_safetensors=True)
for name in ("config.json", "diffusion_pytorch_model.fp16.safetensors"):
    hf_hub_download("{CANNY}", name)
"""
SNAPSHOT = f"""
from huggingface_hub import snapshot_download
snapshot_download("{SD}")
snapshot_download("{CANNY}")
"""


async def _digests(server: RangeServer, folder: Path, references: list[str]) -> str:
    """What a node that fetched the whole files publishes for the next."""
    async with WeightStore.open(WeightsSettings(dir=folder, hf_endpoint=server.url)) as store:
        for reference in references:
            await store.ensure(reference, "img2img")
        tables = [store.objects.tables_of(model.name) for model in await store.inventory()]
    rows = {sha: table.to_json() for found in tables for sha, table in found.items()}
    return json.dumps({"tensor_tables": rows})


async def _mirror(server: RangeServer, folder: Path, views: list[str], mirror: Path) -> str:
    """The address of a mirror with what a node holds."""
    async with WeightStore.open(WeightsSettings(dir=folder, hf_endpoint=server.url)) as store:
        await store.run(publish, store.objects, views, FolderDestination(mirror))
    return _serve_folder(server, mirror)


def _serve_folder(server: RangeServer, mirror: Path) -> str:
    for path in mirror.iterdir():
        server.put(f"/mirror/{path.name}", path)
    return f"{server.url}/mirror"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--divide", type=int, default=256, help="real sizes are divided by this")
    divide = parser.parse_args().divide
    with RangeServer() as server, tempfile.TemporaryDirectory() as name:
        folder, catalog = Path(name), Path(name) / "catalog"
        catalog.mkdir()
        put_repository(server, SD, _repository("sd15", divide))
        put_repository(server, CANNY, _repository("controlnet-canny", divide))
        chance = random.Random("parts")
        decoder = int(PARTS["first_stage_model"] * DECODER_SHARE)
        sizes = {
            "cond_stage_model.w": PARTS["cond_stage_model"],
            "first_stage_model.decoder.w": decoder,
            "first_stage_model.encoder.w": PARTS["first_stage_model"] - decoder,
        }
        shared = {part: chance.randbytes(size // divide) for part, size in sizes.items()}
        checkpoints = [_checkpoint(seed, divide, shared) for seed in ("one", "two")]
        for number, body in enumerate(checkpoints, start=1):
            put_repository(server, f"someone/checkpoint{number}", {"file.safetensors": body})
        _report(asyncio.run(_measure(server, folder, catalog)), divide, len(checkpoints[1]), _total(server))


def _total(server: RangeServer) -> dict[str, int]:
    return {"diffusers": _others(server, DIFFUSERS), "snapshot": _others(server, SNAPSHOT)}


async def _measure(server: RangeServer, folder: Path, catalog: Path) -> dict[str, int]:
    # At a revision, so that the fake hub is asked and not the catalog, whose digests are those of the real files.
    sd, canny = f"hf:{SD}@{'c0ffee' + '0' * 34}", f"hf:{CANNY}@{'c0ffee' + '0' * 34}"
    ones = [f"hf:someone/checkpoint{n}/file.safetensors" for n in (1, 2)]
    plain = await _ours(server, folder / "plain", [sd, canny], "controlnet")
    text = await _ours(server, folder / "text", [sd], "text2img")
    (catalog / "digests.json").write_text(await _digests(server, folder / "publisher", [sd, canny, *ones]))
    with_digests = await _ours(server, folder / "digests", [sd, canny], "controlnet", catalog_dir=catalog)
    text_digests = await _ours(server, folder / "text digests", [sd], "text2img", catalog_dir=catalog)
    views = [f"{name}@{'c0ffee' + '0' * 34}" for name in (SD, CANNY)]
    mirror = await _mirror(server, folder / "publisher", views, folder / "mirror")
    packed = await _ours(server, folder / "packed", [sd, canny], "controlnet", mirrors=mirror)
    await _ours(server, folder / "family", ones[:1], "text2img", catalog_dir=catalog)
    following = await _ours(server, folder / "family", ones[1:], "text2img", catalog_dir=catalog)
    return {
        "controlnet, no digests": plain,
        "controlnet": with_digests,
        "controlnet, from a mirror": packed,
        "text2img, no digests": text,
        "text2img": text_digests,
        "next checkpoint": following,
    }


def _report(ours: Mapping[str, int], divide: int, single_file: int, others: Mapping[str, int]) -> None:
    print(f"Sizes divided by {divide}; bytes sent by the server.")
    print("| what | bytes | against | ratio | at most |")
    print("|---|---|---|---|---|")
    fp16 = ("diffusers variant=fp16 with safety checker + ControlNet", others["diffusers"])
    all_files = ("snapshot_download of both", others["snapshot"])
    rows = [
        ("controlnet", *fp16, "0.82"),
        ("controlnet, no digests", *fp16, ""),
        ("controlnet, from a mirror", *fp16, "0.72"),
        ("controlnet", *all_files, "1/18 = 0.0556"),
        ("text2img", *all_files, "1/22 = 0.0455"),
        ("text2img, no digests", *all_files, ""),
        ("next checkpoint", "its single file", single_file, "0.85"),
    ]
    for what, against, other, most in rows:
        print(f"| {what} | {ours[what]:,} | {against}: {other:,} | {ours[what] / other:.4f} | {most} |")


if __name__ == "__main__":
    main()
