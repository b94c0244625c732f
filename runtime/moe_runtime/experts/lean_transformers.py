"""transformers' models without what only pictures need."""

import sys


def load_losses_without_scipy() -> None:
    """Load transformers' losses, which every model of it brings along, as if scipy were not installed.

    It is taken for the matching of boxes in object detection: 0.65 s of a processor and 35 MiB in every rank. Routers
    of ours that need scipy import it themselves.
    """
    if "transformers.loss.loss_utils" in sys.modules:
        return
    from transformers import utils

    is_available = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        import transformers.loss.loss_utils  # noqa: F401
    finally:
        utils.is_scipy_available = is_available
