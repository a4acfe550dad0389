#!/usr/bin/env bash
# train_flowar_s.sh with what saved images on Fashion-MNIST (docs/measurements.md, "Recipes and Muon"): Muon, weight
# decay 0.1, condition noise 0.1, three quarters of the epochs. NOT RUN ON IMAGENET. In the first thousand steps watch
# log.jsonl: at the same number of images the loss of every scale should be below that of train_flowar_s.sh, grad_norm
# fall under the clip of 3, and bad_steps stay 0; else halve --blr. Later compare FID, not validation loss, which
# condition noise raises even where it improves the images. Needs torch 2.9; Muon with --fsdp is refused.
set -euo pipefail
exec bash "$(dirname "$0")/train_flowar_s.sh" --optimizer muon --weight_decay 0.1 --condition_noise 0.1 \
    --epochs 300 --warmup_epochs 75 --posthoc_ema 5000 "$@"
