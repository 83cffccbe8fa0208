# Workers of Apache Beam with data_pipelines, for launch/beam.sh:
#   docker build --file launch/docker/beam.Dockerfile --build-arg PYTHON=3.11 --tag vita_jax:beam .
# PYTHON has to be the version of the .venv that starts the pipeline, and Beam that of requirements.txt.
# Not built where it was written.
ARG PYTHON=3.11
FROM apache/beam_python${PYTHON}_sdk:2.71.0

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
COPY requirements.txt pyproject.toml README.md LICENSE ./
COPY vita_jax/__init__.py vita_jax/
RUN pip install ".[gcs]" && pip uninstall --yes vita_jax
COPY . .
RUN pip install --no-deps --editable .

RUN useradd --create-home --uid 1000 vita && chown -R vita /app
USER vita
# The entry point is Beam's.
