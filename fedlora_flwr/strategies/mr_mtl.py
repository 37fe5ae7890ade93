"""MR-MTL: each client keeps its own model, which is pulled to the mean (arXiv 2206.07902)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora_flwr.config.keys import between
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import B, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.declared import setting
from fedlora_flwr.wire import OWN
from fedlora_flwr.wire.order import Order


@dataclass(frozen=True)
class PullSettings:
    """How far clients' own models may be from their mean."""

    pull: float = setting(
        0.1, between(0, 1e3), "strength λ of the pull to the mean model; 0 = each client alone"
    )


class MRMTL(FedLoRA):
    """Train a model of its own on each client, and pull it to the mean of all by ``λ (w - w̄)``.

    A round starts from the client's own B and head of its last round, and each local step is
    ``w ← w - η (g + λ (w - w̄))``. The noisy gradient g is made as in every method. The pull is
    added after the noise and reads released arrays only, so it costs no privacy. The mean w̄ is that
    of the last round's uploads. A client without a model of its own starts from w̄.

    A stays at its shared start, as in FFA-LoRA. The model is then linear in what trains, so w̄ is
    the mean of the models and not only of their factors. Source: arXiv 2206.07902, Algorithm 1.

    Parameters
    ----------
    pull : float (default: 0.1)
        λ. With plain SGD, keep η λ well below 1 for each learning rate η; steps diverge from
        ``η λ = 2`` on.
    **kwargs
        Those of `FedLoRA`.

    Examples
    --------
    >>> strategy = MRMTL(pull=0.5)
    >>> strategy.personal, strategy.order(1, "B").proximal_mu
    (True, 0.5)
    """

    name: ClassVar[str] = "mr-mtl"
    settings: ClassVar[type] = PullSettings
    pull: float

    own_models: ClassVar[bool] = True
    paper: ClassVar[tuple[str, ...]] = (
        "On Privacy and Personalization in Cross-Silo Federated Learning",
        "2206.07902",
    )

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Train B in every round."""
        return ComponentPlan.uniform(B)

    def order(self, server_round: int, plan: str = "") -> Order:
        """Let clients start from their own models, and pull those that train to the mean."""
        order = super().order(server_round, plan)
        return replace(order, start_from=OWN, proximal_mu=self.pull if plan else 0.0)
