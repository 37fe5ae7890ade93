"""Flower's own strategies, as baselines: clients train privately, Flower's class aggregates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config.keys import above, between
from fedlora_flwr.layout import is_folded
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.declared import setting
from fedlora_flwr.strategies.replies import Upload, to_record
from fedlora_flwr.wire import ARRAYS, METRICS, NUM_EXAMPLES, PROXIMAL
from fedlora_flwr.wire.arrays import to_numpy
from fedlora_flwr.wire.order import Order


class FlowersStrategy(FedLoRA):
    """Let a strategy of Flower's aggregate what clients upload; the rest is as for all methods.

    Plan, cohort, checks of uploads and ledger watch are those of `FedLoRA`, so a comparison differs
    in the aggregation alone. Flower's class sees uploads, which are released already, so it costs
    no privacy. A subclass names the class; its settings are that class's own, with its defaults.

    Attributes
    ----------
    flowers : type
        The class of Flower's.
    carried : tuple[str, ...]
        Attributes in which it keeps arrays from one round to the next.
    """

    flowers: ClassVar[type[flower.FedAvg]] = flower.FedAvg
    carried: ClassVar[tuple[str, ...]] = ()
    averages: ClassVar[bool] = False
    needs_each_upload: ClassVar[bool] = False

    def begin(self) -> None:
        """Make a new object of Flower's class."""
        super().begin()
        own = {entry.name: getattr(self, entry.name) for entry in fields(self.settings)}
        self._inner = self.flowers(**own)
        # Flower's class notes the arrays but sends nothing: this class draws the cohort.
        self._inner.fraction_train = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Show Flower's class the round's arrays, then send them as every strategy does."""
        self._asks = ConfigRecord()
        if hasattr(self._inner, "current_arrays"):
            # FedAvgM would keep its own arrays between rounds, which are not rounded to fp32.
            self._inner.current_arrays = None
        # Folded pairs travel, but do not train. Flower's classes expect all arrays in an upload.
        training = ArrayRecord({n: array for n, array in arrays.items() if not is_folded(n)})
        self._inner.configure_train(server_round, training, self._asks, grid)
        return super().configure_train(server_round, arrays, config, grid)

    def order(self, server_round: int, plan: str = "") -> Order:
        """Add what Flower's class asks of clients that train."""
        order = super().order(server_round, plan)
        if plan and PROXIMAL in self._asks:
            return replace(order, proximal_mu=float(str(self._asks[PROXIMAL])))
        return order

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Hand the uploads over, with their weights as numbers of examples."""
        replies = [
            Message(
                RecordDict(
                    {
                        ARRAYS: to_record(upload.arrays),
                        METRICS: MetricRecord({NUM_EXAMPLES: upload.weight}),
                    }
                ),
                dst_node_id=1,
                message_type=MessageType.TRAIN,
            )
            for upload in uploads
        ]
        arrays, _ = self._inner.aggregate_train(server_round, replies)
        return {**current, **{name: to_numpy(array) for name, array in (arrays or {}).items()}}

    @property
    def streams(self) -> bool:
        """Never: Flower's class adds the uploads up itself."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Add what Flower's class carries."""
        carried = {name: _plain(getattr(self._inner, name)) for name in self.carried}
        return {**super().state_dict(), "flowers": carried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also restore what Flower's class carries."""
        super().load_state_dict(state)
        for name, value in state["flowers"].items():
            setattr(self._inner, name, value)


def _plain(value: Any) -> Any:
    """Copy the containers, which Flower's classes change in place."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else value


class FedAvg(FlowersStrategy):
    """Average all arrays (arXiv 1602.05629); DP-LoRA, but in Flower's own arithmetic.

    Examples
    --------
    >>> from fedlora_flwr.wire.identity import acting_for
    >>> uploads = [Upload(str(x), {"w": np.array([x])}, 1.0, {}) for x in (1.0, 3.0)]
    >>> with acting_for(1):  # As in the process of a server.
    ...     FedAvg().aggregate(1, {"w": np.zeros(1)}, uploads)["w"].tolist()
    [2.0]
    """

    averages: ClassVar[bool] = True


@dataclass(frozen=True)
class ProximalSettings:
    """How far clients may drift."""

    proximal_mu: float = setting(
        0.0, between(0, 1e3), "strength of the pull towards the global arrays; 0 = FedAvg"
    )


class FedProx(FlowersStrategy):
    """Average all arrays; clients are pulled towards the global ones (arXiv 1812.06127).

    The pull is added to the gradient after its noise, from arrays that the server knows, so it
    costs no privacy.
    """

    name: ClassVar[str] = "fedprox"
    flowers: ClassVar[type[flower.FedAvg]] = flower.FedProx
    settings: ClassVar[type] = ProximalSettings
    averages: ClassVar[bool] = True


@dataclass(frozen=True)
class MomentumSettings:
    """The server's step."""

    server_learning_rate: float = setting(1.0, above(0), "learning rate of the server's step")
    server_momentum: float = setting(
        0.0, between(0, 1), "momentum of the server's step; 0 with learning rate 1 = FedAvg"
    )


class FedAvgM(FlowersStrategy):
    """Step along the mean update with momentum (arXiv 1909.06335)."""

    name: ClassVar[str] = "fedavgm"
    flowers: ClassVar[type[flower.FedAvg]] = flower.FedAvgM
    settings: ClassVar[type] = MomentumSettings
    carried: ClassVar[tuple[str, ...]] = ("momentum_vector",)


@dataclass(frozen=True)
class AdagradSettings:
    """The server's adaptive step."""

    eta: float = setting(0.1, above(0), "learning rate of the server's step")
    tau: float = setting(1e-3, above(0), "number added to the square root of the second moment")


@dataclass(frozen=True)
class AdamSettings(AdagradSettings):
    """The server's adaptive step with moving averages."""

    beta_1: float = setting(0.9, between(0, 0.9999), "decay of the first moment")
    beta_2: float = setting(0.99, between(0, 0.9999), "decay of the second moment")


@dataclass(frozen=True)
class YogiSettings(AdamSettings):
    """As of Adam, with the rate that Flower has for Yogi."""

    eta: float = setting(0.01, above(0), "learning rate of the server's step")


class _Adaptive(FlowersStrategy):
    carried: ClassVar[tuple[str, ...]] = ("m_t", "v_t")


class FedAdagrad(_Adaptive):
    """Step by Adagrad on the mean update (arXiv 2003.00295)."""

    name: ClassVar[str] = "fedadagrad"
    flowers: ClassVar[type[flower.FedAvg]] = flower.FedAdagrad
    settings: ClassVar[type] = AdagradSettings


class FedAdam(_Adaptive):
    """Step by Adam on the mean update (arXiv 2003.00295)."""

    name: ClassVar[str] = "fedadam"
    flowers: ClassVar[type[flower.FedAvg]] = flower.FedAdam
    settings: ClassVar[type] = AdamSettings


class FedYogi(_Adaptive):
    """Step by Yogi on the mean update (arXiv 2003.00295)."""

    name: ClassVar[str] = "fedyogi"
    flowers: ClassVar[type[flower.FedAvg]] = flower.FedYogi
    settings: ClassVar[type] = YogiSettings
