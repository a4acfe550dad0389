"""What every training run has: checkpoints, progress, recipe, seeds, log."""
