# The preprocessor that Fanlight replaces, less its weights: as its Dockerfiles of 2023 lay it out, with today's packages.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 git && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=wheels,target=/wheels \
    python3 "$(echo /wheels/pip-*.whl)/pip" install --no-index --find-links /wheels --no-cache-dir --break-system-packages \
    waitress torch controlnet_aux Flask mediapipe rembg onnxruntime
