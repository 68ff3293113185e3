"""Switching models: LoRAs, textual inversions, checkpoints and 100 combinations of them, against diffusers.

Random weights in fp16 as people share them, on the CPU in float32. CPU seconds are counted, as machines are busy; ours
and diffusers' take turns, and the median of the rounds' ratios counts: diffusers' own loading takes one of two times,
so that the range says more than the least. `--small` is a UNet of a fifth of SD 1.5's width, in float32. diffusers
needs peft for LoRAs: without it ours run alone. SD 1.5's own shapes take 9 GB of disk and 10 of memory; `--keep FOLDER`
makes the models once, for several runs of `--only`.
Run: `python -m benchmarks.models [--small] [--rounds 7] [--only lora inversion switch cold trace] [--keep FOLDER]`.
"""

import contextlib
import gc
import itertools
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import is_peft_available

from benchmarks.figures import Report, arguments, in_turns
from services.diffusion.engine.backend import assemble
from services.diffusion.engine.generation import Generation
from services.diffusion.models.entries import EmbeddingEntry, LoraEntry, LoraUse
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.recipes import MERGES, shipped
from services.diffusion.models.scan import scan
from services.diffusion.models.tokenizer import vocabulary
from tests.fakes.ldm_files import write_ldm_file

CHECKPOINTS, LORAS = 2, 8
RANK = 16
TOKENS = 77
Size: TypeAlias = Literal["full", "small", "tiny"]
# By how much narrower than SD 1.5's the UNet and the VAE are, and the text encoder's layers; `tiny` is for smoke runs.
SIZES: dict[Size, tuple[int, int, int]] = {"full": (1, 1, 12), "small": (5, 4, 3), "tiny": (10, 4, 1)}
PARTS = ("lora", "inversion", "switch", "cold", "trace")
# What our models may fill: two checkpoints in float32, and some combinations beside them.
RAM_BYTES = 10 << 30


def make_models(root: Path, *, size: Size) -> None:
    """Checkpoints as folders and single files, LoRAs in diffusers' form, one textual inversion."""
    for number in range(CHECKPOINTS):
        folder = root / f"model{number}"
        pipeline = make_pipeline(folder, size=size, seed=number)
        if size == "full":
            pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(folder, safe_serialization=True)
        config = json.loads((folder / "unet" / "config.json").read_text())
        write_ldm_file(folder, root / f"single{number}.safetensors", config=config)
    for number in range(LORAS):
        save_file(_lora(pipeline.unet, pipeline.text_encoder, seed=number), root / f"lora{number}.safetensors")
    width = pipeline.text_encoder.config.hidden_size
    save_file({"<mint>": torch.randn(4, width)}, root / "mint.safetensors")


def make_pipeline(folder: Path, *, size: Size, seed: int) -> Any:
    """SD 1.5's pipeline with random weights in float32; only its tokenizer is saved."""
    torch.manual_seed(seed)
    shrink, thin, layers = SIZES[size]
    recipe = shipped("sd1")
    unet = {**recipe.unet, "block_out_channels": [width // shrink for width in recipe.unet["block_out_channels"]]}
    vae = {**recipe.vae, "block_out_channels": [width // thin for width in recipe.vae["block_out_channels"]]}
    text = CLIPTextConfig(**{**recipe.texts[0].config, "num_hidden_layers": layers})
    return StableDiffusionPipeline(
        vae=made(AutoencoderKL, vae),
        text_encoder=filled(_on_meta(lambda: CLIPTextModel(text))),
        tokenizer=_saved_tokenizer(folder / "tokenizer"),
        unet=made(UNet2DConditionModel, unet),
        scheduler=PNDMScheduler.from_config(recipe.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _saved_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(MERGES)))
    shutil.copy(MERGES, folder / "merges.txt")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def made(kind: Any, config: Any) -> Any:
    return filled(_on_meta(lambda: kind.from_config(dict(config))))


def _on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def filled(model: Any) -> Any:
    """Small random numbers, made quickly; what is computed is made again."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)
    return model


def _lora(unet: Any, text: Any, *, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    out = {}
    for part, module, names in (
        ("unet", unet, ("to_q", "to_k", "to_v", "to_out.0")),
        ("text_encoder", text, ("_proj",)),
    ):
        for path, each in module.named_modules():
            if isinstance(each, torch.nn.Linear) and path.endswith(names) and ("attn" in path):
                whole = path if part == "unet" else f"text_model.{path}"
                out[f"{part}.{whole}.lora_A.weight"] = torch.randn(RANK, each.in_features) * 0.01
                out[f"{part}.{whole}.lora_B.weight"] = torch.randn(each.out_features, RANK) * 0.01
    return out


class Ours:
    def __init__(self, root: Path) -> None:
        self.catalog = scan([root])
        self.library = ModelManager(device="cpu", ram_bytes=RAM_BYTES)

    def use(self, name: str, *loras: tuple[str, float], embeddings: bool = False) -> object:
        checkpoint = self.catalog.checkpoint(name)
        generation = Generation(
            checkpoint=checkpoint,
            prompt="",
            width_px=64,
            height_px=64,
            steps=1,
            guidance_scale=1.0,
            scheduler="ddim",
            seed=0,
            loras=tuple(LoraUse(entry=self._lora(lora), unet_weight=w, text_weight=w) for lora, w in loras),
            embeddings=tuple(self.catalog.embeddings_of(checkpoint)) if embeddings else (),
        )
        with torch.inference_mode():
            return assemble(self.library, generation)

    def _lora(self, name: str) -> LoraEntry:
        return self.catalog.lora(name, self.catalog.default())

    def forget_loras(self) -> None:
        """So that the next use of one makes its copies again, from a file that is read again."""
        self.forget(lambda part: isinstance(part, LoraEntry | EmbeddingEntry))

    def forget(self, is_meant: Callable[[object], bool]) -> None:
        """Drop from memory whatever was made of a part that is meant; what others share with it stays."""
        cache: Any = self.library._opened
        for tier in (cache._ram, cache._vram):
            for key in [key for key in tier.keys if any(map(is_meant, _parts(key)))]:
                tier._cached.pop(key, None)
        cache._small = {key: value for key, value in cache._small.items() if not any(map(is_meant, _parts(key)))}


def _parts(key: Any) -> list[object]:
    return [each for part in key for each in (part if isinstance(part, tuple) else (part,))]


def cpu_of(work: Callable[[], object]) -> Callable[[], float]:
    """Measures its CPU seconds."""

    def measured() -> float:
        begin_s = time.process_time()
        work()
        return time.process_time() - begin_s

    return measured


def compare(
    report: Report,
    what: str,
    against: str,
    goal: float,
    rounds: int,
    ours: Callable[[], object],
    theirs: Callable[[], object],
) -> None:
    """CPU seconds, in turns. A first turn is not counted where there are several."""
    mine, other = in_turns(rounds + (rounds > 1), cpu_of(ours), cpu_of(theirs))
    first = int(rounds > 1)
    report.ratio(what, mine[first:], other[first:], against=against, goal=goal)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trace", type=int, default=100, help="how many combinations are drawn")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", type=Path, help="a folder for the models, used again where it has them")
    asked = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report()
    rounds, trace = (1, 1) if asked.smoke else (asked.rounds, asked.trace)
    with tempfile.TemporaryDirectory() as folder:
        root = asked.keep or Path(folder)
        if not (root / "mint.safetensors").exists():
            make_models(root, size="tiny" if asked.smoke else "small" if asked.small else "full")
        run(root, rounds, trace, asked.only, report)
    report.save(asked.json)
    return 0


def run(root: Path, rounds: int, trace: int, only: Sequence[str], report: Report) -> None:
    has_peft = is_peft_available()
    if not has_peft:
        print("peft is not installed: LoRAs are not compared, ours run alone")
    works: dict[str, Callable[[], None]] = {
        "lora": lambda: compare_lora(root, rounds, report, has_peft=has_peft),
        "inversion": lambda: compare_inversion(root, rounds, report),
        "switch": lambda: compare_switch(root, rounds, report),
        "cold": lambda: compare_cold(root, rounds, report),
        "trace": lambda: compare_trace(root, trace, report, has_peft=has_peft),
    }
    for name in only:
        works[name]()
        gc.collect()


def compare_lora(root: Path, rounds: int, report: Report, *, has_peft: bool) -> None:
    ours = _ours_with(root, "single0")
    if not has_peft:
        [alone] = in_turns(rounds, cpu_of(lambda: _our_lora(ours)))
        report.add("LoRA on UNet and text encoder, ours alone", alone, "s")
        return
    pipeline = from_single_file(root, 0)
    compare(
        report,
        "LoRA on UNet and text encoder, applied and reverted",
        "load, fuse, unfuse, unload",
        0.35,
        rounds,
        lambda: _our_lora(ours),
        lambda: _their_lora(pipeline, root),
    )


def compare_inversion(root: Path, rounds: int, report: Report) -> None:
    ours, pipeline = _ours_with(root, "single0"), from_single_file(root, 0)
    theirs = _their_inversion(pipeline, root)
    compare(
        report,
        "textual inversion",
        "`load_textual_inversion`",
        0.02,
        rounds,
        lambda: _our_inversion(ours),
        theirs,
    )


def compare_switch(root: Path, rounds: int, report: Report) -> None:
    ours = _ours_with(root, "single0", "single1")
    turns = itertools.count()
    compare(
        report,
        "switch between two checkpoints in RAM",
        "`from_single_file`",
        0.1,
        rounds,
        lambda: ours.use(f"single{next(turns) % 2}"),
        lambda: from_single_file(root, 1),
    )


def compare_cold(root: Path, rounds: int, report: Report) -> None:
    compare(
        report,
        "disk to modules, files cached, first checkpoint of a process",
        "`from_pretrained`",
        0.45,
        rounds,
        lambda: _cold(root),
        lambda: StableDiffusionPipeline.from_pretrained(root / "model0"),
    )
    known = _ours_with(root, "model0")
    compare(
        report,
        "the same, next checkpoint of a family",
        "`from_pretrained`",
        0.45,
        rounds,
        lambda: _next(known),
        lambda: StableDiffusionPipeline.from_pretrained(root / "model1"),
    )


def _ours_with(root: Path, *names: str) -> Ours:
    ours = Ours(root)
    for name in names:
        ours.use(name)
    return ours


def from_single_file(root: Path, number: int) -> Any:
    return StableDiffusionPipeline.from_single_file(
        root / f"single{number}.safetensors",
        config=str(root / f"single{number}.config"),
        local_files_only=True,
        safety_checker=None,
    )


def _our_lora(ours: Ours) -> None:
    ours.forget_loras()
    ours.use("single0", ("lora0", 0.7))
    ours.use("single0")


def _their_lora(pipeline: Any, root: Path) -> None:
    pipeline.load_lora_weights(root, weight_name="lora0.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()


def _our_inversion(ours: Ours) -> None:
    ours.forget_loras()
    ours.use("single0", embeddings=True)


def _their_inversion(pipeline: Any, root: Path) -> Callable[[], None]:
    """Each time under another name: it does not forget all of one."""
    numbers = itertools.count()

    def work() -> None:
        name = f"<mint{next(numbers)}>"
        pipeline.load_textual_inversion(root, weight_name="mint.safetensors", token=name)

    return work


def _cold(root: Path) -> None:
    library = ModelManager(device="cpu", ram_bytes=RAM_BYTES)
    library.checkpoint(scan([root / "model0"]).default())


def _next(ours: Ours) -> None:
    """Its weights and configs are read again; what all of a family share stays."""
    entry = ours.catalog.checkpoint("model1")
    ours.forget(lambda part: part == entry)
    ours.use("model1")


def compare_trace(root: Path, count: int, report: Report, *, has_peft: bool) -> None:
    """Combinations of a checkpoint and up to two LoRAs, drawn by Zipf; the peer loads when the checkpoint changes."""
    draw = random.Random(1)
    kinds = [(c, tuple(sorted(draw.sample(range(LORAS), draw.randint(0, 2))))) for c in (0, 1) for _ in range(12)]
    trace = draw.choices(kinds, weights=[1 / (rank + 1) for rank in range(len(kinds))], k=count)
    ours_s = _our_trace(root, trace)
    # One side's models at a time.
    gc.collect()
    what = f"{count} combinations of a checkpoint and up to two LoRAs, drawn by Zipf"
    if has_peft:
        report.ratio(what, [ours_s], [_their_trace(root, trace)], against="the same with diffusers", goal=0.15)
    else:
        report.add(f"{what}, ours alone", ours_s, "s")


def _our_trace(root: Path, trace: list[tuple[int, tuple[int, ...]]]) -> float:
    ours = Ours(root)
    begin_s = time.process_time()
    for checkpoint, loras in trace:
        ours.use(f"single{checkpoint}", *((f"lora{number}", 0.7) for number in loras))
    return time.process_time() - begin_s


def _their_trace(root: Path, trace: list[tuple[int, tuple[int, ...]]]) -> float:
    begin_s = time.process_time()
    at, pipeline = -1, None
    for checkpoint, loras in trace:
        if checkpoint != at:
            pipeline = None
            at, pipeline = checkpoint, from_single_file(root, checkpoint)
        assert pipeline is not None
        for number in loras:
            pipeline.load_lora_weights(root, weight_name=f"lora{number}.safetensors", adapter_name=f"l{number}")
        if loras:
            pipeline.set_adapters([f"l{number}" for number in loras], [0.7] * len(loras))
            pipeline.fuse_lora()
            pipeline.unfuse_lora()
            with contextlib.suppress(ValueError):
                pipeline.unload_lora_weights()
    return time.process_time() - begin_s


if __name__ == "__main__":
    sys.exit(main())
