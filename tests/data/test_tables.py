"""Hugging Face's image datasets give what the unpacked class folders give."""
import pickle
import random

import pytest
import torch
from helpers import call, make_project, train

from models import FlowARError
from util.data import Images, build_loader, find_split, list_images
from util.data.tables import Columns


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    package = pytest.importorskip("datasets")
    package.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    package.disable_progress_bars()
    return package


def rows_of(folder):
    """(image, label) of all images of class folders, mixed up."""
    files = sorted(folder.rglob("*.png"))
    random.Random(0).shuffle(files)
    return [{"bytes": file.read_bytes(), "path": file.name} for file in files], [int(file.parent.name) for file in files]


def write(datasets, path, images, labels, **features):
    """Two parquet files of a split, as on the hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)]), **features}
    columns = images, labels, [row % 2 for row in range(len(images))], images[::-1]  # the latter two where there are features for them
    data = datasets.Dataset.from_dict(dict(zip(kinds, columns)), features=datasets.Features(kinds))
    for part in range(2):
        data.shard(2, part, contiguous=True).to_parquet(f"{path}-{part:05d}-of-00002.parquet")


@pytest.fixture(scope="module")
def project(datasets, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("tables"), per_class=4)
    for split, name in (("train", "data/train"), ("val", "data/validation")):
        write(datasets, project / "hub" / name, *rows_of(project / "images" / split), parity=datasets.ClassLabel(names=["even", "odd"]))
    return project


def test_parquet_files_give_what_their_folders_give(project):
    assert find_split(project / "hub", "val") == f"{project}/hub/validation"
    plain, packed = (Images(find_split(project / name, "train"), 16, 3, train=True) for name in ("images", "hub"))
    assert packed.identity() == plain.identity() and packed.listing.path(0) == f"{project}/hub/train/0/000.png"
    for (one, label), (other, same) in zip(*([data[(1, i)] for i in range(len(plain))] for data in (plain, packed))):
        assert torch.equal(one, other) and label == same


def test_data_workers_and_other_ranks_read_them_too(project):
    data = Images(project / "hub" / "train", 16)
    alone = torch.stack([data[(0, i)][0] for i in range(len(data))])
    assert torch.equal(torch.cat([images for images, _ in build_loader(data, 4, num_workers=2)]), alone)
    assert torch.equal(pickle.loads(pickle.dumps(data))[(0, 7)][0], alone[7])


def test_a_training_and_a_cache_are_those_of_the_folder(project, monkeypatch, tmp_path):
    packed = train(project, tmp_path / "run", f"--epochs 1 --data_path {project}/hub --label_column_name parity")
    assert packed["data"]["classes"] == ["even", "odd"] and packed["data"]["counts"] == [20, 20]
    command = f"scripts/cache_latents.py --cached_path {tmp_path}/cache --vae_path {project}/vae.pth --img_size 16 --num_workers 0 --device cpu"
    call(monkeypatch, f"{command} --data_path {project}/images")
    call(monkeypatch, f"{command} --data_path {project}/hub")  # the finished cache is one of these images
    with pytest.raises(FlowARError, match="cache: the images differ from those of this cache"):
        call(monkeypatch, f"{command} --data_path {project}/hub --label_column_name parity")
    with pytest.raises(FlowARError, match="--format npz .*, but these come from the dataset: use --format shards"):
        call(monkeypatch, f"{command.replace('/cache ', '/npz ')} --format npz --data_path {project}/hub")


def test_a_name_on_the_hub_is_a_repository_a_split_and_a_revision(project, datasets, monkeypatch):
    """The hub's part of the package is replaced: no network."""
    original, asked = datasets.load_dataset, []

    def load(path, config, split, revision=None, data_files=None, **options):
        asked.append((path, config, split, revision))
        return original("parquet", data_files={split: f"{project}/hub/data/{split}-*.parquet"}, split=split, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config, revision=None: ["train", "validation", "test"][:2 if config else 3])
    large = Columns(dataset_config_name="large")
    place = find_split("hf:somebody/pictures@v2", "val", columns=large)
    assert place == "hf:somebody/pictures/validation@v2" and Images(place, 16, columns=large).identity()["sha256"] == Images(project / "images" / "val", 16).identity()["sha256"]
    assert ("somebody/pictures", "large", "validation", "v2") in asked
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config, revision=None: ["test"])
    with pytest.raises(FlowARError, match="--data_path hf:somebody/pictures: train/ not found, only test"):
        find_split("hf:somebody/pictures", "train")
    with pytest.raises(FlowARError, match="hf:somebody/pictures: expected hf:OWNER/NAME/SPLIT with SPLIT one of test"):
        list_images("hf:somebody/pictures")


def test_labels_without_names_are_numbers_or_texts(project, datasets, tmp_path):
    images, labels = rows_of(project / "images" / "train")
    write(datasets, tmp_path / "number", images, [label + 3 for label in labels], label=datasets.Value("int64"))
    write(datasets, tmp_path / "text", [{"bytes": image["bytes"], "path": None} for image in images], [f"c{9 - label}" for label in labels],
          label=datasets.Value("string"))
    numbers, texts = (Images(tmp_path / name, 16) for name in ("number", "text"))
    assert numbers.classes == [f"{i:02d}" for i in range(13)] and numbers.identity()["counts"] == [0] * 3 + [4] * 10
    assert texts.classes == [f"c{i}" for i in range(10)]
    row = int(texts.listing.places[0])
    assert texts.listing.name(0) == f"c0/{row:08d}" and texts.listing.read(0) == images[row]["bytes"] and labels[row] == 9


@pytest.mark.parametrize("change,features,message", [
    (lambda images, labels: (images, [-1, *labels[1:]]), {"label": "int64"}, "row 0 has label -1: expected integers from 0"),
    (lambda images, labels: ([images[0], None, *images[2:]], labels), {}, "row 1 contains no image data: if the images are separate files")])
def test_rows_without_image_or_label_are_named(project, datasets, tmp_path, change, features, message):
    write(datasets, tmp_path / "train", *change(*rows_of(project / "images" / "train")), **{name: datasets.Value(kind) for name, kind in features.items()})
    with pytest.raises(FlowARError, match=f"{tmp_path}/train: {message}"):
        list_images(tmp_path / "train")


def test_columns_and_configurations_are_chosen(project, datasets, tmp_path, monkeypatch):
    images, labels = rows_of(project / "images" / "train")
    write(datasets, tmp_path / "large" / "train", images, labels, cls=datasets.Value("int64"), picture=datasets.Image())
    with pytest.raises(FlowARError, match="set --label_column_name to one of its columns: image, label, cls, picture"):
        list_images(tmp_path / "large" / "train", columns=Columns(label_column_name="style"))
    chosen = Columns("picture", "cls", "large")
    data = pickle.loads(pickle.dumps(Images(find_split(tmp_path, "train", columns=chosen), 16, columns=chosen)))
    assert data.classes == ["0", "1"] and data.identity()["counts"] == [20, 20]
    assert sorted(map(data.listing.read, range(20))) == sorted(image["bytes"] for image in images[::-1][::2])


def test_scripts_take_the_column(project, monkeypatch, tmp_path):
    for command in (f"check_images.py {project}/hub/train", f"train_vae.py --data_path {project}/hub --output {tmp_path}/vae.pth",
                    f"distance.py {project}/hub/train --halves --feature_extractor efficientnet-lite0 --device cpu"):
        with pytest.raises(FlowARError, match="set --label_column_name to one of its columns: image, label, parity"):
            call(monkeypatch, f"scripts/{command} --label_column_name style")


def test_a_cache_that_cannot_be_written_is_named(project, datasets, monkeypatch):
    def denied(*args, **options):
        raise PermissionError(13, "Permission denied", "/home/x.lock")
    monkeypatch.setattr(datasets, "load_dataset", denied)
    with pytest.raises(FlowARError, match="hub/train: .*/home/x.lock.*set HF_HOME .or HF_HUB_CACHE, HF_DATASETS_CACHE. to a writable folder"):
        list_images(project / "hub" / "train")
