#!/usr/bin/env bash
# FlowAR-S on the latents of SD-VAE (stride 8, 4 channels): cache, training, evaluation (paper: FID 3.94, KL-16 3.61).
# The paper does not say how its 32x32 latents become tokens: here 2x2 cells a token, scales 1..16. Not run here.
set -euo pipefail
cd "$(dirname "$0")/.."

VAE="${VAE:-diffusers:stabilityai/sd-vae-ft-mse}"
IMAGENET="${IMAGENET:-/path/to/imagenet/}"
CACHE="${CACHE:-/path/to/imagenet_sdvae/}"
OUTPUT="${OUTPUT:-./output_dir/flowar_s_sdvae/}"

torchrun --standalone --nproc_per_node="${GPUS:-8}" scripts/cache_latents.py --data_path "$IMAGENET" \
    --cached_path "$CACHE" --vae_path "$VAE" --img_size 256

torchrun --standalone --nproc_per_node="${GPUS:-8}" main_flowar.py \
    --img_size 256 --vae_path "$VAE" --patch_size 2 --model flowar_small --diffloss_d 2 --diffloss_w 1024 \
    --epochs 400 --warmup_epochs 100 --batch_size 64 --global_batch 2048 --blr 5e-5 \
    --output_dir "$OUTPUT" --resume "$OUTPUT" --data_path "$IMAGENET" --cached_path "$CACHE"

torchrun --standalone --nproc_per_node="${GPUS:-8}" eval.py --model flowar_small --diffloss_d 2 --diffloss_w 1024 \
    --vae_path "$VAE" --eval_bsz 256 --num_images 50000 --num_step 25 --cfg 4.3 --guidance 0.9 \
    --output_dir "$OUTPUT/eval" --resume "$OUTPUT"
