"""Weights by name: hf:OWNER/REPO/FILE[@REVISION] on the Hugging Face hub, released:NAME for the authors' files.

huggingface_hub downloads, once: its cache (HF_HOME), its offline switch (HF_HUB_OFFLINE=1), its token (HF_TOKEN).
"""
from pathlib import Path
from typing import NamedTuple

from models.errors import FlowARError
from models.files.downloads import check_download

HUB, RELEASE = "hf:", "released:"
EXPORTED = "model.safetensors"  # the file of hf:OWNER/REPO, and of a folder of scripts/export.py
BARE = "model.pth"  # in its place, a bare state dict as the authors released it


class Release(NamedTuple):
    """A released file, and the settings it was published with: FlowAR.sample_tokens' arguments."""
    name: str
    sampling: dict = {}


RELEASED = {
    "flowar_small": Release("hf:OliverRen/FlowAR/FlowAR-S.pth", dict(num_steps=25, cfg=4.3, guidance=0.9)),
    "flowar_large": Release("hf:OliverRen/FlowAR/FlowAR-L.pth", dict(num_steps=25, cfg=2.4, guidance=0.9)),
    "flowar_huge": Release("hf:OliverRen/FlowAR/FlowAR-H.pth", dict(num_steps=50, cfg=2.4, guidance=0.7)),
    "kl16": Release("hf:xwen99/mar-vae-kl16/kl16.ckpt"),
}


def is_remote(name):
    """Whether a name is of a file to download, not a path."""
    return str(name).startswith((HUB, RELEASE))


def release_of(name):
    """The Release that released:NAME or its hf: name means, None for any other file; FlowARError for an unknown one."""
    name = str(name)
    if name.startswith(RELEASE):
        if name.removeprefix(RELEASE) not in RELEASED:
            raise FlowARError(f"{name}: expected one of {', '.join(RELEASE + known for known in RELEASED)}")
        return RELEASED[name.removeprefix(RELEASE)]
    return next((release for release in RELEASED.values() if release.name == name), None)


def weights_file(name, last):
    """Path of a model's weights: a file, by path or name, or that of a folder, a run's (`last`) or an export's."""
    path = local_file(name)
    in_folder = [path / file for file in (last, EXPORTED, BARE)] if path.is_dir() else [path]
    return next(filter(Path.is_file, in_folder), in_folder[0])


def local_file(name):
    """Path of a file by path or name; downloaded if it is not there. FlowARError if it cannot be had whole."""
    if not is_remote(name):
        return Path(name)
    release = release_of(name)
    path = download(str(name), *parse(release.name if release else str(name)))
    try:
        check_download(path)
    except FlowARError as error:
        raise FlowARError(f"{name}: what the hub has there is no weights file ({error}); remove that file from the "
                          "cache if the hub's has changed") from error
    return path


def beside(file, name, path):
    """Name of a file that lies beside one that was asked for by `name` and found at `path`; what is more than a file's
    name stays as it is.
    """
    if is_remote(file) or Path(file).name != file:
        return file
    if not is_remote(name):
        return str(Path(path).with_name(file))
    release = release_of(name)
    repository, _, revision = parse(release.name if release else str(name))
    return f"{HUB}{repository}/{file}{f'@{revision}' if revision else ''}"


def parse(name):
    """(OWNER/REPO, FILE, REVISION or None) of hf:OWNER/REPO[/FILE][@REVISION]."""
    place, at, revision = name.removeprefix(HUB).partition("@")
    owner, repo, file = [*place.split("/", 2), "", ""][:3]
    if not owner or not repo or at and not revision:
        raise FlowARError(f"{name}: expected hf:OWNER/REPO/FILE, or hf:OWNER/REPO/FILE@REVISION")
    return f"{owner}/{repo}", file or EXPORTED, revision or None


def download(name, repository, file, revision):
    """Path in huggingface_hub's cache; several processes that ask at once download it once."""
    from huggingface_hub import constants, errors, hf_hub_download
    where = f"{name}: {constants.ENDPOINT}/{repository}"
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except errors.GatedRepoError as error:
        raise FlowARError(f"{where}: this repository asks for an account: accept its terms there, then set HF_TOKEN, "
                          "or log in with: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise FlowARError(f"{where}: no such repository, or a private one: look at its name, set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise FlowARError(f"{where}: it has no revision {revision}: expected a branch, tag or commit of it") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub does not answer ({cause(error)})"
        raise FlowARError(f"{where}: {file} is not in the cache {constants.HF_HUB_CACHE}, and {why}: download it where "
                          "there is a network, or give the path of a file") from error
    except errors.EntryNotFoundError as error:
        raise FlowARError(f"{where}: it has no file {file}{f' at {revision}' if revision else ''}: look at its list of "
                          "files") from error
    except errors.HFValidationError as error:
        raise FlowARError(f"{name}: expected hf:OWNER/REPO/FILE ({cause(error)})") from error
    except Exception as error:  # of the network, of the disk: the client's own kinds change with its versions
        raise FlowARError(f"{where}: the download of {file} failed ({cause(error)}), nothing of it is kept: the same "
                          "command tries again") from error


def cause(error):
    """First line of the error that it came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(filter(None, str(error).splitlines()), type(error).__name__)[:200]
