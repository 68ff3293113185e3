"""Small values of the gateway's domain."""

import hashlib
from typing import Any

from services.gateway.jobs.model import ControlSource, Generation
from services.kernel.blobs import BlobInfo


def blob(name: str) -> BlobInfo:
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    return BlobInfo(scope="default", digest=digest, size_bytes=len(name), media_type="image/png")


def control(annotator: str, picture: str = "picture") -> ControlSource:
    return ControlSource(picture=blob(picture), annotator=annotator, parameters="{}", controlnet="canny")


def generation(**changes: Any) -> Generation:
    values: dict[str, Any] = {
        "model": "starter",
        "pipeline": "text2img",
        "prompt": "a fox",
        "negative_prompt": "",
        "width_px": 0,
        "height_px": 0,
        "steps": None,
        "guidance_scale": None,
        "scheduler": "",
        "seed": None,
        "count": 1,
        "controls": (),
        "preview_every_steps": 0,
    }
    return Generation(**{**values, **changes})
