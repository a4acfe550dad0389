"""Train demo:fashion's classifier; pack the weights of scripts/studies/demo.sh into the files of models/demo/fashion.

    python scripts/studies/demo.py --classifier output/demo
    python scripts/studies/demo.py --pack output/demo/vae.pth vae.safetensors

Packed weights are rounded to 16 bits. Where they are others than the committed ones, write the SHA-256 that is printed
into models/hub.py and the card, then start again.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from models.hub import DEMO_FILES, DEMO_FOLDER
from models.weights import file_hash, read_file, write_file, write_safetensors
from scripts.quickstart_report import accuracy, build_classifier, gray, real_images
from util.cluster import run_main
from util.command_line import Parser, as_type, path

EPOCHS, BATCH, SHIFT = 20, 128, 2


def train_classifier(root):
    """classifier.pth of images/train: 20 epochs, images shifted by up to two pixels, half of them mirrored."""
    torch.manual_seed(0)
    images, labels = real_images(root / "images" / "train")
    images, network = gray(images), build_classifier()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        padded, (top, left) = F.pad(images[chosen], (SHIFT,) * 4, value=-1.0), torch.randint(2 * SHIFT + 1, (2,))
        batch = padded[:, :, top:top + 32, left:left + 32]
        mirrored = torch.rand(BATCH) < 0.5
        batch[mirrored] = batch[mirrored].flip(-1)
        loss = F.cross_entropy(network(batch), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    write_file(network.eval().state_dict(), root / "classifier.pth")
    images, labels = real_images(root / "images" / "val")
    found = accuracy(network, gray(images), labels, "cpu")
    print(f"{root / 'classifier.pth'}: {found:.2%} of {len(images)} test images")


def pack(file, name):
    """models/demo/fashion/<name>: the weights of a file in half precision, and what the file says beside them."""
    content = read_file(file)
    key = next((key for key in ("model_ema", "model") if key in content), None)
    tensors = content[key] if key else content
    described = {field: content[field] for field in ("args", "data", "vae", "config") if field in content}
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    packed = DEMO_FOLDER / "fashion" / name
    write_safetensors(half, {**described, "weights_key": key or "model"}, packed)
    sha256 = file_hash(packed)
    print(f"{packed}: {packed.stat().st_size:,} bytes, SHA-256 {sha256}")
    if sha256 != DEMO_FILES[f"fashion/{name}"]:
        sys.exit("these are new weights: write their SHA-256 into models/hub.py and the model card, then run again")


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--classifier", type=as_type(path), metavar="ROOT", help="train the classifier on ROOT/images")
    parser.add_argument("--pack", type=as_type(path), nargs=2, metavar=("FILE", "NAME"),
                        help="write the weights of FILE to models/demo/fashion/NAME")
    args = parser.parse_args()
    if args.classifier:
        train_classifier(Path(args.classifier))
    if args.pack:
        pack(*args.pack)


if __name__ == "__main__":
    run_main(main)
