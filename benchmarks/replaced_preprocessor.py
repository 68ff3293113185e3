"""The preprocessor that Fanlight replaces, with canny alone, rebuilt from its described behavior to be measured with.

Flask behind waitress with its four threads. The body is the image; it becomes RGB and at most 1024 pixels a side;
controlnet_aux annotates at its own defaults; the answer is lossless WebP at Pillow's defaults, two times in its head.
Run: `python -m benchmarks.replaced_preprocessor`; prints `ready http=HOST:PORT`.
"""

import io
import time
from typing import Any

import waitress
from flask import Flask, Response, jsonify, make_response, request
from PIL import Image

from tests.fakes.controlnet_aux_reference import detector

HOST = "127.0.0.1"
SIDE_MAX_PX = 1024


def fitted(image: Image.Image) -> Image.Image:
    width, height = image.size
    if max(width, height) <= SIDE_MAX_PX:
        return image
    scale = SIDE_MAX_PX / max(width, height)
    return image.resize((int(width * scale), int(height * scale)))


def service() -> Flask:
    app = Flask(__name__)
    processors: dict[str, Any] = {"canny": detector("canny", "CannyDetector")}

    @app.post("/image/<processor_id>")
    def process_image(processor_id: str) -> Response:
        start_s = time.perf_counter()
        try:
            image = fitted(Image.open(io.BytesIO(request.data)).convert("RGB"))
        except OSError as error:
            return make_response(jsonify(error=str(error)), 400)
        if processor_id not in processors:
            return make_response(jsonify(error=f"Processor {processor_id} not found"), 400)
        inference_start_s = time.perf_counter()
        control = processors[processor_id](image)
        inference_s = time.perf_counter() - inference_start_s
        stream = io.BytesIO()
        control.save(stream, "WEBP", lossless=True)
        answer = make_response(stream.getvalue())
        answer.headers["Content-Type"] = "image/webp"
        answer.headers["X-Inference-Time"] = str(inference_s)
        answer.headers["X-Request-Time"] = str(time.perf_counter() - start_s)
        return answer

    return app


def main() -> None:
    server = waitress.create_server(service(), host=HOST, port=0)
    print(f"ready http={HOST}:{server.effective_port}", flush=True)
    server.run()


if __name__ == "__main__":
    main()
