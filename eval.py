"""Evaluate FlowAR: sample class-balanced images with the EMA (or --weights raw) and compute FID and Inception Score.

    torchrun --standalone --nproc_per_node=8 eval.py --model flowar_small --diffloss_d 2 --diffloss_w 1024 \\
        --eval_bsz 256 --num_images 50000 --num_step 25 --cfg 4.3 --guidance 0.9 --output_dir output \\
        --resume FlowAR-S.pth --vae_path kl16.ckpt --fid_stats adm_in256_stats.npz --evaluate

The size and the geometry are recognised from the checkpoint and the VAE where they are not given.
"""
from engine_flowar import evaluate_sweep
from util import cluster
from util.command_line import parse_options
from util.evaluation.pipeline import open_evaluation
from util.options import EvaluationOptions


def main():
    args = parse_options(EvaluationOptions, description=__doc__.splitlines()[0])
    evaluate_sweep(*open_evaluation(args, cluster.init(args.device, args.timeout)))


if __name__ == "__main__":
    cluster.run_main(main)
