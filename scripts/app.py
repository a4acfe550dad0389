"""A page in the browser that samples images and shows what a scale-wise model can do.

    pip install gradio
    python scripts/app.py                                # demo:fashion, at http://127.0.0.1:7860
    python scripts/app.py --resume released:flowar_small

Visitors wait for each other; a drawing ends at its next step if its visitor cancels or leaves. The page loads nothing
from elsewhere. A downloaded PNG holds its settings: scripts/sample.py --again PICTURE draws it again.
"""
import contextlib
import hashlib
import html
import importlib.util
import io
import math
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from models import FlowARError
from models.flow_matching import TIME_GRIDS
from models.settings import Sampling, as_text, check_value, number
from scripts.pictures import png_text
from util.cluster import PRECISIONS, run_main, select_device
from util.command_line import SEED, Parser, make_parser, take_options
from util.evaluation.pipeline import open_pipeline
from util.manifest import code_version
from util.options import SamplingOptions

DEMO = "demo:fashion"
MOST_IMAGES, MOST_STEPS, MOST_CFG = 16, 100, 10.0
KEPT_FILES = 512  # pictures that can still be downloaded


# ---- drawing, without the page -------------------------------------------------------------------------------


class Request(NamedTuple):
    """An image of a class for each seed."""
    label: int
    seeds: range
    precision: str
    settings: dict  # of models.settings.Sampling


class Drawing(NamedTuple):
    """What a visitor sees. chosen: index of the image that is varied; variations: (pictures, scales kept) of it."""
    request: Request
    pictures: list
    pyramids: list  # of each picture
    seconds: float
    chosen: int = 0
    variations: tuple | None = None

    @property
    def seed(self):
        return self.request.seeds[self.chosen]


def read_form(pipe, label, first_seed, count, cfg, guidance, steps, solver, precision):
    """The Request of the page's values, which may be anything; FlowARError names the first that is wrong."""
    label, first_seed = pipe.label(label), check_value("Seed", SEED, first_seed)
    count = check_value("Images", number(int, 1, MOST_IMAGES), count)
    check_value("Last seed", SEED, first_seed + count - 1)
    values = {"cfg": ("Guidance scale", cfg), "guidance": ("Guidance interval", guidance),
              "num_steps": ("Steps", steps), "solver": ("Solver", solver)}
    kinds = {field.name: field.metadata["kind"] for field in fields(Sampling)}
    settings = {}
    for name, (title, value) in values.items():
        if value != last_scale(getattr(pipe.sampler.sampling, name)):  # else a value for each scale stays
            settings[name] = check_value(title, kinds[name], value)
    return Request(label, range(first_seed, first_seed + count), precision, settings)


def last_scale(value):
    """The last of a setting's values for each scale, or its only one."""
    return value[-1] if isinstance(value, (tuple, list)) else value


@contextlib.contextmanager
def reporting(model, report, image=1, total=1):
    """Inside, every evaluation of the flow head first calls report(text), which ends the drawing if it raises."""
    def note(module, inputs):
        side = math.isqrt(inputs[0].shape[1])
        report(f"image {image} of {total}: {side}x{side} tokens")

    hook = model.flownet.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def draw(pipe, request, report):
    """The Drawing of a Request: the images of pipe([label], seed=...) for each seed; on CUDA many at once, which may
    change a pixel by rounding.
    """
    pipe = pipe.using(request.precision, **request.settings)
    at_once = 1 if pipe.sampler.device.type == "cpu" else pipe.sampler.batch
    pictures, pyramids, start = [], [], time.perf_counter()
    for first in range(0, len(request.seeds), at_once):
        seeds = request.seeds[first:first + at_once]
        noise = [torch.cat(scale) for scale in zip(*(pipe.noise(seed, [0]) for seed in seeds))]
        with reporting(pipe.sampler.model, report, first + 1, len(request.seeds)):
            pyramid = pipe.latents([request.label] * len(seeds), noise)
        pictures += pipe.pictures(pyramid[-1])
        pyramids += zip(*([x.cpu() for x in scale.split(1)] for scale in pyramid))
    return Drawing(request, pictures, pyramids, time.perf_counter() - start)


def grow(pipe, drawing):
    """The chosen image after every scale."""
    pipe = pipe.using(drawing.request.precision)
    return pipe.grown([x.to(pipe.sampler.device) for x in drawing.pyramids[drawing.chosen]])


def vary(pipe, drawing, keep, count, report):
    """(`count` images that share the chosen image's first `keep` scales, the first is that image itself; seconds)."""
    if drawing is None:
        raise FlowARError("No image to vary: draw one first")
    keep = check_value("Scales to keep", number(int, 0, len(pipe.sampler.model.scale)), keep)
    count = check_value("Variations", number(int, 1, MOST_IMAGES), count)
    pipe, start = pipe.using(drawing.request.precision, **drawing.request.settings), time.perf_counter()
    with reporting(pipe.sampler.model, report):
        pictures = pipe.variations(drawing.request.label, keep_scales=keep, count=count, seed=drawing.seed)
    return pictures, time.perf_counter() - start


def settings_of(pipe, request, seed, words, variation=None):
    """What the PNG of an image with this seed carries; variation: (index, scales kept, count) of one of it.
    words: the options that the page was started with.
    """
    tuned = pipe.using(request.precision, **request.settings)
    command = [*words, "--labels", request.label, "--seeds", seed, "--precision", request.precision]
    for option, value in tuned.sampler.sampling.by_option().items():
        if value is not None:
            command += [f"--{option}", as_text(value)]
    settings = {**tuned.settings(), "commit": code_version(), "seed": seed, "label": request.label,
                "class_name": pipe.names[request.label]}
    if variation is None:
        return {**settings, "picture": "folder", "command": list(map(str, [*command, "--folder", "samples"]))}
    index, keep, count = variation
    command += ["--variations", "variations.png", "--keep_scales", keep, "--per_class", count]
    return {**settings, "picture": "variations", "number": index, "keep_scales": keep,
            "command": list(map(str, command))}


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


# ---- the page ------------------------------------------------------------------------------------------------

STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
.pictures { min-height: 150px; }
.pictures .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
.pictures .thumbnail-lg { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
.pictures .thumbnail-lg img { aspect-ratio: 1; height: auto; }
.pictures .caption-label { position: static; max-width: none; width: 100%; border: 0; border-radius: 0;
  text-align: center; }
@media (max-width: 640px) {
  .pictures .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
  #below { flex-direction: column; }
}
"""
WHOLE_PIXELS = ".pictures img { image-rendering: pixelated; }"  # of images below 128 pixels, which are enlarged
KEEPING = "Its first scales are kept, the finer ones are sampled again."


class Events:
    """What the page's buttons do, for one Pipeline; each method returns what the outputs of its event show next.

    words: see settings_of; folder: for pictures to download.
    """

    def __init__(self, gr, pipe, words, folder):
        self.gr, self.pipe, self.words, self.folder = gr, pipe, words, folder

    def draw(self, values, report):
        """drawing, gallery, status, and those of chosen()."""
        drawing = draw(self.pipe, read_form(self.pipe, *values), report)
        files = [self.picture(drawing._replace(chosen=i)) for i in range(len(drawing.pictures))]
        gallery = self.gr.Gallery(files, selected_index=0)
        return drawing, gallery, self.speed(drawing, len(files), drawing.seconds), *self.chosen(drawing)

    def choose(self, drawing, index):
        """drawing, and those of chosen()."""
        drawing = drawing._replace(chosen=index, variations=None)
        return drawing, *self.chosen(drawing)

    def vary(self, drawing, keep, count, report):
        """drawing, gallery of the variations, status."""
        pictures, seconds = vary(self.pipe, drawing, keep, count, report)
        drawing = drawing._replace(variations=(pictures, int(keep)))
        files = [self.variation(drawing, i) for i in range(len(pictures))]
        return drawing, self.gr.Gallery(files, selected_index=None), self.speed(drawing, len(files), seconds)

    def pick(self, drawing, index):
        """The download of a variation."""
        return self.download(*self.variation(drawing, index))

    def chosen(self, drawing):
        """strip, its title, no variations, their title, download: of the chosen image."""
        title = f"{html.escape(self.pipe.names[drawing.request.label])}, seed {drawing.seed}"
        sides = [f"{side}x{side} tokens" for side in self.pipe.sampler.model.scale]
        strip = list(zip(grow(self.pipe, drawing), sides))
        return (self.gr.Gallery(strip), f"### How it grew, scale by scale: {title}", self.gr.Gallery([]),
                f"## Variations of {title}\n{KEEPING}", self.download(*self.picture(drawing)))

    def picture(self, drawing):
        """(path of a PNG, caption) of the chosen image."""
        settings = settings_of(self.pipe, drawing.request, drawing.seed, self.words)
        name = f"{drawing.request.label:04d}-{drawing.seed:04d}"
        return write_picture(self.folder, drawing.pictures[drawing.chosen], settings, name), f"seed {drawing.seed}"

    def variation(self, drawing, index):
        """(path of a PNG, caption) of a variation."""
        pictures, keep = drawing.variations
        settings = settings_of(self.pipe, drawing.request, drawing.seed, self.words, (index, keep, len(pictures)))
        name = f"{drawing.request.label:04d}-{drawing.seed:04d}-keep{keep}-{index:02d}"
        caption = f"variation {index}" if index else "the chosen image"
        return write_picture(self.folder, pictures[index], settings, name), caption

    def download(self, file, what):
        return self.gr.DownloadButton(f"Download {what}, with its settings", value=file, interactive=True)

    def speed(self, drawing, count, seconds):
        where = f"{self.pipe.sampler.device.type.upper()}, {drawing.request.precision}"
        return f"{count} image{'s' * (count > 1)} in {seconds:.2f} s, {seconds / count:.3f} s each ({where})"


def run_in_background(gr, show, work, *args):
    """Yield show(text) of what work(*args, report) last reported until it is done, then its result. Closed before that,
    as gradio does when a visitor cancels or leaves, the work ends at its next report.
    """
    last, closed = "", threading.Event()

    def report(text):
        nonlocal last
        last = text
        if closed.is_set():
            raise FlowARError("cancelled")

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work, *args, report)
        try:
            while wait([result], timeout=0.2).not_done:
                yield show(last)
        finally:
            closed.set()
    try:
        yield result.result()
    except FlowARError as error:
        raise gr.Error(html.escape(str(error)), duration=20, print_exception=False) from None


def add_fields(gr, pipe):
    """The fields of read_form, in its order, with the checkpoint's settings in them."""
    now = {name: last_scale(value) for name, value in vars(pipe.sampler.sampling).items()}
    classes = [(name if name == str(label) else f"{name} ({label})", label)  # two may have one name
               for label, name in enumerate(pipe.names)]
    precisions = [name for name in PRECISIONS if name != "tf32" or pipe.sampler.device.type == "cuda"]
    with gr.Group():
        what = [gr.Dropdown(classes, value=int(pipe.classes.sampled()[0]), label="Class", allow_custom_value=True,
                            elem_id="class", info="Type to search, by name or number"),
                gr.Number(0, precision=0, label="Seed", elem_id="seed",
                          info="Seed of the first image; the next images use the following seeds"),
                gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="images")]
    with gr.Group():
        how = [gr.Slider(1, max(MOST_CFG, now["cfg"]), now["cfg"], step=0.1, label="Guidance scale (cfg)",
                         elem_id="cfg", info="1: none; higher: clearer, less varied"),
               gr.Slider(0, 1, now["guidance"], step=0.05, label="Guidance interval", elem_id="guidance",
                         info="Applied at times t up to this; t = 1 is noise"),
               gr.Slider(TIME_GRIDS[now["time_grid"]], max(MOST_STEPS, now["num_steps"]), now["num_steps"], step=1,
                         label="Steps of a scale", elem_id="steps")]
        with gr.Row():
            how += [gr.Dropdown(list(pipe.sampler.model.objective.SOLVERS), value=now["solver"], label="Solver",
                                elem_id="solver", min_width=120),
                    gr.Dropdown(precisions, value=pipe.sampler.precision, label="Precision", elem_id="precision",
                                min_width=120)]
    return what + how


def add_gallery(gr, elem_id, columns=4):
    return gr.Gallery(elem_id=elem_id, columns=columns, height="auto", object_fit="contain", format="png",
                      interactive=False, show_label=False, fit_columns=False, allow_preview=False, buttons=[],
                      elem_classes="pictures")


def build_page(pipe, name, words, folder):
    """The gr.Blocks of a Pipeline. name: of the weights; words, folder: see Events. One event at a time over all
    visitors.
    """
    import gradio as gr  # when main has put its environment in order
    events, scales, about = Events(gr, pipe, words, folder), pipe.sampler.model.scale, pipe.description
    size, narrow, wide = pipe.sampler.model.img_size, dict(scale=1, min_width=320), dict(scale=2, min_width=480)
    with gr.Blocks(title="FlowAR", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        drawing = gr.State()
        gr.Markdown(f"# FlowAR\n**{html.escape(about['model'])}**, {about['parameters'] / 1e6:,.1f} million parameters, "
                    f"{len(pipe.names)} classes, {size}x{size} pixels, scales {' → '.join(map(str, scales))}. Weights: "
                    f"`{html.escape(str(name))}` ({about['weights']}).")
        with gr.Row():
            with gr.Column(**narrow):
                form = add_fields(gr, pipe)
                draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel_button = gr.Button("Cancel", elem_id="cancel")
            with gr.Column(**wide):
                gr.Markdown("### Images: click one to choose it")
                gallery = add_gallery(gr, "gallery")
                with gr.Row(equal_height=True, elem_id="below"):
                    status = gr.Markdown("", elem_id="status")
                    save = gr.DownloadButton("Download", interactive=False, elem_id="download", size="md",
                                             min_width=320)
                grown = gr.Markdown("### How the chosen image grew, scale by scale")
                strip = add_gallery(gr, "strip", max(4, len(scales)))
        varied_title = gr.Markdown(f"## Variations of the chosen image\n{KEEPING}")
        with gr.Row():
            with gr.Column(**narrow):
                with gr.Group():
                    sides = ", ".join(f"{i}: {s}x{s}" for i, s in enumerate(scales, 1))
                    keep = gr.Slider(0, len(scales), max(1, len(scales) // 2), step=1, label="Scales to keep",
                                     elem_id="keep", info=sides)
                    count = gr.Slider(2, MOST_IMAGES, 8, step=1, label="Variations, with the image itself",
                                      elem_id="variation_count")
                vary_button = gr.Button("Vary the chosen image", elem_id="vary")
                vary_status = gr.Markdown("", elem_id="vary_status")
            with gr.Column(**wide):
                varied = add_gallery(gr, "variations")

        def draw_event(label, first_seed, images, cfg, guidance, steps, solver, precision):
            values = label, first_seed, images, cfg, guidance, steps, solver, precision
            yield from run_in_background(gr, lambda text: {status: text}, events.draw, values)

        def vary_event(drawing, keep, count):
            yield from run_in_background(gr, lambda text: {vary_status: text}, events.vary, drawing, keep, count)

        def choose_event(drawing, event: gr.SelectData):
            return events.choose(drawing, event.index)

        def pick_event(drawing, event: gr.SelectData):
            return events.pick(drawing, event.index)

        chosen = [strip, grown, varied, varied_title, save]
        alone, private = dict(concurrency_id="model", concurrency_limit=1), dict(api_visibility="private")
        draws = draw_button.click(draw_event, form, [drawing, gallery, status, *chosen], show_progress_on=gallery,
                                  api_name="draw", **alone)
        gallery.select(choose_event, drawing, [drawing, *chosen], show_progress_on=strip, **private, **alone)
        varies = vary_button.click(vary_event, [drawing, keep, count], [drawing, varied, vary_status],
                                   show_progress_on=varied, api_name="vary", **alone)
        varied.select(pick_event, drawing, save, show_progress="hidden", **private, **alone)
        cancel_button.click(lambda: ("", ""), None, [status, vary_status], cancels=[draws, varies], queue=False,
                            show_progress="hidden", **private)
    return page.queue(default_concurrency_limit=1)


# ---- the program ---------------------------------------------------------------------------------------------


def page_parser():
    parser = make_parser(SamplingOptions, __doc__.splitlines()[0])
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: open to the whole network")
    add("--port", type=int, help="port of the page; default: the first free one from 7860")
    return parser


def parse_args():
    """(options, those words of the command line that scripts/sample.py takes too)."""
    args = page_parser().parse_args()
    own = Parser(None)
    own.add_argument("--host"), own.add_argument("--port")
    _, words = own.parse_known_args()
    if not args.resume:
        args.resume, words = DEMO, ["--resume", DEMO, *words]
    return args, words


def open_for_page(args):
    """The Pipeline in the precision of the options, with weights that are not rounded: any other can be chosen."""
    device = select_device(args.device)
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")  # as in open_for_sampling
    options = replace(take_options(SamplingOptions, args), precision="fp32")
    return open_pipeline(options, device, identify=True).using(precision)


def serve(args, pipe, words, folder):
    """Until Ctrl-C or SIGTERM. folder: for all files of the page."""
    for name in list(os.environ):  # a proxy would stand between gradio and its own page, and the model is there
        if name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(GRADIO_TEMP_DIR=f"{folder}/gradio", GRADIO_ANALYTICS_ENABLED="False")
    page = build_page(pipe, args.resume, words, folder)
    from gradio.themes import Default
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is loaded
    css = STYLE + WHOLE_PIXELS * (pipe.sampler.model.img_size < 128)
    page.launch(server_name=args.host, server_port=args.port, share=False, quiet=True, ssr_mode=False, show_error=True,
                theme=theme, css=css, prevent_thread_lock=True)
    print(f"running at {page.local_url} (Ctrl-C to stop)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


def main():
    args, words = parse_args()
    if importlib.util.find_spec("gradio") is None:
        raise FlowARError("scripts/app.py needs gradio: run pip install gradio")
    pipe = open_for_page(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="flowar-page-", ignore_cleanup_errors=True) as folder:
        serve(args, pipe, words, folder)
    os._exit(0)  # the usual way out would tear the interpreter down under a drawing


if __name__ == "__main__":
    run_main(main)
