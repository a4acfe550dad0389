"""The page of scripts/app.py: what it draws, what its buttons show, and that visitors wait for each other."""
import json
import os
import socket
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import sample
from helpers import finish, run_with_settings, start
from PIL import Image

from scripts import app
from scripts.pictures import read_settings
from util.evaluation import load_pipeline

FORM = dict(label="3", first_seed=5, count=2, cfg=3.0, guidance=0.8, steps=6, solver="heun", precision="bf16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_with_settings(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def words(trained):
    return ["--resume", str(trained), "--device", "cpu"]


@pytest.fixture(scope="module")
def pipe(words):
    return app.open_for_page(app.page_parser().parse_args(words))


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def same(some, others):
    return np.array_equal(pixels(some), pixels(others))


def asked(pipe, **changes):
    return app.read_form(pipe, *{**FORM, **changes}.values())


def ignore(text):
    pass


# ---- what the page does --------------------------------------------------------------------------------------------


def test_the_page_draws_what_the_pipeline_draws_and_every_field_acts(pipe, trained):
    drawn = app.draw(pipe, asked(pipe), ignore)
    settings = dict(cfg=3.0, guidance=0.8, num_steps=6, num_steps_last=None, solver="heun")
    other = load_pipeline(trained, device="cpu", precision="bf16")  # its weights are rounded once, not at every call
    assert same(drawn.pictures, [other([3], seed=number, **settings)[0] for number in (5, 6)])
    for change in (dict(label=8), dict(first_seed=7), dict(cfg=1), dict(guidance=0.1), dict(steps=4),
                   dict(solver="euler"), dict(precision="fp32")):
        assert not same(app.draw(pipe, asked(pipe, **change), ignore).pictures, drawn.pictures), change
    assert len(app.draw(pipe, asked(pipe, count=3), ignore).pictures) == 3
    chosen = drawn._replace(chosen=1)
    assert same(app.grow(pipe, chosen), other.grow(3, seed=6, **settings))
    varied, _ = app.vary(pipe, chosen, 1, 3, ignore)
    assert same(varied, other.variations(3, keep_scales=1, count=3, seed=6, **settings))


def test_steps_of_ones_own_are_not_annealed_to_the_checkpoints(pipe):
    annealed = pipe.using(num_steps=10, num_steps_last=8)
    drawn_with = [annealed.using(**asked(annealed, steps=steps, precision="fp32").settings).sampler.sampling for steps in (10, 6)]
    assert [(sampling.num_steps, sampling.num_steps_last) for sampling in drawn_with] == [(10, 8), (6, None)]


def test_a_drawing_reports_every_step_and_ends_at_one_that_is_refused(pipe):
    seen = []
    app.draw(pipe, asked(pipe, solver="euler"), seen.append)
    assert seen == [f"image {i} of 2: {side}x{side} tokens" for i in (1, 2) for side in (1, 2, 4) for _ in range(6)]

    def refuse(text):
        seen.append(text)
        raise KeyError("leaves")

    seen.clear()
    with pytest.raises(KeyError):
        app.draw(pipe, asked(pipe), refuse)
    assert len(seen) == 1 and not pipe.sampler.model.flownet._forward_pre_hooks


def test_a_downloaded_picture_can_be_made_again(pipe, words, tmp_path, monkeypatch):
    drawn = app.draw(pipe, asked(pipe), ignore)._replace(chosen=1)
    file = app.write_picture(tmp_path, drawn.pictures[1], app.settings_of(pipe, drawn.request, 6, words), "0003-0006")
    said = read_settings(file)
    expected = dict(label=3, seed=6, cfg=3.0, guidance=0.8, num_step=6, solver="heun", precision="bf16")
    assert {name: said[name] for name in expected} == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sample.py", "--again", file])
    sample.main()
    assert same([Image.open("samples/0003-0006.png")], drawn.pictures[1:])
    assert same([Image.open(file)], drawn.pictures[1:])
    varied, _ = app.vary(pipe, drawn, 1, 3, ignore)
    file = app.write_picture(tmp_path, varied[2], app.settings_of(pipe, drawn.request, 6, words, (2, 1, 3)), "v")
    monkeypatch.setattr("sys.argv", ["sample.py", "--again", file])
    sample.main()
    third = Image.open("variations.png").crop((11 + 132, 2, 11 + 132 + 64, 66))
    assert same([third], [varied[2].resize((64, 64), 0)])


def test_only_the_last_pictures_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "KEPT_FILES", 3)
    for shade in range(5):
        last = app.write_picture(tmp_path, Image.new("RGB", (4, 4), (shade, 0, 0)), {"shade": shade}, "x")
        os.utime(last, (shade, shade))
    assert sorted(read_settings(path)["shade"] for path in tmp_path.glob("*/*.png")) == [2, 3, 4]
    assert len(list(tmp_path.iterdir())) == 3


# ---- how it starts -------------------------------------------------------------------------------------------------


def test_which_model_is_opened(monkeypatch):
    monkeypatch.setattr("sys.argv", ["app.py", "--port", "7000", "--device", "cpu", "--host=0.0.0.0"])
    args, words = app.parse_args()
    assert (args.resume, args.host, args.port) == ("demo:fashion", "0.0.0.0", 7000)
    assert words == ["--resume", "demo:fashion", "--device", "cpu"]
    assert app.page_parser().parse_args([]).host == "127.0.0.1"  # for nobody else


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(pipe, words, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    page = app.build_page(pipe, "run", words, tmp_path)
    yield page
    page.close()


def test_the_page_shows_the_checkpoints_settings(page):
    shown = {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}
    assert {name: shown[name].value for name in ("class", "cfg", "guidance", "steps", "solver", "precision")} == \
        {"class": 0, "cfg": 2.0, "guidance": 1.0, "steps": 4, "solver": "euler", "precision": "fp32"}


FIELDS = [3, 0, 1, 2.0, 1.0, 4, "euler", "fp32"]


@pytest.fixture
def visitors(page):
    client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    return [client.Client(page.local_url, verbose=False) for _ in range(3)]


def test_visitors_wait_for_each_other(visitors, monkeypatch):
    inside, together, entered, draw, vary = [], [], threading.Event(), app.draw, app.vary

    def alone(what):
        def watched(*args):
            inside.append(1)
            together.append(len(inside))
            entered.wait(0.3) if len(inside) == 1 else entered.set()  # the second would end the first one's wait
            try:
                return what(*args)
            finally:
                inside.pop()
        return watched

    visitors[0].predict(*FIELDS, api_name="/draw")
    monkeypatch.setattr(app, "draw", alone(draw)), monkeypatch.setattr(app, "vary", alone(vary))
    jobs = [visitors[0].submit(1, 2, api_name="/vary")]
    jobs += [visitor.submit(*FIELDS, api_name="/draw") for visitor in visitors[1:]]
    assert all(job.result(60) for job in jobs) and together == [1, 1, 1]


def test_a_drawing_ends_if_its_visitor_cancels_or_leaves(page, visitors, monkeypatch):
    """Else the next visitor would wait for ever."""
    draw, begun = app.draw, threading.Event()

    def draw_endlessly(pipe, request, report):
        begun.set()
        while True:
            report("image 1 of 1: 1x1 tokens")
            time.sleep(0.01)

    def cancel():
        job = visitors[0].submit(*FIELDS, api_name="/draw")
        assert begun.wait(60)
        job.cancel()

    def leave():
        number = next(number for number, event in page.fns.items() if event.api_name == "draw")
        body = json.dumps({"data": FIELDS, "fn_index": number, "session_hash": "leaves"}).encode()
        url, kind = f"{page.local_url}gradio_api/queue/", {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}join", body, kind)).read()
        with urllib.request.urlopen(f"{url}data?session_hash=leaves"):
            assert begun.wait(60)

    for end in cancel, leave:
        monkeypatch.setattr(app, "draw", draw_endlessly)
        begun.clear()
        end()
        monkeypatch.setattr(app, "draw", draw)
        assert "1 image in" in str(visitors[1].submit(*FIELDS, api_name="/draw").result(60))


def test_what_the_buttons_show(pipe, words, trained, tmp_path):
    """Draw, choose the third, vary it, pick a variation: pictures, strips and downloads are the pipeline's."""
    show = SimpleNamespace(Gallery=lambda items, **options: [item[0] for item in items], DownloadButton=lambda text, value, **options: Path(value))
    events, expected = app.Events(show, pipe, words, tmp_path), load_pipeline(trained, device="cpu")
    drawing, gallery, status, strip, *_ = events.draw((8, 5, 3, 2.0, 1.0, 4, "euler", "fp32"), ignore)
    assert same(map(Image.open, gallery), [expected([8], seed=number)[0] for number in (5, 6, 7)]) and "3 images in" in status
    assert same(strip, expected.grow(8, seed=5))
    drawing, strip, title, *_, file = events.choose(drawing, 2)
    assert same(strip, expected.grow(8, seed=7)) and "seed 7" in title
    assert file.name == "0008-0007.png" and file.read_bytes() == Path(gallery[2]).read_bytes() and read_settings(file)["seed"] == 7
    drawing, varied, _ = events.vary(drawing, 2, 4, ignore)
    assert same(map(Image.open, varied), expected.variations(8, keep_scales=2, count=4, seed=7))
    file = events.pick(drawing, 3)
    assert file.name == "0008-0007-keep2-03.png" and read_settings(file)["keep_scales"] == 2


def test_the_program(words, tmp_path, monkeypatch):
    """Started as a user starts it, behind a proxy: draws, shows what is wrong, goes on, and ends while it draws."""
    client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file").touch()
    environment = {"TMPDIR": tmp_path / "pictures", "GRADIO_TEMP_DIR": tmp_path / "file" / "of_another",
                   "http_proxy": "http://127.0.0.1:9", "all_proxy": "socks://127.0.0.1:9"}
    with socket.socket() as free, monkeypatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for name, value in environment.items():
            patch.setenv(name, str(value))
        process = start(f"scripts/app.py {' '.join(words)} --port {port}")
    url, end = f"http://127.0.0.1:{port}/", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(url).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
                time.sleep(0.1)
        visitor = client.Client(url, verbose=False)
        with pytest.raises(Exception, match="zebra.*no such class"):
            visitor.predict("zebra", *FIELDS[1:], api_name="/draw")
        assert "1 image in" in str(visitor.predict(*FIELDS, api_name="/draw"))
        job = visitor.submit(3, 0, 16, 2.0, 1.0, 100, "heun", "fp32", api_name="/draw")
        next(iter(job))  # the first words of where it is
    finally:
        process.terminate()
        status, output = finish(process, 30)
    assert status == 0 and f"running at {url}" in output and "Traceback" not in output, output
    assert not list((tmp_path / "pictures").glob("flowar-page-*"))
