# The diffusion service that Fanlight replaces, less its weights and less xformers, which has no build for a CPU.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl git unzip libgl1 libglib2.0-0 build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=wheels,target=/wheels \
    python3 "$(echo /wheels/pip-*.whl)/pip" install --no-index --find-links /wheels --no-cache-dir --break-system-packages \
    torch diffusers transformers accelerate compel torchsde timm Flask waitress
