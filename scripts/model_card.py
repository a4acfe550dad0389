"""The model card of an export, as the Hugging Face hub shows it. What is not known is said to be not known."""
from pathlib import Path

from util.evaluation.labels import Classes, class_names

UNKNOWN = "not known"
LISTED = 100  # classes: more are in config.json alone
RECIPE = ("epochs", "global_batch", "lr", "min_lr", "lr_schedule", "warmup_epochs", "weight_decay", "grad_clip", "ema_rate", "attn_dropout",
          "proj_dropout", "label_drop_prob", "flip", "precision", "seed")
MEASURED = ("num_images", "labels", "weights", "num_step", "num_step_last", "solver", "cfg", "cfg_schedule", "guidance", "temperature", "seed",
            "precision", "feature_extractor", "reference", "reference_sha256", "reference_images", "device")
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
"""
PAPER = """@inproceedings{ren2025flowar,
  title     = {FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching},
  author    = {Ren, Sucheng and Yu, Qihang and He, Ju and Shen, Xiaohui and Yuille, Alan and Chen, Liang-Chieh},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2025},
  note      = {arXiv:2412.15205}
}"""


def write(config, report, run, title, license, source):
    """Markdown. config: of config.json; report: of results.json, run: of run.json, None where there is none; source: what
    load_pipeline takes.
    """
    sections = {title: about(config), "Use": use(source, config), "Results": results(report), "Training": training(config, run),
                "Data": data(config), "Sampling": table(config["sampling"] or {"settings of the run": UNKNOWN}),
                "Citation": ["The method, and what the code follows:", "", "```bibtex", PAPER, "```"]}
    text = [line for number, (name, lines) in enumerate(sections.items()) for line in ["", f"#{'#' * (number > 0)} {plain(name)}", "", *lines]]
    return HEADER.format(license=license) + "\n".join(text) + "\n"


def plain(value):
    """A value in one line of Markdown that means nothing else there."""
    text = UNKNOWN if value is None else ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return "".join(f"\\{char}" if char in "\\|`<>*[]#" else char for char in text)


def table(values):
    return ["| | |", "|---|---|", *(f"| {plain(name)} | {plain(value)} |" for name, value in values.items())]


def about(config):
    model, kind = config["model"], {"ema": "the average over training (EMA)", "raw": "the raw ones, no average"}
    named = kind.get(config["weights"], "as the file had them, which does not call them an average")
    return [f"A class-conditional FlowAR: {model['img_size']}x{model['img_size']} pixels, {model['class_num']} classes, {config['parameters']:,} "
            f"parameters, scales {', '.join(map(str, model['scale']))}. Its weights are {named}; SHA-256 over the tensors "
            f"`{config['tensors_sha256']}`. All constructor arguments are in `config.json`."]


def use(source, config):
    vae = config["vae"]
    where = f"`{vae['file']}` of these files" if vae["file"] else plain(vae["name"] or "not named in the checkpoint") + ", not among these files"
    lines = ["```python", "from util.evaluation import load_pipeline  # of the FlowAR code", f'pipe = load_pipeline("{source}")',
             "images = pipe([0, 1, 2, 3], seed=0)  # PIL images of these labels", "```", ""]
    lines += ["FOLDER: where these files are, downloaded together.", ""] if source == "FOLDER" else []
    return [*lines, f"VAE: {where}; SHA-256 {vae['sha256'] or UNKNOWN}. Another one does not fit."]


def results(report):
    if report is None:
        return ["These weights have not been measured, or no report of it was at hand when this card was written."]
    settings = {name: report.get(name) for name in MEASURED}
    settings["num_step_last"] = settings["num_step_last"] or "as num_step"
    settings["reference"] = settings["reference"] and Path(str(settings["reference"])).name
    versions = report.get("versions")
    settings["versions"] = [f"{name} {value}" for name, value in versions.items()] if isinstance(versions, dict) else None
    figures = [f"| {plain(name)} | {report[name]:.4g} |" for name in report["metrics"]] or ["| no metric was computed | |"]
    return ["| metric | |", "|---|---|", *figures, "", "Measured by this code's `eval.py` with", "", *table(settings)]


def training(config, run):
    said = {name: config["args"].get(name) for name in RECIPE if name in config["args"]}
    lines = table(said) if said else [f"How it was trained is {UNKNOWN}."]
    start = run["starts"][-1] if run and run["starts"] else {}
    hardware, git = start.get("hardware") or {}, start.get("git")
    devices = [f"{count} x {name}" for name, count in (hardware.get("devices") or {}).items()]
    versions = [f"{name} {value}" for name, value in (start.get("versions") or {}).items() if value]
    code = f"{git.get('commit')}{' and changes that were not committed' if git.get('dirty') else ''}" if git else None
    return [*lines, "", *table({"hardware": devices or None, "versions": versions or None, "commit of the code": code,
                                "starts (first, last)": [run["starts"][i].get("time") for i in (0, -1)] if start else None})]


def data(config):
    known, number = config["data"], config["model"]["class_num"]
    if not known:
        return [f"What it was trained on is {UNKNOWN}: the checkpoint does not say it."]
    lines = table({"images": known.get("images"), "classes": len(known["classes"]), "SHA-256 of names and sizes": known.get("sha256")})
    if number > LISTED:
        return [*lines, "", f"The names of the {number} classes are in `config.json`."]
    names = class_names(Classes(number, known["classes"]))
    return [*lines, "", "| label | class |", "|---|---|", *(f"| {label} | {plain(name)} |" for label, name in enumerate(names))]
