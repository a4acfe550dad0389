#!/usr/bin/env bash
# FlowAR-H on a SLURM cluster, as jobs of a day until it is done: sbatch scripts/slurm.sh [options of main_flowar.py]
#
# Five minutes before the time limit, and when it is preempted, SLURM signals every rank: all save together and leave
# with status 75, and the job goes back into the queue, where the same command resumes from the last checkpoint. A dead
# process or node queues it again too, unless MAX_FAILURES come in a row without a new checkpoint; an error that a user
# must fix (status 2) ends it for good.
#SBATCH --job-name=flowar
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=flowar-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2

export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
# Since 22.05 srun does not take it from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
OUTPUT="${OUTPUT:-./output_dir/}"
OUTPUT="${OUTPUT/#\~\//$HOME/}"
failures="$OUTPUT/failures" # a line for each job in a row that left no new checkpoint
mkdir -p "$OUTPUT"
touch "$OUTPUT/started"

# One process a GPU straight from srun, without torchrun: signals reach it and its exit status comes back. Ranks that
# leave have two minutes to save; --kill-on-bad-exit=1 would kill the others at the first, and return their status.
# --export=ALL: after sbatch --export=NONE or --export=OUTPUT=..., ranks would not get what is exported above.
# shellcheck disable=SC2016 # that bash's own variables
srun --export=ALL --kill-on-bad-exit=0 --wait=120 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
    "${PYTHON:-python}" main_flowar.py --model flowar_huge --diffloss_d 12 --diffloss_w 1536 \
    --img_size 256 --vae_path "${VAE:-pretrained_models/vae/kl16.ckpt}" --vae_embed_dim 16 --vae_stride 16 \
    --patch_size 1 --epochs 400 --warmup_epochs 100 --batch_size 32 --global_batch 2048 --blr 5e-5 --use_checkpoint \
    --precision bf16 --output_dir "$OUTPUT" --resume "$OUTPUT" \
    --data_path "${IMAGENET:-/path/to/imagenet/}" --cached_path "${CACHE:-/path/to/imagenet_feature/}" "$@"
status=$?

newer=$(find "$OUTPUT" -maxdepth 1 -name 'checkpoint-*.pth' -newer "$OUTPUT/started")
if [ "$status" = 0 ] || [ "$status" = 2 ] || [ -n "$newer" ]; then
    rm -f "$failures"
else
    echo "job $SLURM_JOB_ID ended with status $status" >> "$failures"
fi
if [ "$status" != 0 ] && [ "$status" != 2 ]; then
    [ ! -f "$failures" ] || [ "$(wc -l < "$failures")" -lt "${MAX_FAILURES:-10}" ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
