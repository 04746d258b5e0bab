# slime with the packages for NVIDIA GPUs, each file of locks/gpu.txt by its hash. `slime submit k8s` starts it:
#   docker build --tag REGISTRY/slime:1 . && docker push REGISTRY/slime:1
# An image with a task of your own is made from it: FROM REGISTRY/slime:1, then COPY what the task needs.
FROM python:3.12-slim-bookworm

# gcc and libc6-dev: triton compiles at run time. libnuma1: SGLang's kernels. libseccomp2: filter of the sandboxes, whose
# bubblewrap is in the lock. tini: process 1 of a pod. wget: KubeRay's probes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 libseccomp2 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 slime

# The packages: a layer that changes with the locks alone.
WORKDIR /opt/slime
COPY pyproject.toml README.md LICENSE ./
COPY locks/gpu.txt locks/
COPY launch/setup.sh launch/
RUN GPU=1 PYTHON=python3.12 PIP_NO_CACHE_DIR=1 bash launch/setup.sh

# The project. The links are for login shells, which take PATH from /etc/profile.
COPY . .
RUN .venv/bin/python -m pip install --no-input --no-deps --no-build-isolation --editable . \
    && ln -s /opt/slime/.venv/bin/ray /opt/slime/.venv/bin/slime /usr/local/bin/
ENV PATH=/opt/slime/.venv/bin:$PATH

# The current folder of a run: the volume with its runs.
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["tini", "--"]
CMD ["slime", "--help"]
