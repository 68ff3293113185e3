"""What patching a LoRA into SD 1.5 amounts to: bytes and operations at a rank, and the time that its calls take.

The calls are measured on the CPU with the same 264 layers, so thin that their arithmetic takes no time. What a card
takes is counted, not measured. Run: `python -m benchmarks.patching [--rank 128] [--rounds 20]`.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.figures import Report, arguments
from benchmarks.models import filled, made
from services.diffusion.models.entries import LoraEntry
from services.diffusion.models.lora_files import read_lora
from services.diffusion.models.patching import LoraStrength, patch_loras
from services.diffusion.models.recipes import shipped

# By part: how files call it, and the module.
Parts = dict[str, tuple[str, nn.Module]]
THIN = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def parts(*, thin: bool) -> Parts:
    recipe = shipped("sd1")
    config, text = dict(recipe.unet), dict(recipe.texts[0].config)
    if thin:
        config["block_out_channels"] = [width // 10 for width in config["block_out_channels"]]
        config["cross_attention_dim"] = THIN["hidden_size"]
        text |= THIN
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**text))
        unet: Any = None if thin else UNet2DConditionModel.from_config(config)
    if thin:
        unet, encoder = made(UNet2DConditionModel, config), filled(encoder)
    return {"unet": ("lora_unet_", unet), "text_encoder": ("lora_te_", encoder)}


def layers(of: Parts) -> Iterator[tuple[str, torch.Size]]:
    """Of the UNet's attention and of the text encoder: the name in a file, and the weight's shape."""
    for part, (head, module) in of.items():
        for path, each in module.named_modules():
            is_meant = isinstance(each, nn.Linear | nn.Conv2d) and (part != "unet" or "attentions" in path)
            if is_meant and "embedding" not in path:
                yield head + path.replace(".", "_"), each.weight.shape


def count_sizes(rank: int, report: Report) -> None:
    shapes = [(shape[0], shape[1:].numel()) for _, shape in layers(parts(thin=False))]
    weights = sum(rows * columns for rows, columns in shapes)
    what = f"rank {rank} on {len(shapes)} layers with {weights / 1e6:.0f} million weights"
    report.add(f"{what}, the file in fp16", 2 * rank * sum(rows + columns for rows, columns in shapes) / 1e6, "MB")
    report.add(f"{what}, arithmetic", 2 * rank * weights / 1e9, "GFLOP")
    # fp16 read and float32 written; read and written by the sum; read, and fp16 written.
    report.add(f"{what}, read and written on the device", 20 * weights / 1e9, "GB")


def write_thin(path: Path, of: Parts) -> None:
    out = {}
    for name, (rows, columns, *rest) in layers(of):
        out[f"{name}.lora_down.weight"] = torch.randn(4, columns, *rest).half()
        out[f"{name}.lora_up.weight"] = torch.randn(rows, 4, *(1 for _ in rest)).half()
        out[f"{name}.alpha"] = torch.tensor(4.0).half()
    save_file(out, path)


def measure_calls(rounds: int, folder: Path, report: Report) -> None:
    thin = parts(thin=True)
    entry = LoraEntry(id="thin", path=folder / "thin.safetensors", cross_attention_dim=64, size_bytes=0)
    write_thin(entry.path, thin)
    taken_s = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        dose = LoraStrength(lora=read_lora(entry), strength=0.7)
        read_s = time.perf_counter() - began_s
        with torch.inference_mode():
            for part, (_, module) in thin.items():
                patch_loras(module, part, [dose])
        taken_s.append((time.perf_counter() - began_s, read_s))
    report.add("the calls of thin layers", [whole_s * 1e3 for whole_s, _ in taken_s], "ms")
    report.add("of them for the file's table", [read_s * 1e3 for _, read_s in taken_s], "ms")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    report = Report()
    count_sizes(asked.rank, report)
    with tempfile.TemporaryDirectory() as folder:
        measure_calls(1 if asked.smoke else asked.rounds, Path(folder), report)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
