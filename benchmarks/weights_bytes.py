"""Bytes over the link until the first image, counted at the server, against what others fetch.

Serves fake repositories with the real repositories' files and sizes, divided by `--divide`, over the hub's API on
loopback, and lets Fanlight, diffusers and huggingface_hub each fetch what they take for the same image.
Run: `python -m benchmarks.weights_bytes [--divide 256]`.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures import RATIO, Report, arguments
from services.weights.mirror.mirrors import FolderDestination, publish
from services.weights.references.catalog import shipped
from services.weights.settings import WeightsSettings
from services.weights.store.store import WeightStore
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
SMOKE_DIVIDE = 65_536
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


def _settings(server: RangeServer, folder: Path, **values: object) -> WeightsSettings:
    """Everything else at its default, whatever this machine's environment says."""
    return WeightsSettings.model_validate({"dir": folder, "hf_endpoint": server.url, **values})


async def _ours(server: RangeServer, folder: Path, references: list[str], pipeline: str, **values: object) -> int:
    """Bytes that the server sent for files; listings are not weights and are left out, as for the others."""
    before = _file_bytes(server)
    async with WeightStore.open(_settings(server, folder, **values)) as store:
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
    async with WeightStore.open(_settings(server, folder)) as store:
        for reference in references:
            await store.ensure(reference, "img2img")
        tables = [store.objects.tables_of(model.name) for model in await store.inventory()]
    rows = {sha: table.to_json() for found in tables for sha, table in found.items()}
    return json.dumps({"tensor_tables": rows})


async def _mirror(server: RangeServer, folder: Path, views: list[str], mirror: Path) -> str:
    """The address of a mirror with what a node holds."""
    async with WeightStore.open(_settings(server, folder)) as store:
        await store.run(publish, store.objects, views, FolderDestination(mirror))
    return _serve_folder(server, mirror)


def _serve_folder(server: RangeServer, mirror: Path) -> str:
    for path in mirror.iterdir():
        server.put(f"/mirror/{path.name}", path)
    return f"{server.url}/mirror"


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--divide", type=int, default=256, help="real sizes are divided by this")
    asked = parser.parse_args(argv)
    divide, report = SMOKE_DIVIDE if asked.smoke else asked.divide, Report()
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
        ours = asyncio.run(_measure(server, folder, catalog))
        _compare(report, ours, len(checkpoints[1]), _total(server))
    report.save(asked.json)
    return 0


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


def _compare(report: Report, ours: Mapping[str, int], single_file: int, others: Mapping[str, int]) -> None:
    """Ratios of bytes that the server sent."""
    fp16 = ('diffusers `variant="fp16"` with safety checker + ControlNet', others["diffusers"])
    everything = ("`snapshot_download` of both", others["snapshot"])
    rows: list[tuple[str, str, str, int, float | None]] = [
        ("SD 1.5 + one ControlNet, with digests", "controlnet", *fp16, 0.82),
        ("the same without digests", "controlnet, no digests", *fp16, None),
        ("the same from a mirror", "controlnet, from a mirror", *fp16, 0.72),
        ("SD 1.5 + one ControlNet, with digests", "controlnet", *everything, 1 / 18),
        ("SD 1.5, text2img, with digests", "text2img", *everything, 1 / 22),
        ("the same without digests", "text2img, no digests", *everything, None),
        ("next checkpoint of the family, text encoder and VAE held", "next checkpoint", "its file", single_file, 0.85),
    ]
    for what, which, against, other, goal in rows:
        report.add(what, ours[which] / other, RATIO, against=against, goal=goal)


if __name__ == "__main__":
    sys.exit(main())
