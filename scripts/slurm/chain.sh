#!/usr/bin/env bash
# Both stages, the latents between them, samples and their evaluation, as jobs that wait for each other:
#
#   scripts/slurm/chain.sh IMAGENET PRETRAINED OUT [SBATCH OPTIONS...]
#   scripts/slurm/chain.sh /data/imagenet pretrained runs/paper --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12
#   scripts/slurm/chain.sh runs/scenes demo runs/chain --ntasks-per-node=1
#
# IMAGENET has train/ and the evaluation's reference; PRETRAINED the files that configs/README.md lists. `demo` in its place
# is a trial of the chain, for any pictures in train/ and val/: the demo's networks, a few steps, also without GPUs. Options are those of every job; NODES (for
# training, default 1) is in the environment. A job that fails leaves the later ones waiting for ever: scancel them, mend
# it, run this again; what is finished says so at once and is not done again.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
imagenet=$1 pretrained=$2 out=$3
shift 3
options=("$@")
here=$(cd "$(dirname "$0")" && pwd)
previous=
mkdir -p "$out"

# submit NAME NODES VERB...: the job's number goes to `previous`, which the next one waits for.
submit() {
    local name=$1 nodes=$2
    shift 2
    previous=$(sbatch --parsable --job-name="$name" --nodes="$nodes" --output="$out/$name-%j.log" "${options[@]}" \
        ${previous:+"--dependency=afterok:$previous"} "$here/run.sbatch" "$@")
    previous=${previous%%;*}
    echo "$name: job $previous"
}

if [ "$pretrained" = demo ]; then
    small=(--data.global_batch=64 --loop.num_steps=10 --loop.log_every=5)
    vae=(--config demo/vae_send "${small[@]}")
    latents=(--image_size=32)
    sit=(--config demo/sit "${small[@]}")
    sampling=(--num_samples=64 --guidance_scale=1 --sampler.kind=heun --sampler.num_steps=8)
    evaluation=(--reference="$imagenet/val" --features.name=judge)
else
    foundation=$pretrained/dinov2-vit-b.safetensors
    vae=(--config vae/send_vae_f16d32 --init_from="$pretrained/vavae-f16d32"
        --discriminator_from="$pretrained/vavae-f16d32-discriminator.pt"
        --alignment.foundation.weights="$foundation" --loss.perceptual.weights="$pretrained/vgg16-397923af.pth")
    latents=()
    sit=(--config sit/xl_1 --repa.foundation.weights="$foundation")
    sampling=(--config sampling/sde_250)
    evaluation=(--reference="$imagenet/VIRTUAL_imagenet256_labeled.npz" --features.weights="$pretrained/inception.pth")
fi
submit stage1 "${NODES:-1}" train vae "${vae[@]}" --run="$out/vae" --data.root="$imagenet/train"
submit latents 1 cache-latents --autoencoder="$out/vae" --data="$imagenet/train" --out="$out/latents" "${latents[@]}"
submit stage2 "${NODES:-1}" train sit "${sit[@]}" --run="$out/sit" --latents="$out/latents" --data.root="$imagenet/train"
submit samples 1 sample "${sampling[@]}" --generator="$out/sit" --autoencoder="$out/vae" --out="$out/samples"
submit evaluate 1 evaluate generation "${evaluation[@]}" --samples="$out/samples"
