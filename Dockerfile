# The project with its environment, on a CPU: `docker build -t llmops .`, then `docker run --rm -it llmops make run`.
# A server in the container listens on the container's own 127.0.0.1: use `docker run --network host` to reach it on Linux.
FROM python:3.11-slim-bookworm

# git: commits in manifests, DVC. make: the commands. A compiler: gptqmodel is built from source.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git make && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home llmops && install -d -o llmops /project
USER llmops
WORKDIR /project

# What set-up reads comes first, so that a change of a notebook does not install everything again.
COPY --chown=llmops requirements requirements
COPY --chown=llmops Makefile README.md settings.ini setup.py pyproject.toml ./
COPY --chown=llmops llmops llmops
RUN make setup PIP_NO_CACHE_DIR=1

COPY --chown=llmops . .
ENV PATH=/project/.venv/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1 DVC_NO_ANALYTICS=1 TOKENIZERS_PARALLELISM=false
CMD ["make", "help"]
