"""Cache the VAE's posterior moments of an image folder, in shards (see util/data/latents.py) or in MAR's layout.

--crops center takes ADM's centre crop, as MAR does; --crops N takes N random crops of the training recipe. Every crop
is stored twice, as it is and flipped: the flipped image is encoded, not its moments flipped. --no_flip stores it once,
for validation and for trainings with --no_flip. Killed at any time, the next run keeps finished shards and redoes the
rest; the index appears last.

    torchrun --standalone --nproc_per_node=8 scripts/cache_latents.py --data_path imagenet \\
        --cached_path imagenet_feature --vae_path kl16.ckpt --img_size 256
"""
import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import Dataset
from tqdm import tqdm

from models import FlowARError, settings
from models.vae import DiagonalGaussian
from models.vaes import find_vae
from models.weights import file_hash, writing
from util import cluster
from util.data import Images, find_split, latents
from util.data.folders import Folder
from util.data.loaders import with_workers
from util.data.other_latents import NPZ_INFO
from util.data.pixels import CONVERSIONS, RESIZE_MARGIN, read_image
from util.data.source import open_vae_on
from util.data.tables import Columns
from util.files import holds_bytes, make_directory, read_json, write_bytes, write_json
from util.training.record import origin_of, shorten
from util.command_line import PIXELS, POSITIVE, SEED, WORKERS, Parser, add_options, as_type, color, path

MOST_CROPS = 1000
DIGEST_BYTES = 16  # of an image's file
# Settings that may change: a run may begin to skip when it meets a bad image, and images and VAE may be copied.
FREE = ("complete", "on_bad_image", "left_out", "vae")
NEWER = ("source_sha256", "background", "vae_tensors")  # that older caches do not know


def crops_option(text):
    return text if text == "center" else settings.number(int, 1, MOST_CROPS)(text)


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", type=as_type(path), required=True, help="folder or archive with train/ (and val/), or "
        "hf:OWNER/NAME, see docs/data.md")
    add_options(parser, fields(Columns))
    add("--cached_path", type=as_type(path), required=True, help="folder to write")
    add("--vae_path", type=as_type(path), help="the VAE, as main_flowar.py takes it; default: "
        "pretrained_models/vae/kl16.ckpt")
    add("--split", default="train", choices=("train", "val"), help="split to encode")
    add("--img_size", type=as_type(PIXELS), default=256, help="crop size in pixels")
    add("--crops", type=as_type(crops_option), default="center", help="center, or the number of random crops per image")
    add("--no_flip", action="store_true", help="do not store a flipped copy of each crop")
    add("--format", default="shards", choices=("shards", "npz"), help="shards, or MAR's .npz files")
    add("--dtype", default="float16", choices=latents.DTYPES, help="data type of the moments in shards")
    add("--shard_size", type=as_type(POSITIVE), default=10000, help="images per shard")
    add("--on_bad_image", default="error", choices=("error", "skip"), help="unreadable images: stop, or skip them")
    add("--background", type=as_type(color), default="white", help="colour behind transparent pixels: '#ff8000' or "
        "255,128,0")
    add("--batch_size", type=as_type(POSITIVE), default=128, help="crops per process and forward pass")
    add("--num_workers", type=as_type(WORKERS), help="data loading workers per process; default: as in training")
    add("--seed", type=as_type(SEED), default=0, help="seed of the crops and the order of images")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device of the VAE")
    args = parser.parse_args()
    args.flip = not args.no_flip
    return args


class Row(NamedTuple):
    """What a shard holds of an image beside its moments."""
    index: int
    label: int
    converted: int  # bits: which of CONVERSIONS it took
    digest: bytes  # of its file


class Crops(Dataset):
    """Item i: (all crops of image i (crops, 3, size, size), its Row), or the error of an unreadable image."""

    def __init__(self, images, crops, flip, skip):
        self.images, self.crops, self.variants, self.skip = images, crops, (1 + flip) * crops, skip

    def __getitem__(self, index):
        listing = self.images.listing
        try:
            content = listing.read(index)
            image, conversions = read_image(content, self.images.background, listing.path(index))
        except FlowARError as error:
            if self.skip:
                return str(error)
            raise FlowARError(f"{error}; fix or remove it, or use --on_bad_image skip") from error
        crops = [self.images.crop(image, (crop, index)) for crop in range(self.crops)]
        digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
        converted = sum(1 << number for number in conversions)
        return torch.stack(crops), Row(index, int(listing.labels[index]), converted, digest)


def encode(vae, crops, flip, device, batch_size):
    """Moments (n, variants, 2C, h, w) float32 of crops (n, crops, 3, H, W): each as it is and, if wanted, flipped."""
    images = torch.stack((crops, crops.flip(-1)) if flip else (crops,), dim=2).flatten(0, 2)
    moments = torch.cat([vae.encode(part.to(device)).parameters.float().cpu() for part in images.split(batch_size)])
    return moments.unflatten(0, (len(crops), -1))


def split_into(indices, size):
    """Lists of at most `size` of the indices."""
    return [indices[first:first + size] for first in range(0, len(indices), size)]


def encode_groups(data, groups, vae, args, device):
    """Yield, for each group of image indices, (Rows, moments, messages of unreadable images). Batches do not cross the
    groups: their composition depends on nothing else.
    """
    per_batch = max(1, args.batch_size // data.variants)
    batches = [batch for group in groups for batch in split_into(group, per_batch)]
    loader = iter(with_workers(data, args.num_workers, batch_sampler=batches, collate_fn=list))
    progress = tqdm(total=sum(map(len, groups)), desc=f"{args.split} latents of rank 0", unit="img", mininterval=2,
                    disable=not cluster.is_main())
    for group in groups:
        rows, parts, bad = [], [], []
        for _ in split_into(group, per_batch):
            items, good = next(loader), []
            for item in items:
                if isinstance(item, str):
                    bad.append(item)
                else:
                    good.append(item)
            progress.update(len(items))
            if good:
                crops, rows_of_batch = zip(*good)
                rows += rows_of_batch
                parts.append(encode(vae, torch.stack(crops), args.flip, device, args.batch_size))
        if parts:
            yield rows, torch.cat(parts), bad
        elif args.format == "shards":
            raise FlowARError(f"{args.data_path}: {len(group)} images in a row cannot be read ({bad[0]}); fix or "
                              "remove them")
    progress.close()


# ---- shards --------------------------------------------------------------------------------------------------


def shard_file(number):
    return f"shard-{number:05d}.safetensors"


def is_good(path, settings, sha256):
    """Whether a shard is there and whole, and, if a finished index knew it, unchanged."""
    try:
        latents.open_shard(path, settings)
    except FlowARError:
        return False
    return sha256 is None or file_hash(path) == sha256


def write_shards(data, groups, vae, args, device, folder, settings, hashes):
    """Write this rank's missing or damaged shards, one for each group of images; returns describe_shard of all of
    this rank's. hashes: {file: SHA-256} that a finished index knew.
    """
    mine = range(cluster.rank(), len(groups), cluster.world_size())
    missing = []
    for number in mine:
        if not is_good(folder / shard_file(number), settings, hashes.get(shard_file(number))):
            missing.append(number)
    encoded = encode_groups(data, [groups[number] for number in missing], vae, args, device)
    for (rows, moments, bad), number in zip(encoded, missing):
        write_bytes(save({
            "moments": moments.to(latents.DTYPES[args.dtype]), "labels": torch.tensor([row.label for row in rows]),
            "names": latents.texts_tensor(data.images.listing.name(row.index) for row in rows),
            "digests": torch.tensor([list(row.digest) for row in rows], dtype=torch.uint8),
            "converted": torch.tensor([row.converted for row in rows], dtype=torch.uint8),
            "skipped": latents.texts_tensor(bad),
        }), folder / shard_file(number))
    return [describe_shard(folder / shard_file(number), settings) for number in mine]


def describe_shard(path, settings):
    """What the index says of a shard, with `skipped`, its unreadable images, `converted`, how many images took each of
    CONVERSIONS, and `sums` (2, C) of mean and square over its latents, from which the latent scale is measured.
    """
    moments = latents.open_shard(path, settings)[0][:]
    posterior = DiagonalGaussian(moments[:, 0].float())
    mean, std = posterior.mean.double(), (0.5 * posterior.logvar.double()).exp()
    sums = torch.stack([part.mean(dim=(2, 3)).sum(0) for part in (mean, mean.square() + std.square())])
    bits = latents.open_file(path).get_tensor("converted")
    return {"file": path.name, "images": len(moments), "bytes": path.stat().st_size, "sha256": file_hash(path),
            "skipped": latents.read_texts(path, "skipped"), "sums": sums,
            "converted": [int((bits >> number & 1).sum()) for number in range(len(CONVERSIONS))]}


def build_index(settings, shards):
    shards = sorted(shards, key=lambda shard: shard["file"])
    images, skipped = sum(shard["images"] for shard in shards), []
    sums, converted = 0, np.zeros(len(CONVERSIONS), np.int64)
    for shard in shards:
        skipped += shard.pop("skipped")
        converted += shard.pop("converted")
        sums = sums + shard.pop("sums")
    mean, square = sums / images
    measured = {"scale": 1 / (square.mean() - mean.mean() ** 2).sqrt().item(), "shift": mean.mean().item(),
                "channel_mean": mean.tolist(), "channel_std": (square - mean**2).sqrt().tolist()}
    return {"format": latents.FORMAT, **settings, "images": images, "measured": measured, "skipped": sorted(skipped),
            "converted": {how: count for how, count in zip(CONVERSIONS, converted.tolist()) if count},
            "shards": shards}


def cache_shards(data, vae, args, device, folder, settings):
    order = np.random.default_rng(args.seed).permutation(len(data.images)).tolist()  # every shard mixes the classes
    groups = split_into(order, args.shard_size)
    hashes = cluster.from_main(lambda: reopen(folder, settings))
    parts = cluster.gather_to_main(write_shards(data, groups, vae, args, device, folder, settings, hashes))
    if parts is None:
        return
    index = build_index(settings, sum(parts, []))
    write_json(index, folder / latents.INDEX)
    (folder / latents.UNFINISHED).unlink(missing_ok=True)
    size = sum(shard["bytes"] for shard in index["shards"])
    if index["converted"]:
        print(f"{folder}: images " + ", ".join(f"{count:,} {how}" for how, count in index["converted"].items()))
    print(f"{folder}: {index['images']} images in {len(groups)} shards, {size / 2**20:.1f} MiB, "
          f"{len(index['skipped'])} skipped; latent scale {index['measured']['scale']:.4f}, the VAE's "
          f"{shorten(vae.latent_scale)[0]}")


def reopen(folder, settings):
    """Begin or go on with a cache of shards; {file: SHA-256} of those that a finished index knew."""
    begin(folder, latents.UNFINISHED, settings)
    index = folder / latents.INDEX
    if not index.is_file():
        return {}
    hashes = {shard["file"]: shard["sha256"] for shard in read_json(index)["shards"]}
    index.unlink()  # no cache until every shard was looked at
    return hashes


def begin(folder, name, settings):
    """Leave the settings of a cache that is being written; refuse to mix it with one of other settings."""
    make_directory(folder)
    other = (latents.INDEX, latents.UNFINISHED) if name == NPZ_INFO else (NPZ_INFO,)
    if any((folder / file).is_file() for file in other):
        raise FlowARError(f"{folder}: this cache was made with another --format; choose another --cached_path or "
                          "remove it")
    for file in (folder / name, folder / latents.INDEX):
        if file.is_file():
            check_same(folder, read_json(file), settings)
    write_json(settings, folder / name)


def check_same(folder, before, settings):
    """FlowARError unless a cache is of these settings and images; those that older caches lack are not known."""
    for key, value in settings.items():
        if before.get(key) == value or key in FREE or key in NEWER and key not in before:
            continue
        if key == "vae_sha256" and before.get("vae_tensors") == settings["vae_tensors"]:
            continue  # the same in another file
        if key == "source_sha256":
            raise FlowARError(f"{folder}: the images differ from those of this cache (names or sizes changed); choose "
                              "another --cached_path or remove it")
        if key == "variants":
            raise FlowARError(f"{folder}: this cache was made {'with' if before[key] < value else 'without'} "
                              "--no_flip; use the same, choose another --cached_path or remove it")
        raise FlowARError(f"{folder}: this cache was made with {key} {str(before.get(key))[:200]}, now it is "
                          f"{str(value)[:200]}; choose another --cached_path or remove it")


# ---- MAR's layout --------------------------------------------------------------------------------------------


def cache_npz(data, vae, args, device, folder, settings):
    """<cached_path>/<class>/<file name>.npz with `moments` and `moments_flip`, float32."""
    listing = data.images.listing
    if listing.labels_from:
        raise FlowARError("--format npz supports labels from class folders only, but these come from "
                          f"{listing.labels_from}: use --format shards")
    info = {**settings, "images": len(listing), "complete": False}
    cluster.from_main(lambda: begin_npz(folder, info, listing))
    mine = range(cluster.rank(), len(listing), cluster.world_size())
    missing = [index for index in mine if not holds_bytes(folder / f"{listing.name(index)}.npz")]
    for rows, moments, _ in encode_groups(data, split_into(missing, args.batch_size), vae, args, device):
        for row, (plain, flipped) in zip(rows, moments.numpy()):
            with writing(folder / f"{listing.name(row.index)}.npz", sync=False) as file:
                np.savez(file, moments=plain, moments_flip=flipped)
    os.sync()  # the latents reach the disk before the cache is called complete
    cluster.barrier()
    if cluster.is_main():
        files = len(Folder(folder, {".npz"}))  # unreadable images have none
        write_json({**info, "files": files, "complete": True}, folder / NPZ_INFO)
        print(f"{folder}: {files} latents of {len(listing)} images")


def begin_npz(folder, info, listing):
    begin(folder, NPZ_INFO, info)
    folders = {os.path.dirname(listing.name(index)) for index in range(len(listing))}
    for name in folders.union(listing.classes):  # one without images keeps its label
        make_directory(folder / name)


@torch.no_grad()
def main():
    args = parse_args()
    if args.format == "npz" and (args.crops != "center" or not args.flip):
        raise FlowARError("--format npz always stores the centre crop and its flipped copy, as MAR does: leave out "
                          "--crops and --no_flip")
    device = cluster.init(args.device)
    named = find_vae(args.vae_path)
    vae = open_vae_on(named, device)
    origin = cluster.from_main(lambda: origin_of(named, vae))
    if args.img_size % vae.stride:
        raise FlowARError(f"--img_size {args.img_size} is not a multiple of the VAE's stride {vae.stride}")
    center = args.crops == "center"
    images = cluster.from_main(lambda: Images(find_split(args.data_path, args.split, columns=args), args.img_size,
                                              args.seed, train=not center, flip=False, background=args.background,
                                              columns=args))
    listing = images.listing
    cluster.log(f"{listing.summary()} in {listing.root}")
    data = Crops(images, 1 if center else args.crops, args.flip, args.on_bad_image == "skip")
    settings = {
        "source_images": len(images), "source_sha256": images.identity()["sha256"],
        "left_out": dict(listing.left_out), "background": list(args.background), "classes": images.classes,
        "img_size": args.img_size, "crops": args.crops, "variants": data.variants,
        "transform": "ADM's centre crop" if center else f"shorter side x {RESIZE_MARGIN}, random crop",
        "seed": args.seed, "dtype": args.dtype, "shard_size": args.shard_size, "on_bad_image": args.on_bad_image,
        "vae": str(named.name), "vae_sha256": origin.sha256, "vae_tensors": origin.tensors,
        "channels": vae.embed_dim, "stride": vae.stride,
        "latent_scale": json.loads(json.dumps(vae.latent_scale))}  # lists, as the file will say
    write = cache_shards if args.format == "shards" else cache_npz
    write(data, vae, args, device, Path(args.cached_path), settings)


if __name__ == "__main__":
    cluster.run_main(main)
