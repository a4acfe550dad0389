#!/usr/bin/env bash
# flowar_large on ImageNet 256x256, 50,000 images (the paper reports FID 1.90).
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --standalone --nproc_per_node="${GPUS:-8}" eval.py \
    --model flowar_large --diffloss_d 12 --diffloss_w 1024 \
    --eval_bsz 256 --num_images 50000 --num_step 25 --cfg 2.4 --guidance 0.9 \
    --output_dir "${OUTPUT:-./output_dir/eval_flowar_large}" --resume "${CHECKPOINT:-pretrained_models/FlowAR-L.pth}" \
    --vae_path "${VAE:-pretrained_models/vae/kl16.ckpt}" --data_path "${IMAGENET:-/path/to/imagenet/}" --evaluate "$@"
