#!/usr/bin/env bash
# flowar_base on ImageNet 256x256: 4 hosts of 8 GPUs. Set WORKER_ID, MASTER_ADDR, MASTER_PORT on each, and paths.
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${GPUS:-8}" --nnodes="${NNODES:-4}" --node_rank="${WORKER_ID:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" main_flowar.py \
    --img_size 256 --vae_path "${VAE:-pretrained_models/vae/kl16.ckpt}" --vae_embed_dim 16 --vae_stride 16 \
    --patch_size 1 --model flowar_base --diffloss_d 6 --diffloss_w 1024 \
    --epochs 400 --warmup_epochs 100 --batch_size 64 --blr 5e-5 \
    --output_dir "${OUTPUT:-./output_dir/}" --resume "${OUTPUT:-./output_dir/}" \
    --data_path "${IMAGENET:-/path/to/imagenet/}" --cached_path "${CACHE:-/path/to/imagenet_feature/}" "$@"
