"""The units of a client's data that join private steps: its records, or its users.

The promise of ``unit = "user"`` is for all records that one user has on one client. The attacker is
the server, which sees every release, chooses the arrays, and may know all records of all other
users. A step samples *users*, each with probability q. A sampled user contributes the mean gradient
of at most ``max-records-per-user`` of its records, and this mean is clipped to C once. So a user
moves the sum by C at most, with any number of records, as a record does under ``unit = "record"``:
noise, accountant and ledger count users in place of records, and nothing else changes.

*Which records of a user count.* They are drawn afresh for each step, without replacement. The bound
C holds for any choice, so the choice costs no ε. A choice that is fixed for a run would be as
private, but it would never train on a user's other records, and a device would have to keep it on
its disk, since each message may meet a new process. The mean over a fresh choice is, before the
clip, an unbiased estimate of the user's own mean gradient.

*What a user's records do to other users.* Nothing. Each sampled user takes one number from the
stream that draws records, however many records it has, so the draws of others stay the same.
Passes of an untrusted round are filled up to a fixed number of records (see
`fedlora_flwr.privacy.microbatches.PassPlan`).

*What does not hold.* A user without a gradient is the neighbor, so the number of users is public.
If one record of a user changes, its clipped mean may turn around: that is a change by 2C, and as
likely as e^(2ε). The time of a step tells how many records took part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.config.sections import PrivacySection
from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.data.users import required_users

if TYPE_CHECKING:
    from fedlora_flwr.data.records import Records
    from fedlora_flwr.randomness import RandomStream


class Sample(NamedTuple):
    """The records of the units that joined a step.

    Parameters
    ----------
    records : Tensor
        Positions of the records, int64, shape (n,), each at most once.
    owners : Tensor or None
        The unit of each record, as a number from 0, int64, shape (n,), ascending. None if each
        record is a unit.
    """

    records: Tensor
    owners: Tensor | None = None

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unit of each record, and how many records of the sample each unit has.

        Parameters
        ----------
        positions : Tensor
            Some of ``records`` in any order, int64, shape (n,).

        Returns
        -------
        tuple[Tensor, Tensor]
            Units, int64, shape (n,), and numbers of records, int64, shape (units,).
        """
        assert self.owners is not None
        order = torch.argsort(self.records)
        places = torch.searchsorted(self.records[order], positions)
        return self.owners[order][places], torch.bincount(self.owners)

    def split(self, most: int | None) -> Iterator[Sample]:
        """Cut the sample into samples of at most ``most`` units; a unit stays whole.

        Parameters
        ----------
        most : int or None
            Largest number of units in a part; None for all in one part.
        """
        if self.owners is None or most is None or not len(self.owners):
            yield self
            return
        parts = self.owners // most
        sizes = torch.bincount(parts).tolist()
        found = zip(torch.split(self.records, sizes), torch.split(self.owners, sizes), strict=True)
        for number, (records, owners) in enumerate(found):
            yield Sample(records, owners - number * most)


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one client's data.

    Parameters
    ----------
    groups : Sequence of NDArray[np.int64], or None
        Positions of each user's records, by user. None if each record is a unit.
    count : int
        n, the number of units, which is public.
    most : int
        Largest number of records of a user in a step.

    Examples
    --------
    >>> from fedlora_flwr import TensorRecords
    >>> from fedlora_flwr.randomness import RandomStream
    >>> users = np.array([0, 1, 0, 2])
    >>> records = TensorRecords({"x": torch.zeros(4, 1)}, users=users)
    >>> units = Units.of(PrivacySection(unit="user"), records)
    >>> len(units), units.sample(torch.tensor([0, 2]), RandomStream(1)).records.tolist()
    (3, [0, 2, 3])
    """

    groups: list[NDArray[np.int64]] | None
    count: int
    most: int

    @classmethod
    def of(cls, config: PrivacySection, records: Records) -> Units:
        """Return the units of a client's records.

        Parameters
        ----------
        config : PrivacySection
            Its ``unit`` and ``max_records_per_user``.
        records : Records
            The records; for users they carry ``users`` (see `fedlora_flwr.data.users`).

        Raises
        ------
        InvalidValue
            The promise is for users, and the records do not name theirs.
        """
        if config.unit == RECORD:
            return cls(None, len(records), 1)
        users = required_users(records)
        order = np.argsort(users, kind="stable")
        cuts = np.flatnonzero(np.diff(users[order])) + 1
        groups = np.split(order, cuts) if len(order) else []
        return cls(groups, len(groups), config.max_records_per_user)

    def __len__(self) -> int:
        return self.count

    def sample(self, joined: Tensor, stream: RandomStream) -> Sample:
        """Return the records with which sampled units take part in a step.

        Parameters
        ----------
        joined : Tensor
            The sampled units, int64, shape (k,), from `poisson_batches`.
        stream : RandomStream
            Draws which records of a user with too many count.

        Returns
        -------
        Sample
            All records of a user, or ``most`` of them at random.
        """
        if self.groups is None:
            return Sample(joined)
        found = [self.groups[user] for user in joined.tolist()]
        # One seed for each user, also for those that need none: see the module's docstring.
        seeds = stream.generator.integers(2**63, size=len(found))
        chosen = [
            group
            if len(group) <= self.most
            else np.sort(np.random.default_rng(seed).choice(group, self.most, replace=False))
            for group, seed in zip(found, seeds, strict=True)
        ]
        owners = np.repeat(np.arange(len(chosen)), [len(group) for group in chosen])
        records = np.concatenate([np.empty(0, np.int64), *chosen])
        return Sample(torch.from_numpy(records), torch.from_numpy(owners.astype(np.int64)))


def add_up(rows: Tensor, owners: Tensor, counts: Tensor, sums: Tensor) -> None:
    """Add the gradients of records to the mean gradients of their units.

    Each row is added to the row of its own unit only. A product of matrices would multiply the rows
    of other units by zero, and so spread an infinite gradient of one unit over all of them.

    Parameters
    ----------
    rows : Tensor
        Gradients by record, shape (n, D).
    owners : Tensor
        The unit of each row, int64, shape (n,).
    counts : Tensor
        Number of records of each unit in the step, int64, shape (k,).
    sums : Tensor
        The mean gradients so far, shape (k, D). It is written to.

    Examples
    --------
    >>> sums = torch.zeros(2, 1)
    >>> owners, counts = torch.tensor([0, 1, 1]), torch.tensor([1, 2])
    >>> add_up(torch.tensor([[5.0], [2.0], [4.0]]), owners, counts, sums)
    >>> sums.tolist()
    [[5.0], [3.0]]
    """
    owners = owners.to(rows.device)
    shares = 1 / counts.to(rows.device)[owners].to(rows.dtype)
    sums.index_add_(0, owners, rows * shares[:, None])
