# vita_jax for NVIDIA GPUs:  docker build --file launch/docker/cuda.Dockerfile --tag vita_jax:cuda .
#   docker run --rm --gpus all --shm-size 8g --volume vita_jax_cache:/cache --volume DATA:/data vita_jax:cuda \
#       vita_jax.train --config=... --config.run_dir=/data/run
# The host has the driver (525 or newer) and the NVIDIA Container Toolkit; CUDA itself comes with the extra cuda.
# Not built where it was written; what it installs is what launch/setup.sh cuda gcs installs.
ARG BASE=python:3.11.13-slim-bookworm
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 vita && mkdir -p /app /cache/compiled /data && chown -R vita /app /cache /data
WORKDIR /app

# Requirements first: they stay in their layer while only the code changes.
COPY requirements.txt pyproject.toml README.md LICENSE ./
COPY vita_jax/__init__.py vita_jax/
RUN pip install ".[cuda,gcs]" && pip uninstall --yes vita_jax

COPY --chown=vita . .
RUN pip install --no-deps --editable .

# What the toolkit puts into the container, and flags as in launch/gpu.sh.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
# Compiled programs outlive the container.
ENV JAX_COMPILATION_CACHE_DIR=/cache/compiled
VOLUME /cache
USER vita
ENTRYPOINT ["python", "-m"]
CMD ["vita_jax.train", "--help"]
