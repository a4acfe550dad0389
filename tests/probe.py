"""What a copy of the code computes: a training, a validation, samples and a report, small. For test_extending.py.

Reads lines of JSON, {tree, output, project, options, settings, evaluate, sweep, commands}, and answers each with one line of JSON. Each runs in a process of its own,
forked before anything of the project was imported: so the heavy libraries are imported once.
"""
import gc
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path

import efficientnet_lite_pytorch  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
import torch_fidelity  # noqa: F401
import torchvision  # noqa: F401


def digest(tensors):
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in tensors)).hexdigest()


def run(task):
    torch.set_num_threads(1)
    os.chdir(task["tree"])
    sys.path[:0] = [task["tree"], f"{task['tree']}/tests", f"{task['tree']}/scripts"]
    from helpers import call, evaluate, small_model, train

    output, project, options = Path(task["output"]), Path(task["project"]), task["options"]
    checkpoint = train(project, output, f"--epochs 1 --attn_dropout 0 --proj_dropout 0 --log_freq 1 {options}")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    found = {group: [line["loss"] for line in lines if line["group"] == group] for group in ("train", "val")}
    first = next(line for line in lines if line["group"] == "train")
    found["scale_losses"] = [value for name, value in first.items() if name.startswith("loss_scale_")]
    model, scales = small_model(), checkpoint["args"]["scales"]
    noise = model.draw_noise(2, torch.Generator().manual_seed(0))
    found["samples"] = digest([model.sample_tokens(torch.tensor([1, 2]), noise=noise, **{"num_steps": 4, "cfg": 2.0, **task["settings"]})])
    found["scales"] = list(scales)
    if task["evaluate"]:
        found["report"] = evaluate(project, output, output / "eval", f"--num_images 8 --num_step 2 --cfg 1 {options.split('--data_path')[0]}")
    if task["sweep"]:
        from util.evaluation import load_pipeline
        evaluate(project, output, output / "sweep", f"--num_images 4 --num_step 2 {task['sweep']}")
        found["table"] = (output / "sweep" / "results.csv").read_text()
        found["stored"] = {name: checkpoint["args"][name] for name in task["settings"]}
        pipe = load_pipeline(output, device="cpu")
        found["pipeline"] = pipe.settings()
        found["called"] = pipe.using(**dict.fromkeys(task["settings"], 3)).settings()
    for command in task["commands"]:
        with pytest.MonkeyPatch.context() as patch:
            call(patch, command.format(out=output))
    found["printed"] = Path(f"{output}.txt").read_text()
    return found


def answer(task, pipe):
    log = os.open(f"{task['output']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        result = run(task)
    except BaseException:
        result = {"error": traceback.format_exc()}
    with os.fdopen(pipe, "w") as file:
        json.dump(result, file)
    os._exit(0)


def main():
    gc.freeze()  # what is imported: a fork would copy it to count its references, and each training looks through it
    for line in sys.stdin:
        ours, theirs = os.pipe()
        if os.fork() == 0:
            answer(json.loads(line), theirs)
        os.close(theirs)
        with os.fdopen(ours) as file:
            print(file.read(), flush=True)
        os.wait()


if __name__ == "__main__":
    main()
