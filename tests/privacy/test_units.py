"""A user's records are one unit: sampled together, averaged, and clipped once.

The attacker is the server. It sees every release, chooses arrays and configuration, and may know
all records of all other users. Sums are compared with loops over users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from torch import Tensor

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.sections import PrivacySection
from fedlora_flwr.config.unit import USER
from fedlora_flwr.data.records import Batch, TensorRecords
from fedlora_flwr.data.users import count_units, numbered_users
from fedlora_flwr.errors import InvalidValue, PrivacyViolation
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.privacy.units import Units
from fedlora_flwr.randomness import RandomStream
from fedlora_flwr.tasks.views import Losses
from tests.models import (
    FAMILIES,
    PLAIN_SGD,
    VIT,
    Family,
    active,
    engine_of,
    joint_norm,
    loop_gradients,
    values,
)

C = 0.05
USERS = np.array([3, 0, 3, 1, 0, 3, 2, 3])
"""The user of each of eight records; user 3 has four of them."""


def of_users(family: Family, users: np.ndarray = USERS) -> TensorRecords:
    records = family.records(len(users))
    return TensorRecords(records.batch(torch.arange(len(users))), users=users)


def units_of(records: TensorRecords, most: int = 100) -> Units:
    return Units.of(PrivacySection(unit=USER, max_records_per_user=most), records)


def moved(
    engine: PrivateEngine,
    records: TensorRecords,
    joined: Sequence[int],
    most: int = 100,
    clip: float = C,
    exact: bool = False,
) -> dict[str, Tensor]:
    """Return by how much one step without noise moves the arrays, which it then puts back."""
    units, names = units_of(records, most), active(engine.adapted, "*")
    sample, owners = units.sample(torch.tensor(joined, dtype=torch.int64), RandomStream(5))
    engine.start_round(
        Mechanism(0.0, clip, 1, len(units), unit=USER), PLAIN_SGD, SeededNoise(0), exact=exact
    )
    before = values(engine.adapted)
    engine.step(records, sample, names, owners)
    found = {name: values(engine.adapted)[name] - before[name] for name in names}
    with torch.no_grad():
        for name, start in before.items():
            engine.adapted.parameters[name].copy_(start)
    return found


def by_loop(
    family: Family, records: TensorRecords, joined: Sequence[int], clip: float = C
) -> dict[str, Tensor]:
    """Compute the same with PEFT alone: a loop over users, with a gradient for each record."""
    total: dict[str, Tensor] = {}
    for user in joined:
        own = np.flatnonzero(records.users == user).tolist()
        gradients = loop_gradients(family, family.plain(), records, own)
        means = {name: gradient.mean(dim=0) for name, gradient in gradients.items()}
        factor = min(1.0, clip / joint_norm(means.values()))
        for name, mean in means.items():
            total[name] = total.get(name, torch.zeros_like(mean)) - factor * mean
    return total


@pytest.mark.parametrize(
    ("family", "microbatch", "exact"),
    [(VIT, None, False), (VIT, 3, True), *((family, 2, False) for family in FAMILIES)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_step_is_the_sum_of_the_clipped_means_of_users(
    family: Family, microbatch: int | None, exact: bool
) -> None:
    records, engine = of_users(family), engine_of(family, microbatch=microbatch)

    # One clip norm that cuts every user, and one that cuts none.
    for clip in (C, 1e3):
        found = moved(engine, records, [0, 2, 3], clip=clip, exact=exact)
        expected = by_loop(family, records, [0, 2, 3], clip)
        for name, mean in found.items():
            torch.testing.assert_close(mean, expected[name], rtol=1e-5, atol=1e-9)


def test_a_user_with_a_thousand_records_moves_the_sum_by_at_most_c() -> None:
    users = np.repeat([0, 1, 2], [1, 2, 1000])
    records, engine = of_users(VIT, users), engine_of(VIT, microbatch=64)

    for most in (1, 16, 1000):
        with_user = moved(engine, records, [0, 1, 2], most)
        without = moved(engine, records, [0, 1], most)

        influence = joint_norm(with_user[name] - without[name] for name in without)
        assert influence <= C * (1 + 1e-6)
        # Attained, so that the bound says something.
        assert influence == pytest.approx(C, rel=1e-3)


def test_data_that_differ_in_one_users_records_differ_by_that_user_alone() -> None:
    # User 2 is last, first with one record and then with five others.
    engine, five = engine_of(VIT, microbatch=2), of_users(VIT, np.array([0, 0, 0, 1, 2, *[2] * 4]))
    one = TensorRecords(five.batch(torch.arange(5)), users=np.array([0, 0, 0, 1, 2]))

    # User 0 has three records and may use two. It draws the same two, whoever joins beside it.
    sums = [moved(engine, records, [0, 1, 2], most=2) for records in (one, five)]

    without = moved(engine, one, [0, 1], most=2)
    assert joint_norm(sums[0][name] - sums[1][name] for name in without) > 0
    for found in sums:
        assert joint_norm(found[name] - without[name] for name in without) <= C * (1 + 1e-6)


def test_a_record_that_is_not_finite_costs_its_own_user_alone() -> None:
    records = of_users(VIT)
    batch = {name: tensor.clone() for name, tensor in records.batch(torch.arange(8)).items()}
    batch["image"][5] = float("inf")  # A record of user 3.
    engine = engine_of(VIT)

    found = moved(engine, TensorRecords(batch, users=USERS), [0, 1, 3])

    expected = by_loop(VIT, records, [0, 1])
    for name, mean in found.items():
        torch.testing.assert_close(mean, expected[name], rtol=1e-5, atol=1e-9)


def test_passes_of_an_untrusted_round_do_not_tell_how_many_records_a_user_has() -> None:
    # The server may amplify last bits, and the number of rows in a product decides them.
    seen: list[int] = []
    for users in (np.array([0, 0, 1, 2]), np.array([0, 0, 1, *[2] * 9])):
        engine = engine_of(VIT)

        def noted(model: torch.nn.Module, batch: Batch, losses: Losses = engine._losses) -> Tensor:
            seen.append(len(batch["image"]))
            return losses(model, batch)

        records = of_users(VIT, users)
        engine.verify(records)
        engine._losses = noted
        units = units_of(records)
        sample, owners = units.sample(torch.arange(3), RandomStream(5))
        mechanism = Mechanism(0.0, C, 2, 3, unit=USER)
        engine.start_round(mechanism, PLAIN_SGD, SeededNoise(0), exact=True)
        engine.step(records, sample, active(engine.adapted, "*"), owners)

    assert len(seen) > 2
    assert set(seen) == {2}


def test_owners_are_needed_where_the_unit_is_a_user_and_only_there() -> None:
    records, engine = of_users(VIT), engine_of(VIT)
    names, own = active(engine.adapted, "*"), torch.arange(2)

    for unit, owners in ((USER, None), ("record", own)):
        engine.start_round(Mechanism(0.0, C, 1, 4, unit=unit), PLAIN_SGD, SeededNoise(0))
        with pytest.raises(PrivacyViolation, match=f"unit is a {unit}"):
            engine.step(records, own, names, owners)


def test_users_join_a_step_with_probability_q_however_many_records_they_have() -> None:
    users = np.repeat([0, 1, 2, 3], [1, 1, 1, 500])
    units = units_of(TensorRecords({"x": torch.zeros(503, 1)}, users=users), most=7)
    mechanism, steps = Mechanism(1.0, 1.0, 1, len(units), unit=USER), 4000
    times, draws = np.zeros(4), RandomStream(2)

    for joined in poisson_batches(mechanism, steps, seed=1):
        records, owners = units.sample(joined, draws)
        assert owners is not None
        counts = np.bincount(users[records.numpy()], minlength=4)
        times += counts > 0
        assert counts.max(initial=0) <= 7
        assert len(np.unique(records)) == len(records)

    # Four standard deviations of a binomial with q = 1/4.
    assert np.abs(times - steps / 4).max() < 4 * np.sqrt(steps * 0.25 * 0.75)


def test_a_user_with_too_many_records_takes_part_with_others_in_each_step() -> None:
    units = units_of(TensorRecords({"x": torch.zeros(30, 1)}, users=np.zeros(30, int)), most=3)
    draws = RandomStream(3)

    found = [units.sample(torch.tensor([0]), draws).records.tolist() for _ in range(60)]

    # A fixed choice would train on 3 of 30 records. Here each record takes part at some time.
    assert {len(chosen) for chosen in found} == {3}
    assert len({record for chosen in found for record in chosen}) == 30


def test_noise_is_made_for_the_number_of_users() -> None:
    config = RunConfig(
        unit=USER, epsilon=2, delta=1e-4, batch_size=10, num_rounds=20, local_steps=2
    )

    mechanism = calibrated_mechanism(config, 200)

    assert (mechanism.sample_rate, mechanism.unit) == (10 / 200, USER)
    assert mechanism == replace(
        calibrated_mechanism(replace(config, unit="record"), 200), unit=USER
    )
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    step = dp_event.GaussianDpEvent(mechanism.noise_multiplier)
    accountant.compose(dp_event.PoissonSampledDpEvent(10 / 200, step), 40)
    assert accountant.get_epsilon(1e-4) == pytest.approx(2, rel=0.02)
    with pytest.raises(InvalidValue, match=r"a client of n = 5 users"):
        calibrated_mechanism(config, 5)
    assert Segment(mechanism.noise_multiplier, mechanism.sample_rate, 40).steps == 40


def test_names_of_users_are_text_or_whole_numbers_and_all_there() -> None:
    assert numbered_users(np.array(["b", "a", "b"], object), "user").tolist() == [1, 0, 1]
    assert numbered_users(np.array([7, 7, 2]), "user").tolist() == [1, 1, 0]
    with pytest.raises(InvalidValue, match="some records have no value there"):
        numbered_users(np.array(["a", None], object), "user")
    for other in (np.array([0.5, 1.0]), np.array([[1], [2]]), np.array([["a"]], object)):
        with pytest.raises(InvalidValue, match="a column of text or of whole numbers"):
            numbered_users(other, "user")
    with pytest.raises(InvalidValue, match="the records of this task name no users"):
        count_units(USER, TensorRecords({"x": torch.zeros(3)}))


def test_the_clip_notices_a_sum_over_records_that_are_clipped_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def each_alone(self: NoisyOptimizer, owners: Tensor, counts: Tensor) -> None:
        rows = self._by_record()[: len(owners)]
        if self.gathered is None:
            self.gathered = rows.new_zeros((0, rows.shape[1]))
        self.gathered = torch.cat([self.gathered, rows])

    monkeypatch.setattr(NoisyOptimizer, "gather", each_alone)
    records, engine = of_users(VIT), engine_of(VIT)

    with_user = moved(engine, records, [0, 3])
    without = moved(engine, records, [0])

    assert joint_norm(with_user[name] - without[name] for name in without) > 1.5 * C
