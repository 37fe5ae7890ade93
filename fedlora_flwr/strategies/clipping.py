"""Which strategies work inside Flower's wrappers for central differential privacy."""

from __future__ import annotations

from collections.abc import Mapping

from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.flower_internals import KEY_CLIPPING_NORM


def check_clipping(config: Mapping[str, object], strategy: str, whole_mean: bool) -> None:
    """Refuse clients' clipping of whole updates where a round is not the mean of whole updates.

    Flower's mods compare an upload with the download array by array, and drop one that holds fewer;
    then its wrapper ends the round without arrays and without an error. And its noise is made for a
    mean, not for what else an aggregation may do with clipped updates.

    Parameters
    ----------
    config : Mapping
        The round's configuration, in which ``DifferentialPrivacyClientSide...Clipping`` writes.
    strategy : str
        Name of the strategy that it wraps.
    whole_mean : bool
        Whether clients upload every array, and the round's result is their mean.

    Raises
    ------
    FederationAborted
        Clients clip whole updates, and the round's result is not the mean of whole updates.
    """
    if KEY_CLIPPING_NORM in config and not whole_mean:
        raise FederationAborted(
            f"Flower's clipping of whole updates does not work on {strategy}, whose round is not "
            "the mean of uploads of every array. Wrap DPLoRA or LALoRA, or use the private step "
            "(LoRAClient), which needs no wrapper."
        )
