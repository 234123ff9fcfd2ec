#!/usr/bin/env bash
# The steps of Dockerfile and sendvae.def, as root on Debian 12, from a checkout in the working folder:
#
#   base      Python with the pinned PyTorch, in /opt/sendvae
#   tools     what the wheel is built with: compilers, and NVIDIA's nvcc from PyPI, in /opt/cuda
#   wheel     dist/*.whl
#   install   that wheel with what training and evaluating need
#   clean     remove what only the build needed
#
# CUDA_VERSION names nvcc's version; SENDVAE_CUDA_ARCHITECTURES the GPUs (setup.py has the default).
set -euo pipefail

cuda=${CUDA_VERSION:-13.0}
python=/opt/sendvae/bin/python
pins=/opt/sendvae/constraints.txt
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive

debian() {
    apt-get update
    apt-get install --yes --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

base() {
    # gcc and Python's headers: Triton and torch.compile compile small pieces of C while they run.
    debian ca-certificates gcc libc6-dev python3-dev python3-venv
    python3 -m venv /opt/sendvae
    # Constraints are pins without extras.
    sed -nE 's/^([A-Za-z0-9_-]+)(\[[^]]*\])?(==.*)$/\1\3/p' requirements.txt requirements-deepspeed.txt >"$pins"
    "$python" -m pip install --constraint "$pins" torch torchvision
}

tools() {
    debian g++ git
    "$python" -m pip install --constraint "$pins" build cmake ninja pybind11 'setuptools>=77' wheel
    "$python" -m pip install --target /opt/cuda --no-deps \
        "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-nvvm==$cuda.*" "nvidia-cuda-cccl==$cuda.*" \
        "nvidia-cuda-runtime==$cuda.*"
    ln -sfn lib "/opt/cuda/nvidia/cu${cuda%%.*}/lib64" # where nvcc looks
}

wheel() {
    rm -rf dist
    CUDACXX=/opt/cuda/nvidia/cu${cuda%%.*}/bin/nvcc SENDVAE_BUILD=require SENDVAE_BUILD_CUDA=1 \
        "$python" -m build --no-isolation --outdir dist
}

install() {
    local wheels=(dist/*.whl)
    "$python" -m pip install --constraint "$pins" setuptools wheel
    DS_BUILD_OPS=0 "$python" -m pip install --constraint "$pins" --no-build-isolation "${wheels[0]}[train,eval,data,ode]" tensorboard
}

clean() {
    rm -rf /opt/cuda
    "$python" -m pip uninstall --yes build cmake ninja pybind11
    apt-get purge --yes --auto-remove g++ git
}

for step in "$@"; do "$step"; done
