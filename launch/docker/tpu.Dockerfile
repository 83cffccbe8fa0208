# vita_jax for TPU hosts:  docker build --file launch/docker/tpu.Dockerfile --tag vita_jax:tpu .
#   docker run --rm --privileged --network=host --user 0 --volume vita_jax_cache:/cache vita_jax:tpu vita_jax.train --config=...
# Device files of TPUs belong to root on the hosts (--user 0, or --build-arg RUN_AS=root); without TPUs any user will do.
# Not built where it was written; what it installs is what launch/setup.sh tpu gcs installs.
ARG BASE=python:3.11.13-slim-bookworm
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 vita && mkdir -p /app /cache/compiled && chown -R vita /app /cache
WORKDIR /app

# Requirements first: they stay in their layer while only the code changes.
COPY requirements.txt pyproject.toml README.md LICENSE ./
COPY vita_jax/__init__.py vita_jax/
RUN pip install ".[tpu,gcs]" && pip uninstall --yes vita_jax

COPY --chown=vita . .
RUN pip install --no-deps --editable .

# Compiled programs outlive the container.
ENV JAX_COMPILATION_CACHE_DIR=/cache/compiled
VOLUME /cache
ARG RUN_AS=vita
USER ${RUN_AS}
ENTRYPOINT ["python", "-m"]
CMD ["vita_jax.train", "--help"]
