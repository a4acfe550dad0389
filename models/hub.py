"""Weights by name: hf:OWNER/REPO/FILE[@REVISION] on the Hugging Face hub, released:NAME for the authors' files and for
ADM's reference batches (elsewhere, kept beside the hub's files), demo:fashion for small weights in this repository.

huggingface_hub downloads, once: its cache (HF_HOME), its offline switch (HF_HUB_OFFLINE=1), its token (HF_TOKEN), its
errors.
"""
import contextlib
import errno
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from models.errors import FlowARError, first_sentence
from models.weights import EXPORTED, file_hash

HUB, RELEASE_PREFIX, DEMO_PREFIX = "hf:", "released:", "demo:"
DEMO_FOLDER = Path(__file__).with_name("demo")
DEMO_FILES = {  # SHA-256
    "fashion/model.safetensors": "a9a3d6369bf46074ac2fcd3dae8517baf4c4b9bca41e93d27db45db0e86a72ab",
    "fashion/student.safetensors": "2f4bc6355bf2d83107f6d004d7c793d47c438eb3b9b5a4858a600b29c66c8702",
    "fashion/vae.safetensors": "5064b09ba20c51c13b0363643b5fb4df057e4d60bcd8dbd76b8e47c9d89b7881",
    "fashion/classifier.safetensors": "07e3a2ab24a99b78e7de855e03847ca7ebffb8b0ec5d0e96a11553cd8daabb22",
}


class Release(NamedTuple):
    """A released file, and the settings it was published with: FlowAR.sample_tokens' arguments."""
    name: str
    sampling: dict = {}


ADM_ARRAYS = {f"{name}.npy" for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")}
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
RELEASES = {
    "flowar_small": Release("hf:OliverRen/FlowAR/FlowAR-S.pth", dict(num_steps=25, cfg=4.3, guidance=0.9)),
    "flowar_large": Release("hf:OliverRen/FlowAR/FlowAR-L.pth", dict(num_steps=25, cfg=2.4, guidance=0.9)),
    "flowar_huge": Release("hf:OliverRen/FlowAR/FlowAR-H.pth", dict(num_steps=50, cfg=2.4, guidance=0.7)),
    "kl16": Release("hf:xwen99/mar-vae-kl16/kl16.ckpt"),
    # Of guided-diffusion's evaluation suite; 2 and 8 GB, for --fid_stats.
    "adm_in256": Release(f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    "adm_in512": Release(f"{ADM}/512/VIRTUAL_imagenet512.npz"),
}


def is_name(name):
    """Whether it is a name of this module, not a path."""
    return is_remote(name) or str(name).startswith(DEMO_PREFIX)


def is_remote(name):
    """Whether it is the name of a file to download."""
    return str(name).startswith((HUB, RELEASE_PREFIX))


def release_of(name):
    """The Release that released:NAME or its hf: name means, None for any other file; FlowARError for an unknown one."""
    names = {RELEASE_PREFIX + key: release for key, release in RELEASES.items()}
    if str(name).startswith(RELEASE_PREFIX) and name not in names:
        raise FlowARError(f"{name}: expected one of {', '.join(names)}")
    names.update((release.name, release) for release in RELEASES.values())
    return names.get(str(name))


def local_file(name, demo_part=EXPORTED):
    """Path of a file by path or name; downloaded if it is not there, once for several processes that ask together.
    demo_part: which file of demo:fashion.
    """
    if not is_name(name):
        return Path(name).expanduser()
    if str(name).startswith(DEMO_PREFIX):
        return demo_file(str(name).removeprefix(DEMO_PREFIX), demo_part)
    from huggingface_hub import hf_hub_download  # here: it is heavy
    release = release_of(name)
    if release and not release.name.startswith(HUB):
        return download_archive(name, release.name)
    repository, file, revision = split_hub_name(name)
    with explain(name):
        return Path(ask_hub(lambda **where: hf_hub_download(repository, file or EXPORTED, revision=revision, **where)))


def ask_hub(read):
    """read(local_files_only=False), or where that fails what is in the cache: the hub's clients pass a proxy's error on
    without looking there.
    """
    try:
        return read(local_files_only=False)
    except Exception as error:
        with contextlib.suppress(Exception):
            cached = read(local_files_only=True)
            print(f"the hub does not respond ({first_sentence(error)}): using its local cache", file=sys.stderr)
            return cached
        raise


def download_archive(name, url):
    """Path of ADM's reference batch among what libraries keep beside the hub's files. No hash of it is published: it is
    whole if its arrays are there and have the zip format's check sums.
    """
    from huggingface_hub import cached_assets_path, constants
    from huggingface_hub.utils import WeakFileLock
    with explain(name):
        path = cached_assets_path("flowar", "references", "adm") / url.rpartition("/")[2]
        if path.is_file():
            return path
        with WeakFileLock(f"{path}.lock"):
            if not path.is_file():  # another process's, meanwhile
                fetch_archive(name, url, path, constants.HF_HUB_OFFLINE)
    return path


def fetch_archive(name, url, path, offline):
    temporary = path.with_suffix(".new")
    for rest in path.parent.glob(f"{temporary.name}*"):  # of a download that was killed
        rest.unlink()
    try:
        if offline:
            raise OSError("HF_HUB_OFFLINE is set")
        torch.hub.download_url_to_file(url, temporary)
        with zipfile.ZipFile(temporary) as archive:
            damaged = archive.testzip() or ADM_ARRAYS - set(archive.namelist())
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged or missing")
    except (OSError, zipfile.BadZipFile) as error:  # OSError: of the network, by urllib
        temporary.unlink(missing_ok=True)
        raise FlowARError(f"{name}: cannot be downloaded from {url} ({error}): download it elsewhere and pass its "
                          f"path, or copy it to {path}") from error
    temporary.replace(path)


def demo_file(name, part):
    """Path of a file of this repository's weights; FlowARError unless it is the one of this version, bit by bit."""
    key = name if name in DEMO_FILES else f"{name}/{part}"
    if key not in DEMO_FILES:
        raise FlowARError(f"demo:{name}: expected demo:fashion, or demo:FILE with FILE one of {', '.join(DEMO_FILES)}")
    path = DEMO_FOLDER / key
    if not path.is_file() or file_hash(path) != DEMO_FILES[key]:
        raise FlowARError(f"{path}: missing, modified or a Git LFS pointer (expected SHA-256 {DEMO_FILES[key]}): run "
                          "git checkout HEAD -- models/demo or git lfs pull, or reinstall")
    return path


@contextlib.contextmanager
def explain(name):
    """What a user can put right of a download ends in one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError  # here: it is heavy
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.EACCES, errno.EROFS):
            raise FlowARError(f"{name}: {cause}: set HF_HOME (or HF_HUB_CACHE, HF_DATASETS_CACHE) to a writable "
                              "folder") from error
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
            raise FlowARError(f"{name}: the hub denies access ({first_sentence(cause)}): check that your token "
                              "(HF_TOKEN or hf auth login) is valid and may read it") from error
        if isinstance(error, LocalEntryNotFoundError):
            raise FlowARError(f"{name}: not in the cache, and the hub does not respond ({first_sentence(cause)}): "
                              "download it on a machine with network access, or pass a path (see HF_HOME, "
                              "HF_HUB_OFFLINE)") from error
        raise


def name_of_sibling(file, name, path):
    """Name of a file that lies beside one that is asked for by `name` and is at `path`; what is more than a file's name
    stays as it is.
    """
    if is_name(file) or Path(file).name != file:
        return file
    if not is_remote(name):
        return str(Path(path).with_name(file))
    repository, _, revision = split_hub_name(name)
    return f"{HUB}{repository}/{file}{f'@{revision}' if revision else ''}"


def split_hub_name(name):
    """(OWNER/REPO, FILE or None, REVISION or None) of hf:OWNER/REPO[/FILE][@REVISION], or of a released name."""
    if release := release_of(name):
        name = release.name
    match = re.fullmatch(r"hf:([^/@]+/[^/@]+)(?:/([^@]+))?(?:@(.+))?", str(name))
    if match is None:
        raise FlowARError(f"{name}: expected hf:OWNER/REPO/FILE, or hf:OWNER/REPO/FILE@REVISION")
    return match.groups()
