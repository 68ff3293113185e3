# What cold_start compares with: the diffusion service as one `pip install`, on the same base image and the same torch.
ARG BASE_IMAGE=localhost/fanlight/base:bookworm
FROM ${BASE_IMAGE}
RUN --mount=type=bind,source=dist/wheels,target=/wheels \
    python3 "$(echo /wheels/pip-*.whl)/pip" install --no-index --find-links /wheels --break-system-packages 'fanlight[diffusion]'
ENTRYPOINT ["python3", "-m", "services.diffusion"]
