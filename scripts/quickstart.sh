#!/usr/bin/env bash
# From nothing to a FlowAR that has learned real images: environment, data, VAE, latents, training, evaluation.
# Each stage leaves a file, and is skipped or resumed when the command is run again. All is in output/quickstart.
set -euo pipefail
EXTRA="quickstart"
source "$(dirname "$0")/env.sh"

OUT=output/quickstart
DEVICE="${DEVICE:-auto}"
mkdir -p "$OUT"

stage() {
    echo
    echo "== $1 (after $((SECONDS / 60)) min $((SECONDS % 60)) s) =="
}

if [ ! -d /usr/share/datasets/fashion-mnist ] && [ ! -d "$OUT/images" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1 || true # else it is downloaded
fi

stage "real images -> $OUT/images"
python scripts/quickstart_data.py --output "$OUT/images"

stage "VAE -> $OUT/vae.pth"
if [ ! -f "$OUT/vae.pth" ]; then
    python scripts/train_vae.py --data_path "$OUT/images" --output "$OUT/vae.pth" --device "$DEVICE" \
        --img_size 32 --embed_dim 4 --ch 16 --ch_mult 1,2,4 --num_res_blocks 0 --crop center --no_flip \
        --steps 750 --batch_size 32 --lr 3e-3 --num_workers 1
fi

stage "latents -> $OUT/latents"
for split in train val; do
    cache="$OUT/latents"
    [ "$split" = train ] || cache="$OUT/latents_val"
    [ -f "$cache/index.json" ] ||
        torchrun --standalone --nproc_per_node=1 scripts/cache_latents.py --data_path "$OUT/images" --split "$split" \
            --cached_path "$cache" --vae_path "$OUT/vae.pth" --img_size 32 --device "$DEVICE" --num_workers 1
done

stage "training -> $OUT/run"
images=$(find "$OUT/images/train" -name '*.png' | wc -l)
epochs=$((80000 / images)) # 4 of Fashion-MNIST, more of a smaller set
torchrun --standalone --nproc_per_node=1 main_flowar.py --img_size 32 --vae_path "$OUT/vae.pth" --vae_embed_dim 4 \
    --vae_stride 4 --patch_size 2 --model flowar_tiny --epochs "$epochs" --warmup_epochs "$((epochs * 5))e-2" \
    --batch_size 64 --lr 2e-3 --ema_rate 0.995 --attn_dropout 0 --proj_dropout 0 --no_flip \
    --save_last_freq 1 --eval_freq "$((epochs / 2))" --cfg 3 --guidance 1 \
    --output_dir "$OUT/run" --resume "$OUT/run" --data_path "$OUT/images" --cached_path "$OUT/latents" \
    --cached_val_path "$OUT/latents_val" --num_workers 1 --device "$DEVICE"

stage "evaluation -> $OUT/eval"
if [ ! -f "$OUT/val_stats.npz" ]; then
    python scripts/reference_stats.py --ref_images "$OUT/images/val" --output "$OUT/val_stats.npz" --keep_features \
        --feature_extractor efficientnet-lite0 --device "$DEVICE"
fi
if [ -n "$(find "$OUT/run" -name 'checkpoint-*.pth' -newer "$OUT/eval/settings.json" 2> /dev/null)" ]; then
    rm -rf "$OUT/eval" # of an older checkpoint
fi
torchrun --standalone --nproc_per_node=1 eval.py --resume "$OUT/run" --vae_path "$OUT/vae.pth" --num_images 2000 \
    --eval_bsz 250 --num_step 25 --cfg 3 --guidance 1 --output_dir "$OUT/eval" --fid_stats "$OUT/val_stats.npz" \
    --feature_extractor efficientnet-lite0 --device "$DEVICE" --save_images --evaluate

stage "pictures and table"
python scripts/sample.py --resume "$OUT/run" --vae_path "$OUT/vae.pth" --num_step 25 --cfg 3 --guidance 1 \
    --device "$DEVICE" --grid "$OUT/grid.png" --strip "$OUT/strip.png"
python scripts/quickstart_report.py --root "$OUT" --device "$DEVICE"

echo
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at:"
echo "  $OUT/grid.png         samples, a row for each class"
echo "  $OUT/strip.png        one image growing from 1x1 to the last scale"
echo "  $OUT/loss.png         the loss, and that of every scale"
echo "  $OUT/results.md       the table above; $OUT/eval/results.json has the settings"
echo "  $OUT/vae.pth.png      the VAE's reconstructions under the originals"
