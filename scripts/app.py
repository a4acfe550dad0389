"""A page in the browser that draws pictures of a model, and shows what a scale-wise model can do.

    pip install gradio
    python scripts/app.py                                # the quickstart's model, http://127.0.0.1:7860
    python scripts/app.py --resume released:flowar_small

Visitors wait for each other. The page loads nothing from elsewhere. A downloaded PNG holds the settings that it was
made with: scripts/sample.py --again PICTURE makes it once more.
"""
import argparse
import contextlib
import functools
import hashlib
import html
import io
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import project_root  # noqa: F401
import torch

from models import FlowARError
from models.flow_matching import TIME_GRIDS
from scripts.pictures import png_text
from util.cluster import PRECISIONS, run_main, select_device
from util.evaluation.pipeline import open_pipeline
from util.manifest import code_version
from util import options
from util.options import SAMPLING, as_text, between, sampling_parser, seed, single_point, with_options

QUICKSTART = "output/quickstart/run"
MOST_IMAGES, MOST_STEPS, MOST_CFG = 16, 100, 10.0
KEPT_FILES = 512  # pictures that can still be downloaded
PORTS = between(int, 1, 65535)


# ---- what the page does, without the page --------------------------------------------------------------------


class Asked(NamedTuple):
    """What a visitor asks for: an image of a class for each seed."""
    label: int
    seeds: range
    precision: str
    settings: dict  # FlowAR.sample_tokens' arguments


class Drawn(NamedTuple):
    """What a visitor sees. chosen: the image that is varied. varied: (variations, scales kept) of it, if there are."""
    asked: Asked
    pictures: list
    pyramids: list  # of each picture
    seconds: float
    chosen: int = 0
    varied: tuple | None = None

    @property
    def seed(self):
        return self.asked.seeds[self.chosen]


def checked(name, kind, value):
    """A value of the page as the option of the same kind takes it, or FlowARError."""
    if value is None or value == "":
        raise FlowARError(f"{name} is empty")
    return options.checked(name, kind, value)


def read_form(pipe, label, first_seed, count, cfg, guidance, steps, solver, precision):
    """The Asked of the page's values, which may be anything; FlowARError that names the first that is wrong."""
    if label is None or str(label).strip() == "":
        raise FlowARError("Class is empty: choose one, or type its name or number")
    label, first_seed = pipe.label(label), checked("Seed", seed, first_seed)
    count = checked("Images", between(int, 1, MOST_IMAGES), count)
    given = {"cfg": ("Guidance scale", cfg), "guidance": ("Guidance interval", guidance), "num_steps": ("Steps", steps),
             "solver": ("Solver", solver)}
    now = pipe.sampler.options  # which may have a value for each scale: it stays while the page's is left alone
    settings = {name: now[name] if value == slider(now[name]) else checked(title, SAMPLING[name].kind, value)
                for name, (title, value) in given.items()}
    checked("Last seed", seed, first_seed + count - 1)
    if settings["num_steps"] != now["num_steps"]:
        settings["num_steps_last"] = None  # the checkpoint's, which goes with its steps
    known = precisions(pipe.sampler.device)
    if precision not in known:
        raise FlowARError(f"Precision is {precision!r}: expected one of {', '.join(known)}")
    return Asked(label, range(first_seed, first_seed + count), precision, settings)


def slider(value):
    """A setting's value on the page: of one for each scale, the last."""
    return value[-1] if isinstance(value, (tuple, list)) else value


def precisions(device):
    """Those that a device has."""
    return [name for name in PRECISIONS if name != "tf32" or device.type == "cuda"]


@contextlib.contextmanager
def reporting(model, report, done=0, images=1, of=1):
    """Inside, report(fraction, text) is called at the first evaluation of the flow head for each scale, while `images`
    images are drawn after `done`, `of` in all.
    """
    sides, last = list(model.scale), None

    def note(module, inputs):
        nonlocal last
        side = round(inputs[0].shape[1] ** 0.5)
        if side != last:
            last = side
            part = sides.index(side) / len(sides)
            report((done + images * part) / of, f"image {done + 1} of {of}: {side}x{side} tokens")

    hook = model.flownet.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def draw(pipe, asked, report):
    """The Drawn of an Asked: the images of pipe([label], seed=...) for each seed; on CUDA many at once, which may
    change a pixel by rounding.
    """
    pipe = pipe.using(asked.precision, **asked.settings)
    at_once = 1 if pipe.sampler.device.type == "cpu" else pipe.sampler.batch
    pictures, pyramids, started = [], [], time.perf_counter()
    for first in range(0, len(asked.seeds), at_once):
        some = asked.seeds[first:first + at_once]
        noise = [torch.cat(scale) for scale in zip(*(pipe.noise(number, [0]) for number in some))]
        with reporting(pipe.sampler.model, report, first, len(some), len(asked.seeds)):
            pyramid = pipe.latents([asked.label] * len(some), noise)
        pictures += pipe.pictures(pyramid[-1])
        pyramids += zip(*([x.cpu() for x in scale.split(1)] for scale in pyramid))
    return Drawn(asked, pictures, pyramids, time.perf_counter() - started)


def grow(pipe, drawn):
    """The chosen image after every scale."""
    pipe = pipe.using(drawn.asked.precision)
    return pipe.grown([x.to(pipe.sampler.device) for x in drawn.pyramids[drawn.chosen]])


def vary(pipe, drawn, keep, count, report):
    """(`count` images that share the chosen image's first `keep` scales, the first is that image itself; seconds)."""
    if drawn is None:
        raise FlowARError("There is no image to vary: draw some first")
    keep = checked("Scales to keep", between(int, 0, len(pipe.sampler.model.scale)), keep)
    count = checked("Variations", between(int, 1, MOST_IMAGES), count)
    pipe, started = pipe.using(drawn.asked.precision, **drawn.asked.settings), time.perf_counter()
    with reporting(pipe.sampler.model, report):
        varied = pipe.variations(drawn.asked.label, keep_scales=keep, count=count, seed=drawn.seed)
    return varied, time.perf_counter() - started


def settings_of(pipe, asked, number, words, kept=None):
    """What the PNG of an image with seed `number` carries; kept: (index, scales kept, count) of a variation of it.
    words: the options that the page was started with.
    """
    tuned = pipe.using(asked.precision, **asked.settings)
    options = {setting.option: tuned.sampler.options[name] for name, setting in SAMPLING.items()}
    command = [*words, "--labels", asked.label, "--seeds", number, "--precision", asked.precision]
    command += [word for option, value in options.items() if value is not None
                for word in (f"--{option}", as_text(value))]
    said = {**tuned.settings(), "commit": code_version(), "seed": number,
            "label": asked.label, "class_name": pipe.names[asked.label]}
    if kept is None:
        return {**said, "picture": "folder", "command": list(map(str, [*command, "--folder", "samples"]))}
    index, keep, count = kept
    command += ["--variations", "variations.png", "--keep_scales", keep, "--per_class", count]
    return {**said, "picture": "variations", "number": index, "keep_scales": keep, "command": list(map(str, command))}


def write_picture(folder, picture, settings, name):
    """Path of a PNG with its settings, <folder>/<hash>/<name>.png; only the last KEPT_FILES stay."""
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=png_text(settings))
    path = Path(folder) / hashlib.sha256(content.getvalue()).hexdigest()[:16] / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.getvalue())
    for old in sorted(Path(folder).glob("*/*.png"), key=os.path.getmtime)[:-KEPT_FILES]:
        old.unlink()
        old.parent.rmdir()
    return str(path)


def describe_speed(drawn, count, seconds, device):
    return (f"{count} image{'s' * (count > 1)} in {seconds:.2f} s, {seconds / count:.3f} s each "
            f"({device.type.upper()}, {drawn.asked.precision})")


def describe_model(pipe, name):
    """A line of Markdown on what the page draws with."""
    about, size = pipe.description, pipe.sampler.model.img_size
    return (f"**{html.escape(about['model'])}**, {about['parameters'] / 1e6:,.1f} million parameters, "
            f"{len(pipe.names)} classes, {size}x{size} pixels, "
            f"scales {' → '.join(map(str, pipe.sampler.model.scale))}. "
            f"Weights: `{html.escape(str(name))}` ({about['weights']}).")


def class_choices(names):
    """[(what the class picker shows, label)]: names are not always unlike, and some are numbers."""
    return [(name if name == str(label) else f"{name} ({label})", label) for label, name in enumerate(names)]


# ---- the page ------------------------------------------------------------------------------------------------

STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
.pictures { min-height: 150px; }
.pictures .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
.pictures .thumbnail-lg { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
.pictures .thumbnail-lg img { aspect-ratio: 1; height: auto; }
.pictures .caption-label { position: static; max-width: none; width: 100%; border: 0; border-radius: 0; }
.pictures .caption-label { text-align: center; }
@media (max-width: 640px) {
  .pictures .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
  #below { flex-direction: column; }
}
"""
WHOLE_PIXELS = """
.pictures img { image-rendering: pixelated; }
"""
KEEPING = "Its first scales are kept as they are, the finer ones drawn anew."
SECONDS_OF_MESSAGES = 20
ENLARGED_BELOW = 128  # pixels: smaller images are shown with whole pixels


def import_gradio():
    """gradio 6 or newer, told to load and send nothing."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise FlowARError(f"scripts/app.py needs gradio ({error}): pip install gradio") from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise FlowARError(f"gradio is {gradio.__version__}, scripts/app.py needs 6 or newer: "
                          "pip install --upgrade gradio")
    return gradio


def on_page(gr):
    """A decorator: the errors of an event are messages on the page."""

    def decorate(event):
        @functools.wraps(event)
        def run(*args, **options):
            try:
                return event(*args, **options)
            except (FlowARError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                message = str(error) or type(error).__name__
                raise gr.Error(html.escape(message), duration=SECONDS_OF_MESSAGES, print_exception=False) from error

        return run

    return decorate


class Events:
    """What the page's buttons do, for one Pipeline; each method gives what the parts of Layout show next.

    words: see settings_of; folder: for pictures to download.
    """

    def __init__(self, gr, pipe, words, folder):
        self.gr, self.pipe, self.words, self.folder = gr, pipe, words, folder

    def draw(self, values, report):
        """drawn, gallery, status, and those of shown()."""
        drawn = draw(self.pipe, read_form(self.pipe, *values), report)
        files = [self.picture(drawn._replace(chosen=i)) for i in range(len(drawn.pictures))]
        return drawn, self.gr.Gallery(files, selected_index=0), self.speed(drawn, len(files), drawn.seconds), \
            *self.shown(drawn)

    def choose(self, drawn, index):
        """drawn, and those of shown()."""
        if drawn is None or not 0 <= index < len(drawn.pictures):
            raise FlowARError("This image is no longer there: draw again")
        drawn = drawn._replace(chosen=index, varied=None)
        return drawn, *self.shown(drawn)

    def vary(self, drawn, keep, count, report):
        """drawn, varied, vary_status."""
        varied, seconds = vary(self.pipe, drawn, keep, count, report)
        drawn = drawn._replace(varied=(varied, int(keep)))
        files = [self.variation(drawn, i) for i in range(len(varied))]
        return drawn, self.gr.Gallery(files, selected_index=None), self.speed(drawn, len(varied), seconds)

    def pick(self, drawn, index):
        """save."""
        if drawn is None or drawn.varied is None or not 0 <= index < len(drawn.varied[0]):
            raise FlowARError("This variation is no longer there: draw again")
        return self.download(*self.variation(drawn, index))

    def shown(self, drawn):
        """strip, grown, varied, chosen, save: of the chosen image."""
        scales, name = self.pipe.sampler.model.scale, html.escape(self.pipe.names[drawn.asked.label])
        strip = [(image, f"{s}x{s} tokens") for s, image in zip(scales, grow(self.pipe, drawn))]
        title = f"{name}, seed {drawn.seed}"
        return (self.gr.Gallery(strip), f"### How it grew, scale by scale: {title}",
                self.gr.Gallery([]), f"## Variations of {title}\n{KEEPING}", self.download(*self.picture(drawn)))

    def picture(self, drawn):
        """(path of a PNG, caption) of the chosen image."""
        said = settings_of(self.pipe, drawn.asked, drawn.seed, self.words)
        name = f"{drawn.asked.label:04d}-{drawn.seed:04d}"
        return write_picture(self.folder, drawn.pictures[drawn.chosen], said, name), f"seed {drawn.seed}"

    def variation(self, drawn, index):
        """(path of a PNG, caption) of a variation."""
        pictures, keep = drawn.varied
        said = settings_of(self.pipe, drawn.asked, drawn.seed, self.words, (index, keep, len(pictures)))
        name = f"{drawn.asked.label:04d}-{drawn.seed:04d}-keep{keep}-{index:02d}"
        return (write_picture(self.folder, pictures[index], said, name),
                f"variation {index}" if index else "the chosen image")

    def download(self, file, what):
        return self.gr.DownloadButton(f"Download {what}, with its settings", value=file, interactive=True)

    def speed(self, drawn, count, seconds):
        return describe_speed(drawn, count, seconds, self.pipe.sampler.device)


class Layout(NamedTuple):
    """The page's parts."""
    drawn: object  # the visitor's Drawn
    fields: list  # of read_form, in its order
    button: object
    gallery: object
    status: object
    save: object
    grown: object
    strip: object
    chosen: object
    keep: object
    count: object
    vary_button: object
    vary_status: object
    varied: object


def what_fields(gr, pipe):
    """The fields of what is drawn: class, seed, number of images."""
    with gr.Group():
        return [gr.Dropdown(class_choices(pipe.names), value=int(pipe.classes.sampled()[0]), label="Class",
                            allow_custom_value=True, elem_id="class", info="Type to search, by name or number"),
                gr.Number(0, precision=0, label="Seed", elem_id="seed",
                          info="Of the first image; the others have the next ones"),
                gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="images")]


def how_fields(gr, pipe):
    """The fields of how it is drawn, with the checkpoint's settings in them."""
    now, precision = {name: slider(value) for name, value in pipe.sampler.options.items()}, pipe.sampler.precision
    with gr.Group():
        numbers = [
            gr.Slider(1, max(MOST_CFG, now["cfg"]), now["cfg"], step=0.1, label="Guidance scale (cfg)", elem_id="cfg",
                      info="1: none; higher: clearer, less varied"),
            gr.Slider(0, 1, now["guidance"], step=0.05, label="Guidance interval", elem_id="guidance",
                      info="It acts at times up to this; 1 is noise"),
            gr.Slider(TIME_GRIDS[now["time_grid"]], max(MOST_STEPS, now["num_steps"]), now["num_steps"], step=1, label="Steps of a scale",
                      elem_id="steps")]
        with gr.Row():
            return [*numbers,
                    gr.Dropdown(list(pipe.sampler.model.path.SOLVERS), value=now["solver"], label="Solver", elem_id="solver", min_width=120),
                    gr.Dropdown(precisions(pipe.sampler.device), value=precision, label="Precision",
                                elem_id="precision", min_width=120)]


def lay_out(gr, pipe, name):
    """The Layout, inside gr.Blocks."""
    scales, parts = pipe.sampler.model.scale, {"drawn": gr.State()}
    narrow, wide = dict(scale=1, min_width=320), dict(scale=2, min_width=480)

    def pictures(elem_id, columns=4):
        return gr.Gallery(elem_id=elem_id, columns=columns, height="auto", object_fit="contain", format="png",
                          interactive=False, show_label=False, fit_columns=False, allow_preview=False, buttons=[],
                          elem_classes="pictures")

    gr.Markdown(f"# FlowAR\n{describe_model(pipe, name)}")
    with gr.Row():
        with gr.Column(**narrow):
            parts["fields"] = what_fields(gr, pipe) + how_fields(gr, pipe)
            parts["button"] = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(**wide):
            gr.Markdown("### Images: click one to choose it")
            parts["gallery"] = pictures("gallery")
            with gr.Row(equal_height=True, elem_id="below"):
                parts["status"] = gr.Markdown("", elem_id="status")
                parts["save"] = gr.DownloadButton("Download", interactive=False, elem_id="download", size="md",
                                                  min_width=320)
            parts["grown"] = gr.Markdown("### How the chosen image grew, scale by scale")
            parts["strip"] = pictures("strip", max(4, len(scales)))
    parts["chosen"] = gr.Markdown(f"## Variations of the chosen image\n{KEEPING}")
    with gr.Row():
        with gr.Column(**narrow):
            with gr.Group():
                parts["keep"] = gr.Slider(0, len(scales), max(1, len(scales) // 2), step=1, label="Scales to keep",
                                          elem_id="keep",
                                          info=", ".join(f"{i + 1}: {s}x{s}" for i, s in enumerate(scales)))
                parts["count"] = gr.Slider(2, MOST_IMAGES, 8, step=1, label="Variations, with the image itself",
                                           elem_id="variation_count")
            parts["vary_button"] = gr.Button("Vary the chosen image", elem_id="vary")
            parts["vary_status"] = gr.Markdown("", elem_id="vary_status")
        with gr.Column(**wide):
            parts["varied"] = pictures("variations")
    return Layout(**parts)


def connect(gr, at, events):
    """Let the parts of a Layout do what Events say, one event at a time over all visitors."""

    # gradio finds what is typed, and progress by its default, in the signature
    @on_page(gr)
    def draw_event(label, first_seed, images, cfg, guidance, steps, solver, precision, progress=gr.Progress()):
        values = label, first_seed, images, cfg, guidance, steps, solver, precision
        return events.draw(values, reporter(progress))

    @on_page(gr)
    def vary_event(drawn, keep, count, progress=gr.Progress()):
        return events.vary(drawn, keep, count, reporter(progress))

    @on_page(gr)
    def choose_event(drawn, event: gr.SelectData):
        return events.choose(drawn, event.index)

    @on_page(gr)
    def pick_event(drawn, event: gr.SelectData):
        return events.pick(drawn, event.index)

    shown = [at.strip, at.grown, at.varied, at.chosen, at.save]
    alone = dict(concurrency_id="model", concurrency_limit=1)
    at.button.click(draw_event, at.fields, [at.drawn, at.gallery, at.status, *shown], show_progress_on=at.gallery,
                    api_name="draw", **alone)
    at.gallery.select(choose_event, at.drawn, [at.drawn, *shown], show_progress_on=at.strip, api_visibility="private",
                      **alone)
    at.vary_button.click(vary_event, [at.drawn, at.keep, at.count], [at.drawn, at.varied, at.vary_status],
                         show_progress_on=at.varied, api_name="vary", **alone)
    at.varied.select(pick_event, at.drawn, at.save, show_progress="hidden", api_visibility="private", **alone)


def build_page(pipe, name, words, folder):
    """The gr.Blocks of a Pipeline. name: of the weights; words, folder: see Events."""
    gr = import_gradio()
    with gr.Blocks(title="FlowAR", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        connect(gr, lay_out(gr, pipe, name), Events(gr, pipe, words, folder))
    return page.queue(default_concurrency_limit=1)


def reporter(progress):
    """report(fraction, text) of `reporting` for a gr.Progress."""
    return lambda fraction, text: progress(fraction, desc=text)


def launch(page, host, port, img_size):
    """Serve the page until Ctrl-C or SIGTERM."""
    gr = import_gradio()
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is loaded
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=True, ssr_mode=False, show_error=True,
                    theme=gr.themes.Default(**fonts), css=STYLE + (WHOLE_PIXELS if img_size < ENLARGED_BELOW else ""),
                    prevent_thread_lock=True)
    except OSError as error:
        raise FlowARError(f"--host {host} --port {port or 'any of 7860 to 7959'}: cannot be listened on, it is in use "
                          "or not of this machine: give another") from error
    print(f"the page is at {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


# ---- the program ---------------------------------------------------------------------------------------------


def make_parser():
    parser = sampling_parser(__doc__.splitlines()[0])
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: whoever can reach this machine may draw")
    add("--port", type=PORTS, help="default: the first free one from 7860 on")
    return parser


def parse_args():
    """(options, those words of the command line that scripts/sample.py takes too)."""
    args = single_point(make_parser().parse_args())
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--host"), own.add_argument("--port")
    _, words = own.parse_known_args()
    if args.resume:
        return args, words
    if not Path(QUICKSTART).exists():
        raise FlowARError(f"--resume is missing, and {QUICKSTART} is not there: make it with bash "
                          "scripts/quickstart.sh, or give a checkpoint, or a name such as released:flowar_small")
    return with_options(args, resume=QUICKSTART), ["--resume", QUICKSTART, *words]


def open_for_page(args):
    """The Pipeline in the precision of the options, with weights that are not rounded: any other can be chosen."""
    device = select_device(args.device)
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")  # as in open_for_sampling
    if precision not in precisions(device):
        raise FlowARError(f"--precision {precision} needs CUDA: the device is {device.type}")
    return open_pipeline(with_options(args, precision="fp32"), device, identify=True).using(precision)


def main():
    args, words = parse_args()
    import_gradio()
    pipe = open_for_page(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the folder goes with the program
    with tempfile.TemporaryDirectory(prefix="flowar-page-") as folder:
        page = build_page(pipe, args.resume, words, folder)
        launch(page, args.host, args.port, pipe.sampler.model.img_size)


if __name__ == "__main__":
    run_main(main)
