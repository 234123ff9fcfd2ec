# sendvae with its CUDA ops, on Debian 12. The host needs NVIDIA's driver (580 or newer) and its container toolkit alone:
# CUDA's libraries come with PyTorch.
#
#   docker build --tag sendvae_fast .
#   docker run --rm --gpus=all --ipc=host --volume="$PWD:/work" sendvae_fast doctor
#
# --ipc=host: NCCL and worker processes share memory. For one kind of GPU the build takes a third of the time:
# --build-arg SENDVAE_CUDA_ARCHITECTURES=90-real
FROM debian:12-slim AS base
WORKDIR /src
COPY requirements.txt requirements-deepspeed.txt ./
COPY scripts/container/steps.sh scripts/container/
RUN scripts/container/steps.sh base

FROM base AS build
ARG CUDA_VERSION=13.0
RUN scripts/container/steps.sh tools
COPY . .
ARG SENDVAE_CUDA_ARCHITECTURES
RUN scripts/container/steps.sh wheel

FROM base
COPY --from=build /src/dist dist
RUN scripts/container/steps.sh install
ENV PATH=/opt/sendvae/bin:$PATH
WORKDIR /work
ENTRYPOINT ["sendvae"]
CMD ["--help"]
