"""Cache the VAE's posterior moments of an image folder in MAR's layout: one .npz an image, in class folders.

Each file holds `moments` and `moments_flip` (of the flipped image, encoded), float32 (2C, h, w), of the centre crop.
Killed at any time, the next run encodes what is missing; latents.json says whether the cache is complete.

    torchrun --nproc_per_node=8 scripts/cache_latents.py --data_path imagenet --cached_path imagenet_feature \\
        --vae_path kl16.ckpt --img_size 256
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import FlowARError  # noqa: E402
from models.vae import load_vae  # noqa: E402
from models.weights import writing  # noqa: E402
from util import distributed  # noqa: E402
from util.checkpoint import file_hash  # noqa: E402
from util.data import CACHE_INFO, Images, read_cache_info  # noqa: E402
from util.files import make_directory, write_json  # noqa: E402
from util.options import count, positive  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_path", required=True, help="folder with train/ (and val/), class folders of images")
    parser.add_argument("--cached_path", required=True, help="folder to write")
    parser.add_argument("--vae_path", default="pretrained_models/vae/kl16.ckpt", help="VAE to encode with")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="which images")
    parser.add_argument("--img_size", type=positive, default=256, help="pixels a side of the centre crop")
    parser.add_argument("--batch_size", type=positive, default=128, help="images a process")
    parser.add_argument("--num_workers", type=count, default=8, help="data loading processes of every rank")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to encode")
    return parser.parse_args()


def target(data, index, cached_path):
    """<cached_path>/<class>/<file name>.npz, MAR's naming."""
    path = Path(data.folder.samples[index][0])
    return cached_path / path.relative_to(data.folder.root).parent / f"{path.name}.npz"


@torch.no_grad()
def encode_missing(data, vae, args, cached_path, device):
    mine = range(distributed.rank(), len(data), distributed.world_size())
    missing = [i for i in mine if not target(data, i, cached_path).is_file()]
    keys = Subset(data, [(0, i) for i in missing])
    loader = DataLoader(keys, batch_size=args.batch_size, num_workers=args.num_workers)
    progress = tqdm(total=len(missing), desc=f"{args.split} latents of rank 0", unit="img", mininterval=2,
                    disable=not distributed.is_main())
    for batch, (images, _) in enumerate(loader):
        both = torch.cat((images, images.flip(-1))).to(device)
        moments, flipped = vae.encode(both).parameters.float().cpu().chunk(2)
        for j in range(len(images)):
            with writing(target(data, missing[batch * args.batch_size + j], cached_path), sync=False) as file:
                np.savez(file, moments=moments[j].numpy(), moments_flip=flipped[j].numpy())
        progress.update(len(images))
    progress.close()
    return len(missing)


def check_existing(cached_path, info):
    """Refuse to mix caches; what an unfinished or finished cache says must agree with this run."""
    found = read_cache_info(cached_path)
    for key, value in info.items() if found else ():
        if found.get(key) != value and key != "complete":
            raise FlowARError(f"{cached_path}: this cache was made with {key} {found.get(key)}, now it is {value}; "
                              "choose another --cached_path or remove it")


def main():
    args = parse_args()
    device = distributed.init(args.device)
    vae, _ = load_vae(args.vae_path)
    if args.img_size % vae.stride:
        raise FlowARError(f"--img_size {args.img_size} is not a multiple of the VAE's stride {vae.stride}")
    vae.to(device)
    cached_path = Path(args.cached_path)
    data = Images(Path(args.data_path) / args.split, args.img_size)
    info = {"complete": False, "images": len(data), "classes": data.classes, "img_size": args.img_size,
            "crop": "center", "vae_sha256": file_hash(args.vae_path), "channels": vae.embed_dim, "stride": vae.stride,
            "latent_scale": vae.latent_scale}
    check_existing(cached_path, info)
    if distributed.is_main():
        for folder in {Path(path).parent.relative_to(data.folder.root) for path, _ in data.folder.samples}:
            make_directory(cached_path / folder)
        write_json(info, cached_path / CACHE_INFO)
    distributed.barrier()
    new = encode_missing(data, vae, args, cached_path, device)
    os.sync()  # the latents reach the disk before the cache is called complete
    distributed.barrier()
    if distributed.is_main():
        write_json({**info, "complete": True}, cached_path / CACHE_INFO)
    distributed.log(f"{cached_path}: {len(data)} latents ({new} new on rank 0)")


if __name__ == "__main__":
    distributed.run_main(main)
