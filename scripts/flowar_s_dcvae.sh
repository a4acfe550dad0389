#!/usr/bin/env bash
# FlowAR-S on the latents of DC-AE (stride 32, 32 channels): cache, training, evaluation (paper: FID 4.22, KL-16 3.61).
# Latents are 8x8: scales 1..8. Not run here: it needs ImageNet and the download.
set -euo pipefail
cd "$(dirname "$0")/.."

VAE="${VAE:-diffusers:mit-han-lab/dc-ae-f32c32-in-1.0-diffusers}"
IMAGENET="${IMAGENET:-/path/to/imagenet/}"
CACHE="${CACHE:-/path/to/imagenet_dcvae/}"
OUTPUT="${OUTPUT:-./output_dir/flowar_s_dcvae/}"

torchrun --standalone --nproc_per_node="${GPUS:-8}" scripts/cache_latents.py --data_path "$IMAGENET" \
    --cached_path "$CACHE" --vae_path "$VAE" --img_size 256

torchrun --standalone --nproc_per_node="${GPUS:-8}" main_flowar.py \
    --img_size 256 --vae_path "$VAE" --patch_size 1 --model flowar_small --diffloss_d 2 --diffloss_w 1024 \
    --epochs 400 --warmup_epochs 100 --batch_size 64 --global_batch 2048 --blr 5e-5 \
    --output_dir "$OUTPUT" --resume "$OUTPUT" --data_path "$IMAGENET" --cached_path "$CACHE"

torchrun --standalone --nproc_per_node="${GPUS:-8}" eval.py --model flowar_small --diffloss_d 2 --diffloss_w 1024 \
    --vae_path "$VAE" --eval_bsz 256 --num_images 50000 --num_step 25 --cfg 4.3 --guidance 0.9 \
    --output_dir "$OUTPUT/eval" --resume "$OUTPUT"
