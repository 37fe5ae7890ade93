"""Which arrays a client may upload under a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout, is_shared
from fedlora_flwr.plan import ComponentPlan


@dataclass(frozen=True)
class Expected:
    """The names that an upload may have.

    Parameters
    ----------
    plan : ComponentPlan
        What trains.
    possible : tuple[frozenset[str], ...]
        The names after one step, and after each further one; the whole plan comes last.
    """

    plan: ComponentPlan
    possible: tuple[frozenset[str], ...]

    @classmethod
    def of(cls, layout: Layout, plan: ComponentPlan, shared: str, local_steps: int) -> Expected:
        """Work the names out.

        Parameters
        ----------
        layout : Layout
            The arrays and their blocks.
        plan : ComponentPlan
            What trains.
        shared : str
            What leaves the clients (see `is_shared`).
        local_steps : int
            Steps of a round; 0 where the server does not know.
        """
        # A round with fewer steps than the plan has trains less of it.
        lengths = [local_steps] if local_steps else range(1, len(plan.steps) + 1)
        return cls(
            plan,
            tuple(
                frozenset(name for name in layout.trained(plan, steps) if is_shared(name, shared))
                for steps in lengths
            ),
        )

    @property
    def whole(self) -> frozenset[str]:
        """The names where a round has as many steps as the plan, or more."""
        return self.possible[-1]

    def check(self, arrays: Mapping[str, object]) -> None:
        """Refuse an upload that is not exactly what the plan trains.

        Raises
        ------
        InvalidValue
            It lacks an array, or has one more.
        """
        if arrays.keys() in self.possible:
            return
        wrong = sorted(arrays.keys() ^ self.whole)
        allowed = f"those that {self.plan} trains; wrong: {wrong}. Let the client obey the plan"
        raise InvalidValue("uploaded arrays", sorted(arrays), f"{allowed}, e.g. by follow_plan")
