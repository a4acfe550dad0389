"""Report a non-finite step on rank 0, with the images that may cause it."""
import math

from util.cluster import gather_to_main


def report_bad_step(logger, step, numbers, latents, images):
    """Log a step that was skipped. numbers: (gradient norm, loss, this rank's loss, bad steps in a row); latents: of
    this rank's forward passes; images: this rank's, as indices in the training set. All ranks call it.
    """
    norm, loss, own_loss, in_a_row = numbers
    finite = [row.isfinite().all().item() for part in latents for row in part]
    bad_images = [image for image, good in zip(images, finite) if not good]
    of_ranks = gather_to_main((own_loss, bad_images, images))
    if of_ranks is None:
        return
    cause, rank = "the gradient is not finite, the loss of every rank is", None
    for number, (own_loss, bad_images, images_of_rank) in enumerate(of_ranks):
        if bad_images or not math.isfinite(own_loss):
            rank, images = number, bad_images or images_of_rank
            what = "non-finite latents," if bad_images else f"loss {own_loss},"
            cause = f"rank {rank} has {what} images {', '.join(map(str, images[:8]))}"
            break
    logger.event("bad_step", step, f"skipped: loss {loss}, gradient norm {norm}; {cause}",
                 rank=rank, images=images, in_a_row=in_a_row)
