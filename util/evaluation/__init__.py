"""Sampling, metrics, references, what an evaluation keeps, reports, pictures; the door from Python: load_pipeline."""


def __getattr__(name):
    if name != "load_pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from util.evaluation.pipeline import load_pipeline  # not before: util.options, which it needs, imports from here
    return load_pipeline
