"""Export a run's weights into a folder to publish: the tensors, config.json, the run's own VAE, a model card.

    python scripts/export.py --resume output/run --weights ema --output output/export
    python scripts/export.py --resume output/run --output output/export --push OWNER/REPO   # after: hf auth login

load_flowar, load_pipeline, eval.py --resume and scripts/sample.py --resume take the folder, or hf:OWNER/REPO. What names a
place on this machine is left out of it.
"""
import argparse
import re
import shutil
from pathlib import Path

import project_root  # noqa: F401

from scripts import model_card
from models import FlowARError, load_flowar
from models.errors import first_line, name_some
from models.hub import EXPORTED, is_remote
from models.vaes import DEFAULT_PATH
from models.weights import BARE, CONFIG, file_hash, find_model, saved_options, tensors_hash, write_file, write_safetensors, writing
from util.cluster import log, run_main
from util.evaluation.reports import RESULTS, read_report, reports_of
from util.evaluation.pipeline import saved_sampling
from util.files import make_directory, read_json, write_bytes, write_json
from util.manifest import RUN
from util.options import SAMPLING, some_path, training_parser
from util.training.checkpoint import read_model_file
from util.training.record import saved_data, saved_origin

CARD = "README.md"
FILES = {"safetensors": EXPORTED, "pth": BARE}
HERE = ("resume", "output_dir", "device", "num_workers", "pin_mem", "timeout", "evaluate", "on_bad_image")  # of a machine, not a model


def repository(text):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected OWNER/REPO")
    return text


def license_name(text):
    if not re.fullmatch(r"[a-z0-9.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name as apache-2.0, mit, cc-by-4.0")
    return text


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--resume", type=some_path, required=True, help="run: a folder with checkpoint-last.pth, a checkpoint, or a name (hf:, released:)")
    add("--weights", metavar="ema|raw|KEY", help="which weights; default: the average (EMA) where there is one")
    add("--output", type=some_path, required=True, help="folder to write")
    add("--format", choices=FILES, default="safetensors", help="safetensors: model.safetensors; pth: model.pth, a bare state dict as released")
    add("--overwrite", action="store_true", help="write into a folder that is not empty; other files stay there")
    add("--vae_path", type=some_path, help="the run's VAE, where it is not any more where the run had it")
    add("--no_vae", action="store_true", help="do not put the run's own VAE into the folder (kl16.ckpt never is: it is released:kl16)")
    add("--results", type=some_path, help="results.json of eval.py for the card; default: the newest of these weights, in or beside the run")
    add("--title", default="FlowAR", help="title of the card")
    add("--license", type=license_name, default="unknown", help="license of the weights, as the Hugging Face hub names it")
    add("--push", type=repository, metavar="OWNER/REPO", help="upload the folder to the Hugging Face hub; made if it is not there")
    add("--private", action="store_true", help="a repository that --push makes is private")
    return parser.parse_args()


# ---- what may be published -------------------------------------------------------------------------------------


def public_options(options):
    """Those of a run that say something of the model: numbers, and words out of a fixed list, so no path and no name."""
    fixed = {action.dest for action in training_parser()._actions if action.choices}
    known = vars(training_parser().parse_args([]))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
            if name in known and name not in HERE and is_plain(value, name in fixed)}


def is_plain(value, words):
    if isinstance(value, (tuple, list)):
        return all(is_plain(part, False) for part in value)
    return value is None or isinstance(value, (bool, int, float)) or words and isinstance(value, str)


def public_vae(options, copied):
    """(--vae, --vae_path) as a reader needs them: a name on the hub, or that of the file in the folder."""
    vae, path = (str(options.get(name) or "") for name in ("vae", "vae_path"))
    if vae.startswith("diffusers:"):
        spec = vae.removeprefix("diffusers:")
        return (vae if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not Path(spec.split(":")[0]).exists() else None), None
    is_released = Path(path).name == Path(DEFAULT_PATH).name  # which is found without a name
    return "kl16", copied or (path if is_remote(path) else None if is_released else Path(path).name or None)


def constructor(model, options):
    """FlowAR's arguments: what the tensors tell, and what only the options say."""
    said = {name: options[name] for name in ("label_drop_prob", "attn_dropout", "proj_dropout", "use_checkpoint") if name in options}
    return {**model.config, **said}


def describe(args, path, content, model, copied):
    """config.json; of it a weights file holds models.weights.DESCRIPTION."""
    options, origin, data = saved_options(content), saved_origin(content), saved_data(content)
    vae, vae_path = public_vae(options, copied)
    sampling = saved_sampling(content, args.resume)
    given = {"vae": vae, "vae_path": vae_path, "vae_embed_dim": model.config["vae_embed_dim"], "vae_stride": model.config["vae_stride"],
             **{SAMPLING[name].option: value for name, value in sampling.items()}}
    file = vae_path or Path(str(options.get("vae_path") or "")).name
    name = f"--vae_path {file}" if vae == "kl16" and file else f"--vae {vae}" if vae and vae != "kl16" else None
    kind = find_model(content, path, args.weights).kind
    return {"model": constructor(model, options), "parameters": sum(p.numel() for p in model.parameters()),
            "tensors_sha256": tensors_hash(model.state_dict()), "weights": kind, "weights_key": "model_ema" if kind == "ema" else "model",
            "sampling": sampling, "vae": {**origin._asdict(), "name": name, "file": copied},
            "data": {key: data[key] for key in ("classes", "counts", "images", "sha256") if key in data},
            "args": {name: value for name, value in {**public_options(options), **given}.items() if value is not None}}


def find_vae_file(args, content):
    """Path of the VAE file to put into the folder, None: none. FlowARError if it is not the one of the run."""
    options, origin = saved_options(content), saved_origin(content)
    path = args.vae_path or options.get("vae_path")
    if args.no_vae or not path or options.get("vae", "kl16") != "kl16" or is_remote(path) or Path(path).name == Path(DEFAULT_PATH).name:
        return None
    if not Path(path).is_file():
        if args.vae_path:
            raise FlowARError(f"--vae_path {path}: no such file")
        log(f"warning: the run's VAE {path} is not there: the export is without it (give --vae_path FILE)")
        return None
    if origin.sha256 and file_hash(path) != origin.sha256:
        raise FlowARError(f"{path}: is not the VAE that the run was trained with (its SHA-256 is another): give that one with --vae_path, "
                          "or leave it out with --no_vae")
    return Path(path)


# ---- what is known of the run ----------------------------------------------------------------------------------


def find_results(args, path, content):
    """(path, report) of the newest results.json of these weights, (None, None) without one."""
    identity = content["checksum"] if isinstance(content.get("checksum"), str) else file_hash(path)
    kind = find_model(content, path, args.weights).kind

    def fits(report):
        return report.get("checkpoint_sha256") == identity and (report.get("weights") == "raw") == (kind == "raw")

    if args.results:
        report = read_report(Path(args.results))
        if not fits(report):
            raise FlowARError(f"--results {args.results}: is of other weights than {path} ({report.get('weights')}, "
                              f"{str(report.get('checkpoint_sha256'))[:12]}): expected a report of eval.py on these ({kind}, {identity[:12]})")
        return Path(args.results), report
    found = [report for report in reports_of(path.parent) if fits(report)]
    return (found[-1]["path"], found[-1]) if found else (None, None)


def find_run(path):
    """The run.json beside a checkpoint, None if there is none, or none that can be read."""
    try:
        return read_json(path.with_name(RUN)) if path.with_name(RUN).is_file() else None
    except FlowARError as error:
        log(f"warning: {error}; the card does without it")
        return None


# ---- writing ---------------------------------------------------------------------------------------------------


def check_folder(folder, overwrite):
    make_directory(folder)
    there = sorted(path.name for path in folder.iterdir())
    if there and not overwrite:
        raise FlowARError(f"--output {folder}: is not empty ({name_some(there, 3)}): expected a new folder; give another, or --overwrite")
    runs = [name for name in there if name.startswith("checkpoint-") or name == RUN]
    if runs:
        raise FlowARError(f"--output {folder}: holds a run ({name_some(runs, 3)}), which would be taken in place of the export: give another")


def write_export(folder, model, config, vae, form):
    """The weights, whichever they are, last: without them a folder is no export. Returns the names of the files."""
    for other in FILES.values():
        (folder / other).unlink(missing_ok=True)
    files = [CONFIG, FILES[form]]
    if vae is not None:
        copy(vae, folder / config["args"]["vae_path"])
        files.append(config["args"]["vae_path"])
    write_json(config, folder / CONFIG)
    if form == "pth":
        write_file(model.state_dict(), folder / BARE)
    else:
        write_safetensors(model.state_dict(), {name: config[name] for name in ("args", "data", "vae", "weights_key")}, folder / EXPORTED)
    return files


def copy(source, target):
    with writing(target) as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def push(folder, repo, files, private):
    """Upload the files of a folder. FlowARError in one line, whatever the hub or the network says."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(repo, private=private or None, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="FlowAR weights")
    except Exception as error:  # of the network, of rights: the client's own kinds change with its versions
        raise FlowARError(f"--push {repo}: the hub did not take it ({first_line(error)}); the export in {folder} is whole: the same command with "
                          "--overwrite tries again, once HF_TOKEN is set or after: hf auth login") from error


def main():
    args = parse_args()
    folder = Path(args.output)
    check_folder(folder, args.overwrite)
    path, content = read_model_file(args.resume)
    model, vae = load_flowar(path, args.weights), find_vae_file(args, content)
    results, report = find_results(args, path, content)
    config = describe(args, path, content, model, vae and f"vae{vae.suffix}")
    files = write_export(folder, model, config, vae, args.format)
    source = f"hf:{args.push}" if args.push and args.format == "safetensors" else "FOLDER"
    card = model_card.write(config, report, find_run(path), args.title, args.license, source)
    write_bytes(card.encode(errors="backslashreplace"), folder / CARD)
    log(f"card: figures of {results}" if results else f"card: no {RESULTS} of these weights was found, it says that they are not measured")
    if args.push:
        push(folder, args.push, [*files, CARD], args.private)
    print(f"{folder}: {', '.join([*files, CARD])}" + (f"; on the hub as hf:{args.push}" if args.push else ""))


if __name__ == "__main__":
    run_main(main)
