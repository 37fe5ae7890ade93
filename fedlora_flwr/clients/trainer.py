"""Local private training, without Flower: from a plan, arrays and records to trained arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.own_project import check_own_project
from fedlora_flwr.config.unit import counted
from fedlora_flwr.data.records import Records
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.lora.compiled import compile_backbone
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.lora.shared_weights import share
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.masks import own_randomness
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedlora_flwr.privacy.postprocessing.filters import make_filter
from fedlora_flwr.privacy.units import Sample, Units
from fedlora_flwr.randomness import RandomStream, stream_seed
from fedlora_flwr.secure_sum.discrete_gaussian import Words, seeded_words, system_words
from fedlora_flwr.secure_sum.grid import Grid, residues
from fedlora_flwr.secure_sum.rounding import rounded
from fedlora_flwr.tasks.registry import Task, build_task
from fedlora_flwr.tasks.views import training_losses
from fedlora_flwr.wire.limits import Residues


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """The result of one client's round.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        The arrays that the plan trained, fp32.
    """

    arrays: dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class LocalTrainer:
    """A model with its private engine, built once per process and used for every client and round.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        The task.
    adapted : AdaptedModel
        The model.
    engine : PrivateEngine
        The private step on that model.
    start : Mapping[str, ndarray]
        The arrays before training, which depend on the seed and not on any record.
    prefix : PrefixCache, optional
        What this process keeps of the layers below the first that trains.

    Examples
    --------
    >>> trainer = LocalTrainer.build(RunConfig(task="digits", device="cpu", local_steps=1))
    >>> records = trainer.task.client_records(0, 10)
    >>> mechanism = Mechanism(1.0, clip_norm=1.0, batch_size=32, num_records=len(records))
    >>> plan = ComponentPlan.parse("B")
    >>> update = trainer.train(trainer.start, plan, records, mechanism, ("client 0", "round 1"))
    >>> next(iter(update.arrays))
    'blocks.0.attn.qkv.lora_B.weight'
    """

    config: RunConfig
    task: Task
    adapted: AdaptedModel
    engine: PrivateEngine
    start: Mapping[str, NDArray[np.float32]]
    prefix: PrefixCache | None = None

    @classmethod
    def build(cls, config: RunConfig, task: Task | None = None) -> LocalTrainer:
        """Build everything that a process needs to train.

        Parameters
        ----------
        config : RunConfig
            The run.
        task : Task, optional
            The task of a project of your own. By default it is the configuration's.

        Raises
        ------
        InvalidValue
            The task or a value cannot be used; or, with a task of your own, a key is set that only
            this package's own ServerApp reads (see `check_own_project`).
        """
        if task is not None:
            check_own_project(config)
        return cls.of(config, build_task(config.task, config) if task is None else task)

    @classmethod
    def of(cls, config: RunConfig, task: Task) -> LocalTrainer:
        """Build the same for a task that the configuration's own run uses."""
        adapted = build_adapted(config, task)
        losses = training_losses(config, task)
        engine = PrivateEngine(adapted, losses, config.microbatch_size or None)
        if config.compile != "none":
            compile_backbone(adapted, config.compile)
        # Views are other pictures in each step, so hardly any would be found again.
        prefix = PrefixCache.of(config, adapted) if config.augmentation == "none" else None
        return cls(config, task, adapted, engine, adapted.read(), prefix)

    @cached_property
    def layout(self) -> Layout:
        """Names of the arrays, in blocks as configured."""
        return Layout.of(self.adapted.parameters, self.config.block_pattern)

    def train(
        self,
        arrays: Mapping[str, NDArray[np.floating]],
        plan: ComponentPlan,
        records: Records,
        mechanism: Mechanism,
        stream: tuple[object, ...],
        untrusted: bool = False,
        server_round: int = 1,
        proximal_mu: float = 0.0,
        own: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> LocalUpdate:
        """Train one client for one round.

        Parameters
        ----------
        arrays : Mapping[str, ndarray]
            All global arrays, including folded pairs. The rank of the factors is the one that
            trains.
        plan : ComponentPlan
            The factors that train at each local step.
        records : Records
            The client's private records.
        mechanism : Mechanism
            The client's mechanism, constant over the run.
        stream : tuple
            Names the random streams of this client and round, e.g. ``(client, round)``.
        untrusted : bool (default: False)
            Whether an untrusted server has chosen the arrays. If so, this round checks again that
            the model treats each record on its own (see `check_apart`), and passes are exact (see
            `PassPlan`). If not, each process makes that check only once.
        server_round : int (default: 1)
            The round, which learning rates may depend on.
        proximal_mu : float (default: 0.0)
            See `fedlora_flwr.wire.order.Order`.
        own : Mapping[str, ndarray], optional
            Arrays of this client's own model, from which training starts. The proximal term still
            pulls to ``arrays``.

        Returns
        -------
        LocalUpdate
            The trained arrays.

        Raises
        ------
        InvalidValue
            The arrays or the plan do not fit the model, or the mechanism does not fit the records.
        PrivacyViolation
            See `PrivateEngine.step`.
        """
        layout, steps = self.layout, self.config.local_steps
        about = stream, untrusted, server_round, proximal_mu, own
        with self._round(arrays, plan, records, mechanism, *about):
            samples = self._samples(records, mechanism, steps, stream)
            for step, (indices, owners) in enumerate(samples, start=1):
                self.engine.step(records, indices, layout.active(plan, step), owners)
        return LocalUpdate(self.adapted.read(layout.trained(plan, steps)))

    def share(
        self,
        arrays: Mapping[str, NDArray[np.floating]],
        plan: ComponentPlan,
        records: Records,
        mechanism: Mechanism,
        grid: Grid,
        stream: tuple[object, ...],
        untrusted: bool = False,
        server_round: int = 1,
    ) -> dict[str, Residues]:
        """Return one client's upload to a secure sum: summed gradients plus its share of noise.

        Parameters
        ----------
        arrays, plan, records, stream, untrusted, server_round
            As for `train`.
        mechanism : Mechanism
            Gives q, n and C. The noise comes from ``grid``.
        grid : Grid
            The round's grid.

        Returns
        -------
        dict[str, ndarray]
            The arrays that train in the plan's first step, by name: whole numbers modulo 2³²,
            uint32. An empty sample gives only noise. The noise is that of *one share*: only a sum
            of ``grid.shares`` uploads is private.

        Raises
        ------
        InvalidValue, PrivacyViolation
            As for `train`.
        """
        with self._round(arrays, plan, records, mechanism, stream, untrusted, server_round):
            ((indices, owners),) = self._samples(records, mechanism, 1, stream)
            total = self.engine.whole_sum(
                records,
                indices,
                self.layout.active(plan, 1),
                lambda rows: rounded(rows, mechanism.clip_norm, grid.norm),
                owners,
            )
        words = self._words(stream)
        return {
            name: residues(part.numpy() + grid.noise(part.numel(), words).reshape(part.shape))
            for name, part in total.items()
        }

    def _samples(
        self, records: Records, mechanism: Mechanism, steps: int, stream: tuple[object, ...]
    ) -> Iterator[Sample]:
        """Draw the records of each step: those of a Poisson sample of records, or of users."""
        units = Units.of(self.config, records)
        if mechanism.unit != self.config.unit or len(units) < mechanism.num_records:
            found = counted(mechanism.num_records, mechanism.unit)
            expected = counted(len(units), self.config.unit)
            raise InvalidValue("mechanism", f"one for {found}", f"a mechanism for up to {expected}")
        draws = RandomStream(self._seed("records of users", stream))
        for joined in poisson_batches(mechanism, steps, self._seed("batches", stream)):
            yield units.sample(joined, draws)

    @contextmanager
    def _round(
        self,
        arrays: Mapping[str, NDArray[np.floating]],
        plan: ComponentPlan,
        records: Records,
        mechanism: Mechanism,
        stream: tuple[object, ...],
        untrusted: bool,
        server_round: int,
        proximal_mu: float = 0.0,  # A secure sum has only one step, in which the pull is zero.
        own: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> Iterator[None]:
        """Load the arrays, check the plan and the model, and give the client its own randomness."""
        self.layout.check_plan(plan)
        self.load(arrays)
        if self.prefix is not None:
            self.prefix.follow(self.layout.trained(plan, self.config.local_steps))
        settings = OptimizerSettings.in_round(self.config, server_round)
        settings = replace(settings, proximal_mu=proximal_mu)
        with one_client(self.config.client_threads, self._seed("dropout", stream)):
            self.engine.start_round(
                mechanism,
                settings,
                self._noise(stream),
                make_filter(self.config.filter),
                exact=untrusted,
            )
            if own:  # The engine has kept the arrays that it pulls to.
                self.adapted.write({**arrays, **own})
            if untrusted:
                self.engine.verify(records)
            with self.engine.training():
                yield

    def load(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Write arrays into the model, which takes on their rank.

        Raises
        ------
        InvalidValue
            Arrays are missing, unknown or of other shapes.
        """
        if missing := set(self.layout.names) - set(arrays):
            raise InvalidValue("arrays", sorted(arrays), f"also {sorted(missing)}")
        rank = arrays[self.layout.pair(self.layout.layers[0])[1]].shape[0]
        if rank != self.adapted.rank:
            self.adapted.resize(rank)
        self.adapted.write(arrays)

    def _seed(self, purpose: str, stream: tuple[object, ...]) -> int | None:
        """Return the seed of a stream; ``None`` where the operating system is to draw it."""
        if not self.config.reproducible:
            return None
        return stream_seed(self.config.seed, purpose, *stream)

    def _noise(self, stream: tuple[object, ...]) -> NoiseSource:
        if self.config.secure_noise:
            return SecureNoise()
        return SeededNoise(self._seed("noise", stream))

    def _words(self, stream: tuple[object, ...]) -> Words:
        seed = self._seed("noise", stream)
        return system_words if seed is None else seeded_words(seed)


@lru_cache(maxsize=1)
def process_trainer(config: RunConfig) -> LocalTrainer:
    """Return this process's trainer for ``config``, built at the first call."""
    trainer = LocalTrainer.build(config)
    if config.share_weights:
        share(trainer.adapted)
    return trainer


@contextmanager
def one_client(threads: int, seed: int | None) -> Iterator[None]:
    """Set a client's own thread count and dropout stream, and restore the old ones afterward."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with own_randomness(seed):
            yield
    finally:
        torch.set_num_threads(before)
