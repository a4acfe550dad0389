"""A step that is not finite, told on rank 0 with the images that may be the cause."""
import math

from util.cluster import gather_to_main


def report_bad_step(logger, step, numbers, latents, images):
    """Log a step that was skipped. numbers: (gradient norm, loss, this rank's loss, bad steps in a row); latents: of
    this rank's forward passes; images: this rank's, as indices in the training set. All ranks call it.
    """
    norm, loss, own, in_a_row = numbers
    bad_latents = []
    for part, values in enumerate(latents):
        bad_rows = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        bad_latents += [images[part * len(values) + row] for row in bad_rows]
    of_ranks = gather_to_main((own, bad_latents, images))
    if of_ranks is None:
        return
    cause, rank = "its gradient, not the loss of any rank", None
    for number, (own, bad_latents, images_of_rank) in enumerate(of_ranks):
        if bad_latents or not math.isfinite(own):
            rank, images = number, bad_latents or images_of_rank
            what = "latents that are not finite," if bad_latents else f"loss {own},"
            cause = f"rank {rank} has {what} images {', '.join(map(str, images[:8]))}"
            break
    logger.event("bad_step", step, f"skipped: loss {loss}, gradient norm {norm}; {cause}",
                 rank=rank, images=images, in_a_row=in_a_row)
