"""Train FlowAR on an image folder or on cached latents.

    torchrun --nproc_per_node=8 --nnodes=4 --node_rank=$WORKER_ID --master_addr=... --master_port=... main_flowar.py \\
        --img_size 256 --vae_path kl16.ckpt --vae_embed_dim 16 --vae_stride 16 --patch_size 1 \\
        --model flowar_small --diffloss_d 2 --diffloss_w 1024 --epochs 400 --warmup_epochs 100 --batch_size 64 \\
        --blr 5e-5 --output_dir output --resume output --data_path imagenet --cached_path imagenet_feature

Run the same command again to resume. --help lists the options, which are in util/options.py.
"""
from engine_flowar import evaluate_sweep, train
from util import cluster, dry_run
from util.command_line import parse_options
from util.evaluation.pipeline import open_evaluation
from util.options import TrainingOptions, evaluation_options
from util.recipe import build_run


def main():
    args = parse_options(TrainingOptions, description=__doc__.splitlines()[0])
    if args.deterministic:
        cluster.set_deterministic()
    if args.dry_run:
        return dry_run.run(args, build_run)
    device = cluster.init(args.device, args.timeout)
    if args.evaluate:
        return evaluate_sweep(*open_evaluation(evaluation_options(args), device))
    train(build_run(args, device))


if __name__ == "__main__":
    cluster.run_main(main)
