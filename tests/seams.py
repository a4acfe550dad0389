"""The places at which tests step into the programs, each named here and nowhere else."""
import engine_flowar
from models import kernels
from util.evaluation import metrics, sampler, store

STEP = engine_flowar, "forward_and_backward"  # (run, parts) of a step of training -> losses
PREPARED = engine_flowar, "prepare_batch"  # (run, batch, draws, part) -> (latents, labels, draws)
BAD_STEP = engine_flowar, "report_bad_step"
VALIDATION = engine_flowar, "validate"
GRID = sampler.Sampler, "grid"
LATENTS = sampler.Sampler, "pyramid"  # of a batch that is evaluated
DECODED = sampler.Sampler, "decode"  # (sampler, latents) -> (images, finite)
KEPT_BATCH = store.Store, "save"
PNG = store, "write_png"
METRICS = metrics.Measure, "compute"
NPZ = store.Store, "write_npz"
REPORT = store.Store, "finish"
REMOVAL = store.Store, "close"
RECOMPUTED = kernels, "checkpoint"  # of a block


def wrap(monkeypatch, seam, around):
    """Put around(original, *args) in the place of a seam."""
    owner, name = seam
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: around(original, *args, **options))


def count(monkeypatch, seam):
    """A list that grows with every call."""
    calls = []
    wrap(monkeypatch, seam, lambda original, *args, **options: calls.append(1) or original(*args, **options))
    return calls


def interrupt(monkeypatch, seam, calls=0):
    """Stop the program at call number `calls`, before it does anything."""
    seen = []

    def around(original, *args, **options):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return original(*args, **options)

    wrap(monkeypatch, seam, around)
