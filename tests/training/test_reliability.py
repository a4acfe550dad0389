"""Training that is killed, preempted or starved, and resumes to the same weights."""
import contextlib
import json
import shutil
import signal
import threading

import pytest
import seams
import torch
from helpers import assert_same_run, make_project, needs_muon, read_checkpoint, read_log, run, steps_of, train, training_command

from models import FlowARError
from util.cluster import RESTART, Preempted
from util.data import loaders
from util.training import checkpoint

DROPOUT = "--attn_dropout 0.2 --proj_dropout 0.2"
LONG = f"--epochs 3 --save_every 3 --keep 3 --posthoc_ema 6 {DROPOUT}"  # 15 steps


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The runs that the killed ones must equal, by number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(project, folder / "1", LONG)
    run(training_command(project, folder / "2", f"{LONG} --batch_size 8"), processes=2)
    return folder


# ---- resume at any step ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping_before(step, error=KeyboardInterrupt):
    """Training dies in the given step, as if killed: nothing of it is done."""
    def die(original, run, parts):
        if run.progress.step == step:
            if run.writer:
                run.writer.wait()
            raise error
        return original(run, parts)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        seams.wrap(patch, seams.STEP, die)
        yield


@pytest.mark.parametrize("extra", ["--global_batch 32 --posthoc_ema 2", pytest.param("--global_batch 32 --optimizer muon", marks=needs_muon),
                                   pytest.param("--precision fp16", marks=pytest.mark.slow),
                                   pytest.param("--save_every 2 --log_freq 3 --deterministic", marks=pytest.mark.slow)])
def test_stopped_at_any_step_it_ends_with_the_same_bits_and_log(project, tmp_path, extra):
    common = f"--epochs 2 --save_every 1 --keep 1 --eval_freq 2 {DROPOUT} {extra}"
    try:
        train(project, tmp_path / "whole", f"{common} --save_every 0")
        for step in (1, 2, 3) if "global_batch" in extra else (1, 4, 5, 6, 9):  # in the first epoch, at its end, in the second
            with stopping_before(step):
                train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
        torch.rand(7)  # what was drawn before the restart must not matter
        train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")


def test_a_report_that_was_cut_short_is_repeated(project, tmp_path, monkeypatch):
    """By a signal, which leaves at once, and by a death in the middle of it."""
    common = f"--epochs 2 --eval_freq 1 --save_last_freq 1 {DROPOUT}"
    train(project, tmp_path / "whole", common)

    def die(*args):
        for writer in threading.enumerate():  # here the checkpoint of the epoch's end is written before the run dies
            if writer.name == checkpoint.WRITER:
                writer.join()
        raise KeyboardInterrupt

    for place, event, error in ((seams.VALIDATION, lambda *args: signal.raise_signal(signal.SIGTERM), Preempted), (seams.GRID, die, KeyboardInterrupt)):
        with monkeypatch.context() as patch, pytest.raises(error):
            seams.wrap(patch, place, event)
            train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
        assert read_checkpoint(tmp_path / "parts")["progress"]["step"] == 5 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert [line["step"] for line in read_log(tmp_path / "parts") if line["group"] == "report"] == [5, 10]


SIGNALLED = """
import os, signal
import engine_flowar, main_flowar
from util import cluster
original = engine_flowar.forward_and_backward

def signalled(run, parts):
    if cluster.rank() == 1 and run.progress.step == {step}:
        os.kill(os.getpid(), signal.{name})
    return original(run, parts)

engine_flowar.forward_and_backward = signalled
cluster.run_main(main_flowar.main)
"""


def test_a_rank_killed_and_then_one_asked_to_leave_end_with_the_same_bits(project, undisturbed, tmp_path):
    """SIGKILL to one rank ends the job; SIGUSR1 to one makes both save and leave together."""
    command = training_command(project, tmp_path, f"{LONG} --batch_size 8 --resume {tmp_path}")
    for step, name in ((4, "SIGKILL"), (9, "SIGUSR1")):
        (tmp_path / "signalled.py").write_text(SIGNALLED.format(step=step, name=name))
        done = run(command.replace("main_flowar.py", f"{tmp_path}/signalled.py"), 2, check=False)
        assert done.returncode != 0 and steps_of(tmp_path)[0] == {4: 3, 9: 10}[step], done.stdout + done.stderr
    assert done.stdout.count("stopped by a signal: saved after step 10") == 1, done.stdout
    assert "resumes from step 10" in run(command, processes=2).stdout
    assert_same_run(tmp_path, undisturbed / "2")
    assert steps_of(tmp_path, "posthoc") == [12, 6]


def test_another_number_of_processes_goes_on_with_the_same_global_batch(project, tmp_path, capsys):
    common = "--epochs 3 --save_every 7 --attn_dropout 0 --proj_dropout 0 --warmup_epochs 0 --log_freq 1"
    run(training_command(project, tmp_path / "two", f"{common} --batch_size 8"), processes=2)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for later in checkpoint.list_numbered(tmp_path / "one")[:-1]:
        later.unlink()
    (tmp_path / "one" / checkpoint.LAST).unlink()
    start_step, = steps_of(tmp_path / "one")
    train(project, tmp_path / "one", f"{common} --batch_size 8 --resume {tmp_path}/one")
    printed = capsys.readouterr().out
    assert "global batch 16: 8 images x 1 processes x 2 forward passes" in printed
    assert f"1 x cpu with {loaders.rank_cpus():g} CPUs and 0 data workers each" in printed
    a, b = ([line for line in read_log(tmp_path / name) if line["group"] == "train"] for name in ("one", "two"))
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, 16)) and start_step in (7, 14)
    # AdamW turns rounding into steps of the learning rate's size, so the losses part slowly.
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=2e-3)
    assert [line["loss"] for line in a[:start_step + 1]] == pytest.approx([line["loss"] for line in b[:start_step + 1]], rel=1e-5)


def test_in_the_middle_of_an_epoch_data_and_batch_stay(project, tmp_path):
    with stopping_before(4):
        train(project, tmp_path / "run", "--save_every 3")
    make_project(tmp_path / "more", per_class=9)
    for extra, message in (("--global_batch 20", "with global batch 16, now global batch is 20"),
                           (f"--data_path {tmp_path}/more/images", "with images 80, now images is 90")):
        with pytest.raises(FlowARError, match=f"checkpoint-000000003.pth: stopped within an epoch {message}"):
            train(project, tmp_path / "run", f"--resume {tmp_path}/run {extra}")
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 3


def test_validation_does_not_depend_on_the_batch_or_the_seed(project, tmp_path):
    train(project, tmp_path, "--epochs 1")
    before, = [line["loss"] for line in read_log(tmp_path) if line["group"] == "val"]
    lines = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if json.loads(line)["group"] == "train"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    train(project, tmp_path, f"--epochs 1 --batch_size 3 --global_batch 16 --seed 1 --resume {tmp_path}")  # makes the report again
    assert [line["loss"] for line in read_log(tmp_path) if line["group"] == "val"] == [pytest.approx(before, rel=1e-5)]


def test_saving_by_the_clock(project, tmp_path):
    train(project, tmp_path, "--save_every 0.0001m --keep 50 --epochs 1")
    assert len(steps_of(tmp_path)) > 2


# ---- stopped by a signal --------------------------------------------------------------------------------------------


def test_a_signal_saves_leaves_with_a_status_of_its_own_and_the_run_ends_with_the_same_bits(project, undisturbed, tmp_path, monkeypatch):
    """SIGTERM, then Ctrl-C, with a data worker."""
    def send(original, run, parts):
        if run.progress.step in (6, 11):
            signal.raise_signal({6: signal.SIGTERM, 11: signal.SIGINT}[run.progress.step])
        return original(run, parts)

    command = f"{LONG} --num_workers 1 --resume {tmp_path}"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        seams.wrap(monkeypatch, seams.STEP, send)
        for step, status in ((7, RESTART), (12, 130)):
            with pytest.raises(Preempted, match=f"saved after step {step} .exit status {status}.") as ended:
                train(project, tmp_path, command)
            assert ended.value.status == status and read_checkpoint(tmp_path)["progress"]["step"] == step
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    train(project, tmp_path, command)
    assert_same_run(tmp_path, undisturbed / "1")


FAILING = """
import time
import engine_flowar, main_flowar
from models import FlowARError
from util import cluster
from util.training import checkpoint
write_file = checkpoint.write_file

def slowly(content, path):
    time.sleep(1)
    write_file(content, path)

def fail(*args):
    if cluster.rank() == 1:
        raise FlowARError("no report")
    time.sleep(60)

checkpoint.write_file, engine_flowar.validate = slowly, fail
cluster.run_main(main_flowar.main)
"""


def test_a_checkpoint_that_is_being_written_outlives_an_error_of_another_rank(project, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = training_command(project, tmp_path / "out", "--epochs 1 --batch_size 8")
    done = run(command.replace("main_flowar.py", f"{tmp_path}/failing.py"), 2, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == ["error (rank 1): no report"], done.stderr
    assert done.returncode == 1 and (tmp_path / "out" / "checkpoint-000000005.pth").is_file()


# ---- disks -----------------------------------------------------------------------------------------------------


LIMITED = """
import main_flowar, resource
from util import cluster
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))
cluster.run_main(main_flowar.main)
"""


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_is_whole(project, tmp_path):
    """Files may not grow beyond 4 MB: no checkpoint fits."""
    train(project, tmp_path, "--epochs 1")
    before = (tmp_path / checkpoint.LAST).read_bytes()
    (tmp_path / "limited.py").write_text(LIMITED)
    command = training_command(project, tmp_path, f"--save_every 2 --epochs 4 --resume {tmp_path}")
    done = run(command.replace("main_flowar.py", f"{tmp_path}/limited.py"), check=False)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-000000006.pth: cannot be written ([Errno 27] File too large)" in done.stderr and "Traceback" not in done.stderr
    assert checkpoint.open_newest(tmp_path).path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
