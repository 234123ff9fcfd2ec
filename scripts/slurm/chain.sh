#!/usr/bin/env bash
# Both stages, the latents between them, samples and their evaluation, as jobs that wait for each other:
#
#   scripts/slurm/chain.sh IMAGENET PRETRAINED OUT [SBATCH OPTIONS...]
#   scripts/slurm/chain.sh /data/imagenet pretrained runs/paper --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12
#
# IMAGENET has train/ and val/; PRETRAINED the files that configs/README.md lists. Options are those of every job; NODES (for
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

foundation=$pretrained/dinov2-vit-b.safetensors
submit stage1 "${NODES:-1}" train vae --config vae/send_vae_f16d32 --run="$out/vae" --data.root="$imagenet/train" \
    --init_from="$pretrained/vavae-f16d32" --discriminator_from="$pretrained/vavae-f16d32-discriminator.pt" \
    --alignment.foundation.weights="$foundation" --loss.perceptual.weights="$pretrained/vgg16-397923af.pth"
submit latents 1 cache-latents --autoencoder="$out/vae" --data="$imagenet/train" --out="$out/latents"
submit stage2 "${NODES:-1}" train sit --config sit/xl_1 --run="$out/sit" --latents="$out/latents" \
    --data.root="$imagenet/train" --repa.foundation.weights="$foundation"
submit samples 1 sample --config sampling/sde_250 --generator="$out/sit" --autoencoder="$out/vae" --out="$out/samples"
submit evaluate 1 evaluate generation --samples="$out/samples" --reference="$imagenet/VIRTUAL_imagenet256_labeled.npz" \
    --features.weights="$pretrained/inception.pth"
