"""`fanlight annotate`: a picture in, its control image out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway, Priority, parse_parameter, parse_size

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.gateway.v1.gateway_pb2 import Job


def annotate(
    annotator: Annotated[str, typer.Argument(help="Its id; `fanlight annotators` lists them.", show_default=False)],
    picture: Annotated[Path, typer.Argument(help="A picture's file.", show_default=False)],
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of its parameters; may be given again.")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; the picture's own size if left out.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the control image goes; PICTURE-ANNOTATOR.png if left out."),
    ] = None,
    priority: Priority = 0,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Make a control image from a picture."""
    from fanlight.cli.output import print_json
    from fanlight.cli.progress import JobBar
    from fanlight.cli.session import make_folder, talk

    width_px, height_px = parse_size(size)
    parameters = dict(parse_parameter(text) for text in param or ())
    path = out or Path(f"{picture.stem}-{annotator}.png")
    make_folder(path.parent)

    async def work(client: "AsyncClient") -> dict[str, Any]:
        with JobBar() as bar:
            job = await client.annotate(
                annotator,
                picture,
                parameters=parameters,
                width_px=width_px,
                height_px=height_px,
                on_event=bar.on_event,
                priority=priority,
            )
        return await keep(client, job, path)

    made = talk(gateway, work)
    if as_json:
        print_json(made)
    else:
        print(made["path"])


async def keep(client: "AsyncClient", job: "Job", path: Path) -> dict[str, Any]:
    from fanlight.cli.session import write_bytes
    from fanlight.cli.timings import timings_of

    image = job.images[0]
    write_bytes(path, await client.read_blob(image.blob))
    return {"job": job.name, "path": str(path), "digest": image.blob.digest, "timings": timings_of(job)}
