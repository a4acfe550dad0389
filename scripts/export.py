"""Export a run's weights into a folder to publish: the tensors, config.json, the run's own VAE, a model card.

    python scripts/export.py --resume output/run --weights ema --output output/export
    python scripts/export.py --resume output/run --output output/export --push OWNER/REPO   # after: hf auth login

load_flowar, load_pipeline, eval.py and scripts/sample.py take the folder, or hf:OWNER/REPO. What names a place on this
machine is left out of it.
"""
import re
import shutil
from dataclasses import fields
from pathlib import Path

from models import FlowARError, load_flowar
from models.hub import EXPORTED, is_name
from models.settings import Sampling, option_name
from models.vaes import DEFAULT_PATH, VAES, saved_vae_path
from models.weights import (BARE, CONFIG, file_hash, find_model, saved_options, tensors_hash, write_file,
                            write_safetensors)
from util.cluster import log, run_main
from util.command_line import Parser, as_type, path
from util.evaluation.labels import Classes, class_names
from util.evaluation.pipeline import saved_sampling
from util.evaluation.reports import reports_of
from util.files import make_directory, read_json, write_bytes, write_json
from util.manifest import RUN
from util.training.checkpoint import open_newest
from util.training.record import saved_data, saved_origin

CARD, UNKNOWN = "README.md", "not known"
OF_THIS_MACHINE = ("num_workers", "pin_mem", "timeout", "evaluate")  # numbers that say nothing of the model
WORDS = ("model", "optimizer", "precision", "lr_schedule", "solver", "time_grid", "cfg_schedule", "head", "objective",
         "condition", "pyramid", "latent_norm")  # options with a word out of a fixed list
RECIPE = ("epochs", "global_batch", "optimizer", "lr", "min_lr", "lr_schedule", "warmup_epochs", "weight_decay",
          "grad_clip", "ema_rate", "attn_dropout", "proj_dropout", "label_drop_prob", "flip", "precision", "seed")
MEASURED = ("num_images", "labels", "weights", "num_step", "num_step_last", "solver", "cfg", "cfg_schedule",
            "guidance", "temperature", "seed", "precision", "feature_extractor", "reference_sha256", "reference_images",
            "device")
LISTED = 100  # classes: more are in config.json alone


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--resume", type=as_type(path), required=True, help="run folder, checkpoint, or hf:, released:, demo: name")
    add("--weights", metavar="ema|raw|KEY", help="weights to export; default: ema if present")
    add("--output", type=as_type(path), required=True, help="folder to write, new or empty")
    add("--format", choices=("safetensors", "pth"), default="safetensors", help="pth: a bare state dict, as released")
    add("--vae_path", type=as_type(path), help="the run's VAE, if its file was moved")
    add("--no_vae", action="store_true", help="leave out the run's VAE (kl16.ckpt always is: use released:kl16)")
    add("--license", default="unknown", help="license of the weights, by its Hugging Face name: apache-2.0, mit")
    add("--push", metavar="OWNER/REPO", help="upload the folder to the Hugging Face hub")
    return parser.parse_args()


# ---- config.json -----------------------------------------------------------------------------------------------


def public_options(options):
    """Those of a run that say something of the model: numbers, and words out of fixed lists."""
    def is_public(name, value):
        if isinstance(value, (tuple, list)):
            return all(is_public(name, part) for part in value)
        return isinstance(value, (bool, int, float)) or name in WORDS and isinstance(value, str)
    return {name: value for name, value in options.items() if name not in OF_THIS_MACHINE and is_public(name, value)}


def public_vae(options, copied):
    """--vae_path as a reader needs it: a name on the hub, or that of the file in the folder. None: KL-16's, which is
    found without a name, or one that this machine alone has.
    """
    path = saved_vae_path(options) or ""
    kind, _, spec = path.partition(":")
    if kind in VAES:
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not Path(spec.split(":")[0]).exists()
        return path if is_repository or not spec else None
    if copied or is_name(path):
        return copied or path
    return Path(path).name if Path(path).name not in ("", Path(DEFAULT_PATH).name) else None


def find_vae_file(args, content):
    """Path of the VAE file to put into the folder, None: none. FlowARError if it is not the one of the run."""
    options, origin = saved_options(content), saved_origin(content)
    path = args.vae_path or saved_vae_path(options)
    if args.no_vae or not path or path.partition(":")[0] in VAES or is_name(path):
        return None
    if Path(path).name == Path(DEFAULT_PATH).name:
        return None
    if not args.vae_path and not Path(path).is_file():
        log(f"warning: VAE {path} not found: exporting without it (use --vae_path FILE)")
        return None
    if origin.sha256 and file_hash(path) != origin.sha256:
        raise FlowARError(f"{path}: not the VAE that the run was trained with: pass the right one with --vae_path, or "
                          "use --no_vae")
    return Path(path)


def describe(args, path, content, model, copied):
    """config.json; a weights file holds a part of it."""
    options, origin, data = saved_options(content), saved_origin(content), saved_data(content)
    vae_path, own = public_vae(options, copied), saved_vae_path(options) or ""
    sampling, kind = saved_sampling(content, args.resume), find_model(content, path, args.weights).kind
    given = {"vae_path": vae_path, "vae_embed_dim": model.config["vae_embed_dim"],
             "vae_stride": model.config["vae_stride"],
             **{option_name(field): sampling[field.name] for field in fields(Sampling) if field.name in sampling}}
    file = vae_path
    if own.partition(":")[0] not in VAES:
        file = vae_path or Path(own).name
    of_training = ("label_drop_prob", "attn_dropout", "proj_dropout", "use_checkpoint")
    learning = {name: options[name] for name in of_training if name in options}
    return {"model": {**model.config, **learning}, "parameters": sum(p.numel() for p in model.parameters()),
            "tensors_sha256": tensors_hash(model.state_dict()), "weights": kind,
            "weights_key": "model_ema" if kind == "ema" else "model", "sampling": sampling,
            "vae": {**origin._asdict(), "name": f"--vae_path {file}" if file else None, "file": copied},
            "data": {key: data[key] for key in ("classes", "counts", "images", "sha256") if key in data},
            "args": {name: value for name, value in {**public_options(options), **given}.items() if value is not None}}


# ---- the model card --------------------------------------------------------------------------------------------


HEADER = """---
license: {license}
library_name: pytorch
pipeline_tag: unconditional-image-generation
tags:
- flowar
- class-conditional-image-generation
- flow-matching
- autoregressive
- arxiv:2412.15205
---
# FlowAR
"""
PAPER = "[FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching](https://arxiv.org/abs/2412.15205)"


def write_card(config, report, start, license, source):
    """Markdown. report: results.json, start: the last one of run.json, None where there is none; source: what
    load_pipeline takes.
    """
    model, vae, data = config["model"], config["vae"], config["data"]
    kinds = {"ema": "the average over training (EMA)", "raw": "the raw ones, no average"}
    kind = kinds.get(config["weights"], "not called an average by their file")
    where = f"`{vae['file']}` of these files" if vae["file"] else f"{plain(vae['name'])}, not among these files"
    parts = [HEADER.format(license=license),
             f"A class-conditional FlowAR: {model['img_size']}x{model['img_size']} pixels, {model['class_num']} "
             f"classes, {config['parameters']:,} parameters, scales {plain(model['scale'])}. Its weights are {kind}; "
             f"SHA-256 over the tensors `{config['tensors_sha256']}`.", "## Use", f"""```python
from util.evaluation import load_pipeline  # of the FlowAR code
pipe = load_pipeline("{source}")
images = pipe([0, 1, 2, 3], seed=0)  # PIL images of these labels
```""", f"VAE: {where}; SHA-256 {plain(vae['sha256'])}. Another one does not fit.", "## Results"]
    if report:
        parts += [table({name: f"{report[name]:.4g}" for name in report["metrics"]}), "Measured by `eval.py` with",
                  table({name: report.get(name) for name in MEASURED})]
    else:
        parts.append("These weights have not been measured, or no report of it lay beside them.")
    recipe = {name: config["args"][name] for name in RECIPE if name in config["args"]}
    parts += ["## Training", table(recipe or {"options": UNKNOWN})]
    if start:
        parts.append(table({name: start.get(name) for name in ("time", "hardware", "versions", "git")}))
    parts += ["## Data", table({"images": data.get("images"), "SHA-256 of names and sizes": data.get("sha256")})]
    if data.get("classes") and model["class_num"] <= LISTED:
        parts.append(table(dict(enumerate(class_names(Classes(model["class_num"], data["classes"]))))))
    parts += ["## Sampling", table(config["sampling"] or {"settings of the run": UNKNOWN}), "## Citation", PAPER]
    return "\n\n".join(parts) + "\n"


def table(values):
    return "\n".join(["| | |", "|---|---|", *(f"| {plain(name)} | {plain(value)} |" for name, value in values.items()
                                         if value is not None)])


def plain(value):
    """A value in one line of Markdown that means nothing else there."""
    if isinstance(value, dict):
        value = [f"{name} {part}" for name, part in value.items()]
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = UNKNOWN if value is None else str(value)
    return "".join(f"\\{char}" if char in "\\|`<>*[]#" else char for char in text if char.isprintable())


def find_report(path, kind):
    """The newest results.json of these weights in or beside their folder, None without one."""
    identity, newest = file_hash(path), None
    for report in reports_of(path.parent):
        is_raw = report.get("weights") == "raw"
        if report.get("checkpoint_sha256") == identity and is_raw == (kind == "raw"):
            newest = report
    return newest


# ---- writing ---------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    folder = Path(args.output)
    make_directory(folder)
    if any(folder.iterdir()):
        raise FlowARError(f"--output {folder}: not empty: choose a new folder")
    checkpoint = open_newest(args.resume)
    path, content = checkpoint.path, checkpoint.content
    model, vae = load_flowar(path, args.weights), find_vae_file(args, content)
    config = describe(args, path, content, model, vae and f"vae{vae.suffix}")
    report = find_report(path, config["weights"])
    run = path.with_name(RUN)
    start = read_json(run)["starts"][-1] if run.is_file() else None
    source = f"hf:{args.push}" if args.push and args.format == "safetensors" else "FOLDER"
    card = write_card(config, report, start, args.license, source)
    write_bytes(card.encode(errors="backslashreplace"), folder / CARD)
    write_json(config, folder / CONFIG)
    if vae:
        shutil.copyfile(vae, folder / config["args"]["vae_path"])
    if args.format == "pth":  # the weights last: without them a folder is no export
        write_file(model.state_dict(), folder / BARE)
    else:
        header = {name: config[name] for name in ("args", "data", "vae", "weights_key")}
        write_safetensors(model.state_dict(), header, folder / EXPORTED)
    log(f"model card: results from {report['path']}" if report else "model card: no results of these weights found")
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if args.push:
        from huggingface_hub import HfApi
        HfApi().create_repo(args.push, exist_ok=True)
        HfApi().upload_folder(repo_id=args.push, folder_path=folder, commit_message="FlowAR weights")
        print(f"uploaded to the hub as hf:{args.push}")


if __name__ == "__main__":
    run_main(main)
