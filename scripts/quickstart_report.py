"""The quickstart's last stage, how good it is: classifier accuracy, distances with their floor, loss curve, table.

A small convolutional classifier is trained on the real training images. On the generated ones it must find the label
they were drawn for. Distances to the test split have a floor, that of as many real training images, and a limit of the
VAE, that of the test images encoded and decoded.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scripts import plot_run
from scripts.distance import through_vae
from models.vaes import load_vae
from models.weights import read_file, write_file
from util.data import list_images
from util.cluster import log, run_main, select_device
from util.command_line import as_type, path
from util.evaluation.labels import image_label
from util.evaluation.extractors import build_extractors, extract
from util.evaluation.metrics import frechet_distance, statistics
from util.evaluation.references import load_statistics, load_uint8
from util.files import read_json, write_bytes, write_json

STEPS, BATCH = 600, 128


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--root", type=as_type(path), required=True, help="the quickstart's folder")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args()


def classifier(classes):
    """Three strided convolutions and a linear layer. Images (B, 1, 32, 32) in [-1, 1] -> logits."""
    def layer(inside, outside, stride):
        return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU())
    return nn.Sequential(layer(1, 32, 2), layer(32, 64, 1), layer(64, 64, 2), layer(64, 128, 2), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(128 * 16, classes))


def gray(images):
    """(N, 3, 32, 32) uint8 -> (N, 1, 32, 32) in [-1, 1]."""
    return images[:, :1].float() / 127.5 - 1


def real_images(folder, count=None):
    """(images (N, 3, 32, 32) uint8, labels, number of classes) of class folders; at most `count`, evenly chosen."""
    listing = list_images(folder)
    chosen = np.linspace(0, len(listing) - 1, min(count or len(listing), len(listing))).astype(int)
    files, labels = [listing.path(i) for i in chosen], torch.from_numpy(listing.labels[chosen]).long()
    return load_uint8(files), labels, len(listing.classes)


def train_classifier(images, labels, classes, device):
    torch.manual_seed(0)
    network = classifier(classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    images, labels = images.to(device), labels.to(device)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), device=device)
        loss = F.cross_entropy(network(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network, images, labels, device):
    logits = torch.cat([network(part.to(device)).cpu() for part in images.split(500)])
    return (logits.argmax(1) == labels).float().mean().item()


def get_classifier(root, device):
    path = root / "classifier.pth"
    classes = len(list_images(root / "images" / "train").classes)
    network = classifier(classes)
    if path.is_file():
        network.load_state_dict(read_file(path))
        return network.to(device).eval()
    log(f"training the classifier that looks for the labels: {STEPS} steps of {BATCH} images")
    images, labels, _ = real_images(root / "images" / "train")
    network = train_classifier(gray(images), labels, classes, device)
    write_file(network.state_dict(), path)
    return network


def main():
    args = parse_args()
    root, device = Path(args.root), select_device(args.device)
    results = read_json(root / "eval" / "results.json")
    plot_run.save(plot_run.draw([plot_run.read_run(root / "run")]), root / "loss.png")
    network = get_classifier(root, device)
    extractor = build_extractors(results["feature_extractor"].split(",")[:1], device).parts[0]
    reference = load_statistics(results["reference"], extractor, results["img_size"])
    count, name = results["num_images"], extractor.distance
    test, test_labels, classes = real_images(root / "images" / "val", count)
    train, train_labels, _ = real_images(root / "images" / "train", count)
    files = [root / "eval" / "images" / f"{i:06d}.png" for i in range(count)]
    labels_drawn = torch.tensor([image_label(i, count, classes) for i in range(count)])
    # what a perfect generator of latents could reach
    decoded = through_vae(load_vae(root / "vae.pth").to(device))(test.to(device)).cpu()
    rows = {
        "generated": (load_uint8(files), labels_drawn),
        "test images through the VAE": (decoded, test_labels),
        "training images (the floor)": (train, train_labels),
    }
    summary = {}
    for row, (images, labels) in rows.items():
        features = extract(extractor, images.to(device))["features"]
        summary[row] = {"classifier_accuracy": accuracy(network, gray(images), labels, device),
                        name: frechet_distance(statistics(features), reference.statistics)}
    summary["test images"] = {"classifier_accuracy": accuracy(network, gray(test), test_labels, device)}
    write_json({"images": count, **summary}, root / "summary.json")
    table = [f"| {count} images | classifier finds the label | {name} to the test split |", "|---|---|---|"]
    for row, values in summary.items():
        distance = f"{values[name]:.1f}" if name in values else ""
        table.append(f"| {row} | {values['classifier_accuracy']:.1%} | {distance} |")
    write_bytes(("\n".join(table) + "\n").encode(), root / "results.md")
    print("\n".join(table))


if __name__ == "__main__":
    run_main(main)
