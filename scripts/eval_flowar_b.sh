#!/usr/bin/env bash
# flowar_base on ImageNet 256x256, 50,000 images (not released: settings of FlowAR-S, to be tuned; paper: FID 2.90).
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --standalone --nproc_per_node="${GPUS:-8}" eval.py \
    --model flowar_base --diffloss_d 6 --diffloss_w 1024 \
    --eval_bsz 256 --num_images 50000 --num_step 25 --cfg 4.3 --guidance 0.9 \
    --output_dir "${OUTPUT:-./output_dir/eval_flowar_base}" --resume "${CHECKPOINT:-pretrained_models/FlowAR-B.pth}" \
    --vae_path "${VAE:-pretrained_models/vae/kl16.ckpt}" --data_path "${IMAGENET:-/path/to/imagenet/}" --evaluate "$@"
