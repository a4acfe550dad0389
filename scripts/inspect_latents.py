"""Look at a cache of latents: statistics, decoded samples beside their originals, and one image's pyramid.

Prints mean and standard deviation of each channel of the scaled latents (about 0 and 1 if the latent scale is right),
and writes one picture: originals, what the VAE makes of their latents, and below the latents of the first image at
every scale, enlarged and decoded: what scale-wise generation goes through.

    python scripts/inspect_latents.py --cached_path imagenet_feature --data_path imagenet --vae_path kl16.ckpt \\
        --output latents.png
"""
from dataclasses import fields

import numpy as np
import torch
from PIL import Image
import torch.nn.functional as F

from scripts.pictures import check_picture, draw_table, save, stack
from models import FlowARError
from models.vae import DiagonalGaussian
from models.vaes import find_vae
from util.data import Images, find_split, to_uint8
from util.cluster import run_main, select_device
from util.data.pixels import WHITE
from util.data.latents import ShardedMoments, read_texts
from util.data.source import open_vae_on
from util.data.tables import Columns
from util.command_line import POSITIVE, Parser, add_options, as_type, list_of, path
from util.geometry import default_scales
from util.training.record import check_origin, origin_of, shorten


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cached_path", type=as_type(path), required=True, help="cache of shards")
    add("--data_path", type=as_type(path), help="images the cache was made from; default: show decoded images only")
    add_options(parser, fields(Columns))
    add("--split", default="train", choices=("train", "val"), help="split of the originals")
    add("--vae_path", type=as_type(path), help="the VAE, as main_flowar.py takes it; default: "
        "pretrained_models/vae/kl16.ckpt")
    add("--scales", type=as_type(list_of(POSITIVE)), help="pyramid scales; default: doubling up to the latent size")
    add("--images", type=as_type(POSITIVE), default=8, help="number of images to show")
    add("--output", type=as_type(path), required=True, help="PNG to write")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device of the VAE")
    return parser.parse_args()


def print_statistics(index):
    measured, scale, side = index["measured"], index["latent_scale"], index["img_size"] // index["stride"]
    print(f"{index['images']} images, {index['crops']} crops of {index['img_size']} pixels, {index['dtype']}, "
          f"{len(index['shards'])} shards, {len(index['skipped'])} skipped")
    own, shift = shorten(scale)
    print(f"latent scale {own}, shift {shift}; measured {measured['scale']:.4f}, {measured['shift']:.4f}")
    print("channel   mean     std   (scaled)")
    mean = torch.tensor(measured["channel_mean"], dtype=torch.float64)[:, None, None].expand(-1, side, side)
    std = torch.tensor(measured["channel_std"], dtype=torch.float64)[:, None, None]
    low = scale.normalize(mean).mean(dim=(1, 2))
    high = scale.normalize(mean + std).mean(dim=(1, 2))
    for channel, (mean, std) in enumerate(zip(low.tolist(), (high - low).tolist())):
        print(f"{channel:7d} {mean:7.3f} {std:7.3f}")


def originals(data, chosen, args):
    """The crops that were encoded."""
    index = data.index
    images = Images(find_split(args.data_path, args.split, columns=args), index["img_size"], index["seed"],
                    train=index["crops"] != "center", flip=False, background=tuple(index["background"] or WHITE),
                    columns=args)
    position = {images.listing.name(i): i for i in range(len(images))}
    names = [name for shard in index["shards"] for name in read_texts(data.root / shard["file"], "names")]
    missing = [names[i] for i in chosen if names[i] not in position]
    if missing:
        raise FlowARError(f"{args.data_path}/{args.split}: {missing[0]} not found: the cache was made from other "
                          "images")
    return pictures_of(to_uint8(torch.stack([images[(0, position[names[i]])][0] for i in chosen])))


def pictures_of(images):
    """PIL images of (n, 3, H, W) uint8."""
    return [Image.fromarray(image.numpy()) for image in images.permute(0, 2, 3, 1)]


@torch.no_grad()
def decode(vae, latent_scale, latents, device):
    return pictures_of(to_uint8(vae.decode(latent_scale.restore(latents.to(device)))).cpu())


def pyramid(latents, scales):
    """The latent (1, C, side, side) at every scale by area, enlarged to full size by bicubic interpolation."""
    size = latents.shape[-2:]
    small = [F.interpolate(latents, size=(s, s), mode="area") for s in scales]
    return torch.cat([F.interpolate(part, size=size, mode="bicubic") for part in small])


def main():
    args = parse_args()
    device = select_device(args.device)
    check_picture(args.output)
    if not ShardedMoments.is_at(args.cached_path):
        raise FlowARError(f"--cached_path {args.cached_path}: no cache of shards found: make one with "
                          "scripts/cache_latents.py")
    data = ShardedMoments(args.cached_path)
    print_statistics(data.index)
    named = find_vae(args.vae_path)
    vae = open_vae_on(named, device)
    check_origin(args.cached_path, data.origin, origin_of(named, vae))
    chosen = np.linspace(0, len(data) - 1, min(args.images, len(data))).astype(int)
    scale = data.index["latent_scale"]
    latents = scale.normalize(DiagonalGaussian(torch.stack([data[(0, int(i))][0].float() for i in chosen])).mode())
    scales = args.scales or default_scales(latents.shape[-1])
    rows, names = [decode(vae, scale, latents, device)], ["decoded"]
    if args.data_path:
        rows.insert(0, originals(data, chosen, args))
        names.insert(0, "original")
    growing = draw_table([decode(vae, scale, pyramid(latents[:1], scales), device)], ["pyramid"],
                         [f"{s}x{s}" for s in scales])
    save(stack(draw_table(rows, names), growing), args.output)


if __name__ == "__main__":
    run_main(main)
