#!/usr/bin/env bash
# train_flowar_s.sh with what saved images on Fashion-MNIST (docs/measurements.md, "Recipes and Muon"): Muon, weight
# decay 0.1, condition noise 0.3; three quarters of the epochs, which sufficed there in loss and nearly in distance,
# on emoji not (--epochs 400 --warmup_epochs 100 keeps the release's). NOT RUN ON IMAGENET. In the first thousand
# steps watch log.jsonl: loss_scale_1, which condition noise leaves alone, should fall at least as fast as with
# train_flowar_s.sh, grad_norm get below the clip of 3, and bad_steps stay 0; else halve --blr. Compare FID, not the
# other losses, which condition noise raises even where it improves the images. Needs torch 2.9; Muon with --fsdp is
# refused.
set -euo pipefail
exec bash "$(dirname "$0")/train_flowar_s.sh" --optimizer muon --weight_decay 0.1 --condition_noise 0.3 \
    --epochs 300 --warmup_epochs 75 --posthoc_ema 5000 "$@"
