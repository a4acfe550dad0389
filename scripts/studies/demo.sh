#!/usr/bin/env bash
# How the weights of demo:fashion (models/demo/fashion) were made: hours on two slow cores. Each stage is skipped, or
# resumed, when the command is run again. Weights differ in their last bits from one kind of CPU to another, and so do
# the SHA-256 of the files, which models/hub.py names: write the new ones there after each "pack".
set -euo pipefail
EXTRA="quickstart"
source "$(dirname "$0")/../env.sh"

OUT=output/demo
mkdir -p "$OUT"

python scripts/quickstart_data.py --output "$OUT/images" --train 6000 --val 1000
python scripts/quickstart_data.py --output "$OUT/fewer" --train 2000
[ -f "$OUT/classifier.pth" ] || python scripts/studies/demo.py --classifier "$OUT"
python scripts/studies/demo.py --pack "$OUT/classifier.pth" classifier.safetensors

[ -f "$OUT/vae.pth" ] || python scripts/train_vae.py --data_path "$OUT/images" --output "$OUT/vae.pth" --img_size 32 \
    --embed_dim 4 --ch 16 --ch_mult 1,2,4 --num_res_blocks 1 --crop center --no_flip --steps 12000 --batch_size 16 \
    --lr 2e-3 --kl_weight 1e-5 --perceptual 0.3 --perceptual_from 6000 --ema_rate 0.999 --num_workers 1
python scripts/studies/demo.py --pack "$OUT/vae.pth" vae.safetensors

cache() { # images, split, folder of latents
    [ -f "$3/index.json" ] ||
        python scripts/cache_latents.py --data_path "$1" --split "$2" --cached_path "$3" --vae_path demo:fashion \
            --img_size 32 --num_workers 1
}
cache "$OUT/images" train "$OUT/latents"
cache "$OUT/images" val "$OUT/latents_val"
cache "$OUT/fewer" train "$OUT/fewer_latents"
COMMON=(--vae_path demo:fashion --cached_val_path "$OUT/latents_val" --cfg 2.5 --guidance 1 --solver ab2 --num_step 12
    --time_grid uniform --no_flip --num_workers 1 --device cpu)

torchrun --standalone --nproc_per_node=2 main_flowar.py --img_size 32 --vae_embed_dim 4 --vae_stride 4 --patch_size 2 \
    --model flowar_tiny --epochs 10 --warmup_epochs 0.5 --batch_size 32 --optimizer muon --lr 8e-3 \
    --weight_decay 0.1 --condition_noise 0.3 --ema_rate 0.999 --attn_dropout 0 --proj_dropout 0 --eval_freq 5 \
    --output_dir "$OUT/run" --resume "$OUT/run" --data_path "$OUT/images" --cached_path "$OUT/latents" "${COMMON[@]}"
torchrun --standalone --nproc_per_node=2 scripts/distill.py --resume "$OUT/run" --output_dir "$OUT/student" \
    --data_path "$OUT/fewer" --cached_path "$OUT/fewer_latents" --batch_size 8 "${COMMON[@]}" # 20,000 pairs

for name in run student; do
    [ -d "$OUT/$name-export" ] || python scripts/export.py --resume "$OUT/$name" --output "$OUT/$name-export"
done
python scripts/studies/demo.py --pack "$OUT/run-export/model.safetensors" model.safetensors
python scripts/studies/demo.py --pack "$OUT/student-export/model.safetensors" student.safetensors
