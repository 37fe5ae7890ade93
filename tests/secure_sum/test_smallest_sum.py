"""What a server that tells each client something else can open, by integer programming.

This knows the protocol's rules alone, and not the argument in `fedlora_flwr.secure_sum.party`.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import lil_array  # type: ignore[import-untyped]

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.cohort import check_dropouts, honest_shares


def smallest_sum(cohort: int, dropouts: int, colluding: int) -> int:
    """Return the fewest honest clients whose sum a server can learn, 0 where it learns none.

    For each two honest clients i and j: whether i got j's shares, and whether it gave its share of
    j's seed or of j's key. For each client: whether the server knows its seed, whether its key, and
    whether it is in the sum. Colluding clients give everything, twice.
    """
    honest, threshold = cohort - colluding, cohort - dropouts
    places: dict[tuple[str, int, int], int] = defaultdict(lambda: len(places))
    rows: list[tuple[dict[int, float], float, float]] = []

    def at(kind: str, i: int, j: int = 0) -> int:
        return places[kind, i, j]

    everyone = range(honest)
    for i in everyone:
        rows.append(({at("got", i, i): 1, at("seed", i, i): 1}, 2, 2))
        alive = {at("seed", i, j): 1.0 for j in everyone}
        rows.append((alive, threshold - colluding, np.inf))
        for kind, knows in (("seed", "seed-known"), ("key", "key-known")):
            given = {at(kind, j, i): 1.0 for j in everyone}
            rows.append(({**given, at(knows, i): -(threshold - colluding)}, 0, np.inf))
        rows.append(({at("in", i): 1, at("seed-known", i): -1}, -np.inf, 0))
        for j in everyone:
            rows.append(({at("seed", i, j): 1, at("key", i, j): 1, at("got", i, j): -1}, 0, 0))
            if i == j:
                continue
            # The mask that i adds for j goes away with j's, or is known.
            free = {at("key-known", j): -1.0, at("key-known", i): -1.0}
            rows.append(({at("in", i): 1, at("in", j): -1, at("got", i, j): 1, **free}, -np.inf, 1))
            both = {at("in", i): 1.0, at("in", j): 1.0, at("got", i, j): 1.0, at("got", j, i): -1.0}
            rows.append(({**both, **free}, -np.inf, 2))
    rows.append(({at("in", i): 1.0 for i in everyone}, 1, np.inf))
    matrix = lil_array((len(rows), len(places)))
    for row, (entries, _, _) in enumerate(rows):
        for column, value in entries.items():
            matrix[row, column] = value
    low, high = zip(*((low, high) for _, low, high in rows), strict=True)
    cost = np.array([kind == "in" for kind, _, _ in places], float)
    found = milp(
        cost,
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
    )
    return round(found.fun) if found.success else 0


@pytest.mark.parametrize(
    ("cohort", "dropouts", "colluding"), [(2, 0, 0), (4, 1, 0), (5, 1, 1), (6, 1, 1), (9, 2, 0)]
)
def test_no_server_opens_a_smaller_sum_than_the_noise_is_made_for(
    cohort: int, dropouts: int, colluding: int
) -> None:
    found = smallest_sum(cohort, dropouts, colluding)

    assert found == honest_shares(cohort, dropouts, colluding)


@pytest.mark.parametrize(("cohort", "dropouts", "colluding"), [(5, 2, 0), (6, 2, 0), (6, 2, 1)])
def test_with_more_dropouts_a_server_could_and_they_are_refused(
    cohort: int, dropouts: int, colluding: int
) -> None:
    assert smallest_sum(cohort, dropouts, colluding) < cohort - dropouts - colluding
    with pytest.raises(InvalidValue, match="may open the sum of fewer clients"):
        check_dropouts(cohort, dropouts, colluding)
