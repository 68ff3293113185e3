"""`fanlight generate`: a prompt and perhaps control pictures in, pictures out."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway, Priority, parse_control, parse_lora, parse_size

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.client.requests import GenerationOptions
    from fanlight.gateway.v1.gateway_pb2 import Job

SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="ANNOTATOR=PICTURE[:SCALE]",
        help="Condition on a picture; may be given again. `none` takes it as it is; `none/canny` names the ControlNet"
        " too.",
    ),
]
StartPicture = Annotated[
    Path | None,
    typer.Option("--image", metavar="PICTURE", help="Start from this picture (img2img).", show_default=False),
]
Mask = Annotated[
    Path | None, typer.Option("--mask", metavar="PICTURE", help="Paint anew only what is white here (inpaint).")
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help="How much of the image is painted over, 0 to 1; if left out 0.8, or 1 with a mask.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option("--model", metavar="REF", help="A checkpoint; `fanlight models` lists them.")
]
Resize = Annotated[
    str | None,
    typer.Option(metavar="MODE", help="How pictures of another shape come to the size: crop, stretch or pad."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[:WEIGHT]", help="A LoRA, at weight 1 if left out; may be given again."),
]
Embeddings = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A textual inversion that the prompt names; may be given again."),
]
ClipSkip = Annotated[
    int | None,
    typer.Option(help="The text encoder's layer: 1 is the last one, 2 the one before.", show_default=False),
]
Steps = Annotated[int | None, typer.Option(min=0, help="Model steps, 1 to 150; 20 if left out.", show_default=False)]
Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance, 0 to 30; 5 if left out, none at 1 and below.", show_default=False),
]
Scheduler = Annotated[
    str | None, typer.Option(metavar="NAME", help="Such as euler_a, `DPM++ 2M Karras` or dpmpp_2m; ddim if left out.")
]
NoiseSchedule = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="karras, exponential or sgm_uniform; the scheduler's own if left out."),
]
Quality = Annotated[int | None, typer.Option(help="Of webp and jpeg, 1 to 100; 90 if left out.", show_default=False)]
SafetyChecker = Annotated[
    str | None,
    typer.Option(metavar="MODE", help="off, flag, blur or block; as the worker is set if left out."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="The first picture's; the next ones count up. Random if left out.")
]
VariationSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="A second seed, mixed in by --variation-strength; the next images count it up. Random if left out.",
        show_default=False,
    ),
]
VariationStrength = Annotated[
    float | None,
    typer.Option(help="From 0, the seed alone, to 1, the variation seed alone; 0 if left out.", show_default=False),
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the UNet must compute in: float32, float16 or bfloat16; any if left out."),
]
Count = Annotated[int | None, typer.Option("--count", "-n", min=0, help="How many pictures, 1 to 32; 1 if left out.")]


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to paint.", show_default=False)],
    negative: Annotated[str | None, typer.Option("--negative", metavar="TEXT", help="What to keep away from.")] = None,
    control: Controls = None,
    image: StartPicture = None,
    mask: Mask = None,
    strength: Strength = None,
    resize: Resize = None,
    lora: Loras = None,
    vae: Annotated[str | None, typer.Option(metavar="NAME", help="A VAE instead of the checkpoint's own.")] = None,
    embedding: Embeddings = None,
    clip_skip: ClipSkip = None,
    model: Checkpoint = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels; if left out the image's, or the model's own.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    noise_schedule: NoiseSchedule = None,
    picture_format: Annotated[str | None, typer.Option("--format", metavar="NAME", help="png, webp or jpeg.")] = None,
    quality: Quality = None,
    safety_checker: SafetyChecker = None,
    strict: Annotated[bool, typer.Option("--strict", help="The same bits every time on one device.")] = False,
    precision: Precision = None,
    seed: Seed = None,
    variation_seed: VariationSeed = None,
    variation_strength: VariationStrength = None,
    count: Count = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("."),
    priority: Priority = 0,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Paint pictures from a prompt, conditioned on control pictures if there are any."""
    from fanlight.cli.output import print_json
    from fanlight.cli.session import make_folder, talk

    options = _options(context.params)
    make_folder(out)
    made = talk(gateway, lambda client: paint(client, prompt, out, priority, options))
    if as_json:
        print_json(made)
        return
    for told in made["images"]:
        print(told["path"])


def _options(said: Mapping[str, Any]) -> "GenerationOptions":
    """`said`: the command's parameters by name. All that are not about the picture are left out."""
    from fanlight.client.requests import GenerationOptions

    width_px, height_px = parse_size(said["size"])
    others = {name: said[name] for name in GenerationOptions.__annotations__.keys() & said.keys()}
    options = {
        **others,
        "negative_prompt": said["negative"],
        "width_px": width_px,
        "height_px": height_px,
        "guidance_scale": said["guidance"],
        "controls": [parse_control(text) for text in said["control"] or ()],
        "loras": [parse_lora(text) for text in said["lora"] or ()],
        "embeddings": said["embedding"] or (),
        "format": said["picture_format"],
    }
    return cast("GenerationOptions", options)


async def paint(
    client: "AsyncClient", prompt: str, out: Path, priority: int, options: "GenerationOptions"
) -> dict[str, Any]:
    """What `--json` prints. Ctrl-C while it waits cancels the job."""
    from fanlight.cli.progress import JobBar
    from fanlight.cli.timings import timings_of

    started_s = time.monotonic()
    with JobBar() as bar:
        job = await client.generate(prompt, on_event=bar.on_event, priority=priority, **options)
    painted_s = time.monotonic()
    images = await download(client, job, out)
    ended_s = time.monotonic()
    measured = {"total_s": round(ended_s - started_s, 3), "download_s": round(ended_s - painted_s, 3)}
    return {"job": job.name, "images": images, "timings": {**measured, **timings_of(job)}}


async def download(client: "AsyncClient", job: "Job", out: Path) -> list[dict[str, Any]]:
    """Each image in a file named after the job and the seed; with its number where several have one seed."""
    from fanlight.cli.session import write_bytes

    pictures = await asyncio.gather(*(client.read_blob(image.blob) for image in job.images))
    told: list[dict[str, Any]] = []
    seeds = [image.seed for image in job.images]
    for number, (image, picture) in enumerate(zip(job.images, pictures, strict=True), 1):
        stem = f"{job.name.removeprefix('jobs/')}-{image.seed}"
        if seeds.count(image.seed) > 1:
            stem += f"-{number}"
        path = out / f"{stem}{SUFFIXES.get(image.blob.media_type, '.png')}"
        write_bytes(path, picture)
        told.append({"path": str(path), "seed": image.seed, "digest": image.blob.digest})
    return told
