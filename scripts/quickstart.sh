#!/usr/bin/env bash
# Draws from demo:fashion, whose weights are in this repository, then trains a small model on real images with the same
# frozen VAE: images, latents, training, evaluation, table. --train_vae trains a VAE first and writes to
# output/quickstart_vae. Each stage leaves a file and is skipped, or resumed, when the command is run again.
set -euo pipefail
OUT=output/quickstart VAE=demo:fashion MINUTES=8
case "$*" in
    "") ;;
    --train_vae) OUT=output/quickstart_vae VAE=$OUT/vae.pth MINUTES=12 ;;
    *) echo "error: $*: the only option is --train_vae, which trains a VAE too" >&2 && exit 2 ;;
esac
EXTRA="quickstart"
source "$(dirname "$0")/env.sh"
DEVICE="${DEVICE:-auto}"
if [ "$VAE" = demo:fashion ] && [ -f "$OUT/vae.pth" ]; then
    fail "$OUT is of an earlier version, with a VAE of its own: move or remove the folder $OUT"
fi
mkdir -p "$OUT"
trap '[ "$?" = 0 ] || echo "Not finished: the same command resumes." >&2' EXIT

stage() {
    echo
    echo "== $1 (after $((SECONDS / 60)) min $((SECONDS % 60)) s) =="
}

stage "pictures of demo:fashion, a trained model in this repository -> $OUT/demo.png"
[ -f "$OUT/demo.png" ] || python scripts/sample.py --resume demo:fashion --device "$DEVICE" --grid "$OUT/demo.png"
echo "See $OUT/demo.png. Now a model is trained from scratch: about $MINUTES minutes on two slow CPU cores."

stage "real images -> $OUT/images (as root from Debian's package dataset-fashion-mnist, else a download)"
if [ ! -d /usr/share/datasets/fashion-mnist ] && [ ! -d "$OUT/images" ] && [ "$(id -u)" = 0 ] &&
    command -v apt-get >/dev/null; then
    apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1 || true # else it is downloaded
fi
python scripts/quickstart_data.py --output "$OUT/images"

if [ "$VAE" != demo:fashion ]; then
    stage "VAE -> $VAE"
    [ -f "$VAE" ] || python scripts/train_vae.py --data_path "$OUT/images" --output "$VAE" --device "$DEVICE" \
        --img_size 32 --embed_dim 4 --ch 16 --ch_mult 1,2,4 --num_res_blocks 0 --crop center --no_flip --steps 750 \
        --batch_size 32 --lr 3e-3 --num_workers 1
fi

stage "latents -> $OUT/latents"
for split in train val; do
    cache="$OUT/latents"
    [ "$split" = train ] || cache="$OUT/latents_val"
    [ -f "$cache/index.json" ] ||
        python scripts/cache_latents.py --data_path "$OUT/images" --split "$split" \
            --cached_path "$cache" --vae_path "$VAE" --img_size 32 --device "$DEVICE" --num_workers 1 --no_flip
done

stage "training -> $OUT/run"
python main_flowar.py --img_size 32 --vae_path "$VAE" --vae_embed_dim 4 \
    --vae_stride 4 --patch_size 2 --model flowar_tiny --epochs 4 --warmup_epochs 0.2 \
    --batch_size 64 --lr 8e-3 --weight_decay 0.1 --condition_noise 0.3 --ema_rate 0.98 --attn_dropout 0 \
    --proj_dropout 0 --no_flip \
    --save_last_freq 1 --eval_freq 4 --cfg 2.5 --guidance 1 --solver ab2 --num_step 12 --time_grid uniform \
    --output_dir "$OUT/run" --resume "$OUT/run" --data_path "$OUT/images" --cached_path "$OUT/latents" \
    --cached_val_path "$OUT/latents_val" --num_workers 0 --device "$DEVICE"

stage "evaluation -> $OUT/eval"
if [ ! -f "$OUT/val_stats.npz" ]; then
    python scripts/reference_stats.py --ref_images "$OUT/images/val" --output "$OUT/val_stats.npz" --keep_features \
        --feature_extractor efficientnet-lite0 --device "$DEVICE"
fi
if [ -n "$(find "$OUT/run" -name 'checkpoint-*.pth' -newer "$OUT/eval/settings.json" 2> /dev/null)" ]; then
    rm -rf "$OUT/eval" # of an older checkpoint
fi
python eval.py --resume "$OUT/run" --num_images 2000 --eval_bsz 250 \
    --output_dir "$OUT/eval" --fid_stats "$OUT/val_stats.npz" --feature_extractor efficientnet-lite0 \
    --device "$DEVICE" --save_images --evaluate

stage "pictures and table"
python scripts/sample.py --resume "$OUT/run" --device "$DEVICE" --grid "$OUT/grid.png" --strip "$OUT/strip.png"
python scripts/quickstart_report.py --root "$OUT" --device "$DEVICE"

echo
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at:"
echo "  $OUT/demo.png         samples of demo:fashion, trained longer: a row for each class"
echo "  $OUT/grid.png         those of the model that was trained now"
echo "  $OUT/strip.png        one image growing from 1x1 to the last scale"
echo "  $OUT/loss.png         the loss, and that of every scale"
echo "  $OUT/results.md       the table above; $OUT/eval/results.json has the settings"
[ "$VAE" = demo:fashion ] || echo "  $VAE.png      the VAE's reconstructions under the originals"
