"""A whole model made faster, in place: its results stay the same."""
import torch
from torch import nn

from models.kernels import Linear

# Older ones trace for all threads: what runs beside the sampling cannot be compiled there. Not every version was tried.
THREADS_TRACE_ALONE = torch.__version__ >= (2, 14)


def for_sampling(model, dtype=None):
    """Make a FlowAR one that only samples, in place: what autocast to `dtype` and padding do to the weights at every
    call is done once. The results are the same; the weights are no longer to be trained or saved.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear) and module.pad:
            module.widen()
        if isinstance(module, nn.Linear) and dtype is not None:
            module.to(dtype)
    return model


def compile_training(model):
    """torch.compile of every block of a FlowAR, one graph a kind of block, however many there are, and of the small
    parts around them. With use_checkpoint PyTorch before 2.10 compiles no block.
    """
    torch._dynamo.config.cache_size_limit = 64  # graphs of a function: network and EMA, training and sampling share it
    head = model.flownet
    for part in (*model.blocks, *head.res_blocks, model.z_proj_ln, model.encoder_norm, model.decoder_norm,
                 head.time_embed, head.final_layer):
        part.compile()


def compile_sampling(model, what="blocks"):
    """torch.compile of the flow head in sampling: of its blocks and last layer, once for all scales and batch sizes, or
    with "graphs" of the whole head with CUDA graphs, for small batches.
    """
    if what == "graphs":
        model.flownet.compile(dynamic=True, mode="reduce-overhead")
    else:
        for part in (*model.flownet.res_blocks, model.flownet.final_layer):
            part.compile(dynamic=True)


def compile_decoding(vae):
    """torch.compile of a VAE's decoder, in place: once for all batch sizes, on CUDA as channels_last. Elsewhere, and
    eagerly, that is slower (docs/measurements.md, H200).
    """
    decoder = getattr(getattr(vae, "network", vae), "decoder", None)  # network: of diffusers
    if isinstance(decoder, nn.Module) and may_compile_in_thread(decoder):
        if next(decoder.parameters()).is_cuda:
            decoder.to(memory_format=torch.channels_last)
        decoder.compile(dynamic=True)


def may_compile_in_thread(module):
    """Whether a module that runs beside the sampling may be compiled; on a CPU it runs after it."""
    return THREADS_TRACE_ALONE or not any(tensor.is_cuda for tensor in module.state_dict().values())


def compile_features(extractor):
    """torch.compile of the feature networks of an evaluation (extractors.Joint), in place: their features are those of
    before but for rounding, 2e-7 to 1e-6 (docs/measurements.md, Precision).
    """
    for part in extractor.parts:
        if may_compile_in_thread(part.network):
            part.forward = torch.compile(part.forward, dynamic=True)


def for_evaluation(models, vae, dtype=None, what=None):
    """FlowARs that only sample and a VAE that only decodes, in place; what: as compile_sampling has it."""
    for model in models:
        for_sampling(model, dtype)
        if what:
            compile_sampling(model, what)
    if what:
        compile_decoding(vae)
