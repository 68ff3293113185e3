"""`fanlight generate` and `fanlight annotate`: run a job and save its images."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fanlight.cli.options import (
    DEFAULT_GATEWAY,
    AsJson,
    Gateway,
    Priority,
    parse_control,
    parse_lora,
    parse_parameter,
    parse_sides,
    parse_size,
)

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.client.requests import GenerationOptions
    from fanlight.gateway.v1.gateway_pb2 import Job


SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="ANNOTATOR=IMAGE[:SCALE]",
        help="Condition on an image; may be repeated. `none`: it is a control image already; `none/canny` also names"
        " the ControlNet. `canny,resize=pad,mode=prompt=IMAGE` says how it is fitted (crop, stretch, pad), and what is"
        " more important (balanced, prompt, control).",
    ),
]
StartImage = Annotated[
    Path | None,
    typer.Option("--image", metavar="FILE", help="Start from this image (img2img).", show_default=False),
]
Mask = Annotated[
    Path | None,
    typer.Option("--mask", metavar="FILE", help="Replace only what is white, or opaque, in this mask (inpaint)."),
]
MaskBlur = Annotated[
    float | None,
    typer.Option(help="How far the mask's edge fades, in pixels, 0 to 64; 4 if left out.", show_default=False),
]
OnlyMasked = Annotated[
    bool,
    typer.Option("--only-masked", help="Generate the masked part alone, at --size, and put it back into the image."),
]
MaskPadding = Annotated[
    int | None,
    typer.Option(help="With --only-masked: pixels around the mask, 0 to 1024; 32 if left out.", show_default=False),
]
MaskFill = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What is under the mask at the start: original, blurred, noise or nothing."),
]
MaskInvert = Annotated[bool, typer.Option("--mask-invert", help="Replace what is black in the mask.")]
MaskFromAlpha = Annotated[bool, typer.Option("--mask-from-alpha", help="Replace what is transparent in the image.")]
Outpaint = Annotated[
    str | None,
    typer.Option(
        "--outpaint",
        metavar="SIDE=PIXELS,...",
        help="Make the image grow, such as left=64,right=64; also top and bottom.",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help="How much of the image is replaced, 0 to 1; if left out 0.8, or 1 with a mask.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option("--model", metavar="REF", help="A checkpoint; `fanlight models` lists them.")
]
Resize = Annotated[
    str | None,
    typer.Option(metavar="MODE", help="How images of another aspect ratio are fitted: crop, stretch or pad."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[:WEIGHT]", help="A LoRA, at weight 1 if left out; may be repeated."),
]
Embeddings = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A textual inversion that the prompt names; may be repeated."),
]
ClipSkip = Annotated[
    int | None,
    typer.Option(
        help="The text encoder's layer for both prompts: 1 is the last one, 2 the one before. Not for SDXL.",
        show_default=False,
    ),
]
SdxlClipSkip = Annotated[
    int | None,
    typer.Option("--sdxl-clip-skip", help="The same for SDXL, which was trained with 2.", show_default=False),
]
PromptSyntax = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="a1111: mistakes in brackets are read as A1111 reads them, with a warning; strict: they are refused;"
        " plain: no syntax at all.",
    ),
]
Emphasis = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What weights do: original, no_norm, ignore or none; original if left out."),
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
    typer.Option(metavar="NAME", help="karras, simple, automatic, ...; the scheduler's own if left out."),
]
Quality = Annotated[int | None, typer.Option(help="Of webp and jpeg, 1 to 100; 90 if left out.", show_default=False)]
SafetyChecker = Annotated[
    str | None,
    typer.Option(metavar="MODE", help="off, flag, blur or block; as the worker is set if left out."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of the first image; the next ones count up. Random if left out.")
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
Count = Annotated[int | None, typer.Option("--count", "-n", min=0, help="How many images, 1 to 32; 1 if left out.")]


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the image should show.", show_default=False)],
    negative: Annotated[
        str | None, typer.Option("--negative", metavar="TEXT", help="What the image should not show.")
    ] = None,
    control: Controls = None,
    image: StartImage = None,
    mask: Mask = None,
    mask_blur: MaskBlur = None,
    only_masked: OnlyMasked = False,
    mask_padding: MaskPadding = None,
    mask_fill: MaskFill = None,
    mask_invert: MaskInvert = False,
    mask_from_alpha: MaskFromAlpha = False,
    outpaint: Outpaint = None,
    strength: Strength = None,
    resize: Resize = None,
    lora: Loras = None,
    vae: Annotated[str | None, typer.Option(metavar="NAME", help="A VAE instead of the checkpoint's own.")] = None,
    embedding: Embeddings = None,
    clip_skip: ClipSkip = None,
    sdxl_clip_skip: SdxlClipSkip = None,
    prompt_syntax: PromptSyntax = "a1111",
    emphasis: Emphasis = None,
    model: Checkpoint = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels; if left out the image's, or the model's own.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    noise_schedule: NoiseSchedule = None,
    image_format: Annotated[str | None, typer.Option("--format", metavar="NAME", help="png, webp or jpeg.")] = None,
    quality: Quality = None,
    safety_checker: SafetyChecker = None,
    strict: Annotated[bool, typer.Option("--strict", help="The same bits every time on the same device.")] = False,
    precision: Precision = None,
    seed: Seed = None,
    variation_seed: VariationSeed = None,
    variation_strength: VariationStrength = None,
    count: Count = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images are saved.")] = Path("."),
    priority: Priority = 0,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Generate images from a prompt, conditioned on control images if there are any."""
    from fanlight.cli.output import print_json, print_warnings
    from fanlight.cli.session import make_folder, talk

    options = _options(context.params)
    make_folder(out)
    made = talk(gateway, lambda client: run_generation(client, prompt, out, priority, options))
    print_warnings(made["warnings"])
    if as_json:
        print_json(made)
        return
    for each in made["images"]:
        print(each["path"])


def _options(params: Mapping[str, Any]) -> "GenerationOptions":
    """The generation's options among the command's parameters, by name."""
    from fanlight.client.requests import GenerationOptions

    width_px, height_px = parse_size(params["size"])
    others = {name: params[name] for name in GenerationOptions.__annotations__.keys() & params.keys()}
    options = {
        **others,
        **parse_sides(params["outpaint"]),
        "negative_prompt": params["negative"],
        "width_px": width_px,
        "height_px": height_px,
        "guidance_scale": params["guidance"],
        "controls": [parse_control(text) for text in params["control"] or ()],
        "loras": [parse_lora(text) for text in params["lora"] or ()],
        "embeddings": params["embedding"] or (),
        "format": params["image_format"],
    }
    return cast("GenerationOptions", options)


async def run_generation(
    client: "AsyncClient", prompt: str, out: Path, priority: int, options: "GenerationOptions"
) -> dict[str, Any]:
    """What `--json` prints. Ctrl-C while it waits cancels the job."""
    from fanlight.cli.reports import JobBar, timings_of
    from fanlight.client import warnings_of

    started_s = time.monotonic()
    with JobBar() as bar:
        job = await client.generate(prompt, on_event=bar.on_event, priority=priority, **options)
    generated_s = time.monotonic()
    images = await download(client, job, out)
    ended_s = time.monotonic()
    measured = {"total_s": round(ended_s - started_s, 3), "download_s": round(ended_s - generated_s, 3)}
    return {
        "job": job.name,
        "images": images,
        "warnings": warnings_of(job),
        "timings": {**measured, **timings_of(job)},
    }


async def download(client: "AsyncClient", job: "Job", out: Path) -> list[dict[str, Any]]:
    """Each image in a file named after the job and the seed; with its number where several have the same seed."""
    from fanlight.cli.session import write_bytes

    files = await asyncio.gather(*(client.read_blob(image.blob) for image in job.images))
    saved: list[dict[str, Any]] = []
    seeds = [image.seed for image in job.images]
    for number, (image, data) in enumerate(zip(job.images, files, strict=True), 1):
        stem = f"{job.name.removeprefix('jobs/')}-{image.seed}"
        if seeds.count(image.seed) > 1:
            stem += f"-{number}"
        path = out / f"{stem}{SUFFIXES.get(image.blob.media_type, '.png')}"
        write_bytes(path, data)
        saved.append({"path": str(path), "seed": image.seed, "digest": image.blob.digest})
    return saved


def annotate(
    annotator: Annotated[str, typer.Argument(help="Its id; `fanlight annotators` lists them.", show_default=False)],
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of its parameters; may be repeated.")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; the image's own size if left out.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the control image is saved; IMAGE-ANNOTATOR.png if left out."),
    ] = None,
    priority: Priority = 0,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Make a control image from an image."""
    from fanlight.cli.output import print_json
    from fanlight.cli.reports import JobBar
    from fanlight.cli.session import make_folder, talk

    width_px, height_px = parse_size(size)
    parameters = dict(parse_parameter(text) for text in param or ())
    path = out or Path(f"{image.stem}-{annotator}.png")
    make_folder(path.parent)

    async def work(client: "AsyncClient") -> dict[str, Any]:
        with JobBar() as bar:
            job = await client.annotate(
                annotator,
                image,
                parameters=parameters,
                width_px=width_px,
                height_px=height_px,
                on_event=bar.on_event,
                priority=priority,
            )
        return await save(client, job, path)

    made = talk(gateway, work)
    if as_json:
        print_json(made)
    else:
        print(made["path"])


async def save(client: "AsyncClient", job: "Job", path: Path) -> dict[str, Any]:
    from fanlight.cli.reports import timings_of
    from fanlight.cli.session import write_bytes

    image = job.images[0]
    write_bytes(path, await client.read_blob(image.blob))
    return {"job": job.name, "path": str(path), "digest": image.blob.digest, "timings": timings_of(job)}
