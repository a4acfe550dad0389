"""The quickstart's table and loss curve.

Classifier accuracy: how often demo:fashion's classifier, trained on real images alone, finds the label that an image
was sampled for. Distances are those of the evaluation.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from models.hub import local_file
from models.weights import read_file
from scripts import plot_run
from util.cluster import run_main, select_device
from util.command_line import as_type, path
from util.data import list_images
from util.evaluation.labels import image_label
from util.evaluation.references import load_uint8
from util.files import read_json, write_bytes, write_json


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--root", type=as_type(path), required=True, help="the quickstart's folder")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args()


def build_classifier():
    """Four convolutions and a linear layer. Images (B, 1, 32, 32) in [-1, 1] -> logits."""
    def layer(inside, outside, stride):
        return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU())
    return nn.Sequential(layer(1, 16, 2), layer(16, 32, 1), layer(32, 32, 2), layer(32, 64, 2), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(64 * 16, 10))


def load_classifier(device):
    """The one of demo:fashion, in eval mode; its ten classes are those of Fashion-MNIST."""
    network = build_classifier()
    network.load_state_dict(read_file(local_file("demo:fashion/classifier.safetensors"))["model"])
    return network.to(device).eval()


def gray(images):
    """(N, 3, 32, 32) uint8 -> (N, 1, 32, 32) in [-1, 1]."""
    return images[:, :1].float() / 127.5 - 1


def real_images(folder):
    """(images (N, 3, 32, 32) uint8, labels) of class folders."""
    listing = list_images(folder)
    return load_uint8([listing.path(i) for i in range(len(listing))]), torch.from_numpy(listing.labels).long()


@torch.no_grad()
def accuracy(network, images, labels, device):
    logits = torch.cat([network(part.to(device)).cpu() for part in images.split(500)])
    return (logits.argmax(1) == labels).float().mean().item()


def generated_accuracy(output, report, network, device):
    """The classifier's accuracy on an evaluation's images, which lie in output/images."""
    files = [output / "images" / f"{i:06d}.png" for i in range(report["num_images"])]
    labels = torch.tensor([image_label(i, len(files), report["class_num"]) for i in range(len(files))])
    return accuracy(network, gray(load_uint8(files)), labels, device)


def main():
    args = parse_args()
    root, device = Path(args.root), select_device(args.device)
    results = read_json(root / "eval" / "results.json")
    plot_run.save(plot_run.draw([plot_run.read_run(root / "run")]), root / "loss.png")
    network, count = load_classifier(device), results["num_images"]
    test, test_labels = real_images(root / "images" / "val")
    accuracies = {"generated": generated_accuracy(root / "eval", results, network, device),
                  "test images": accuracy(network, gray(test), test_labels, device)}
    name = next(name for name in results["metrics"] if name.startswith("frechet_distance"))
    write_json({"images": count, name: results[name], "classifier_accuracy": accuracies}, root / "summary.json")
    table = [f"| {count} images | classifier accuracy | {name} to the test split |", "|---|---|---|",
             f"| generated | {accuracies['generated']:.1%} | {results[name]:.1f} |",
             f"| test images | {accuracies['test images']:.1%} | |"]
    write_bytes(("\n".join(table) + "\n").encode(), root / "results.md")
    print("\n".join(table))


if __name__ == "__main__":
    run_main(main)
