"""The private step: clip each sampled record over all active factors, add noise, move the factors.

`GradSampler` computes the gradients per record. `NoisyOptimizer`, a subclass of Opacus'
``DPOptimizer``, clips them, adds noise and takes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.gradient_checkpointing import activations_kept
from fedlora_flwr.lora.precision import as_in_forward
from fedlora_flwr.lora.wide_numbers import with_fp64
from fedlora_flwr.plan import HEAD
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.grad_sample import GradSampler
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.microbatches import PassPlan, passes
from fedlora_flwr.privacy.noise import NoiseSource
from fedlora_flwr.privacy.postprocessing.filters import GradientFilter, NoFilter
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings, PostProcessing
from fedlora_flwr.privacy.record_independence import (
    Place,
    batch_norms,
    buffers_of,
    check_apart,
    check_buffers,
    states_of,
)
from fedlora_flwr.privacy.units import Sample

if TYPE_CHECKING:
    from fedlora_flwr.data.records import Batch, Records

__all__ = ["LossFunction", "OptimizerSettings", "PrivateEngine"]

LossFunction = Callable[[nn.Module, "Batch"], Tensor]


class PrivateEngine:
    """Runs private steps on one model; it is built once and used for every client and round.

    Parameters
    ----------
    adapted : AdaptedModel
        The model, on its device.
    losses : callable
        Maps (model, batch) to one loss per record, shape (n,).
    microbatch_size : int, optional
        Largest number of records in one forward pass; by default the whole batch. It changes time
        and memory only, because clipped sums of passes add up. Records that are padded to different
        widths never share a pass (see `passes`).

    Raises
    ------
    PrivacyViolation
        A part of the model would escape clipping (see `AdaptedModel`).

    Examples
    --------
    >>> from fedlora_flwr import LoRASpec, TensorRecords, attach
    >>> from fedlora_flwr.privacy.noise import SecureNoise
    >>> spec = LoRASpec(rank=1, alpha=1.0, dropout=0.0, targets="0")
    >>> adapted = attach(nn.Sequential(nn.Linear(3, 2)), spec, seed=1)
    >>> engine = PrivateEngine(adapted, lambda model, batch: model(batch["x"]).square().sum(1))
    >>> settings = OptimizerSettings("sgd", lr_a=0.1, lr_b=0.1, lr_head=0.1)
    >>> engine.start_round(Mechanism(1.0, 1.0, 2, 8), settings, SecureNoise())
    >>> records = TensorRecords({"x": torch.ones(8, 3)})
    >>> engine.step(records, torch.tensor([0, 5]), ["0.lora_B.weight"])
    >>> bool(adapted.parameters["0.lora_B.weight"].any())
    True
    """

    def __init__(
        self, adapted: AdaptedModel, losses: LossFunction, microbatch_size: int | None = None
    ) -> None:
        adapted.check()
        self.adapted = adapted
        self._losses = losses
        self._microbatch_size = microbatch_size
        self._sampler = GradSampler(adapted)
        self._verified = self._training = False
        self._named: list[tuple[str, nn.Parameter]] = []
        self._buffers: list[Place] = []
        self._norms: list[nn.Module] = []
        self._optimizer: NoisyOptimizer | None = None
        self._post = PostProcessing(adapted)

    def start_round(
        self,
        mechanism: Mechanism,
        settings: OptimizerSettings,
        noise: NoiseSource,
        gradient_filter: GradientFilter | None = None,
        exact: bool = False,
    ) -> None:
        """Begin a client's round with a fresh optimizer state.

        A deployed client starts a new process for every message. If state outlived a round,
        simulations and deployments would differ.

        Parameters
        ----------
        mechanism : Mechanism
            How gradients are clipped and noised.
        settings : OptimizerSettings
            The local optimizer.
        noise : NoiseSource
            Where the noise comes from.
        gradient_filter : GradientFilter, optional
            Post-processing of the privatized gradients, with fresh state; by default none.
        exact : bool (default: False)
            Whether the shapes of passes must not depend on how many records there are of each
            length (see `PassPlan`). This is needed where a server may have chosen the arrays.

        Raises
        ------
        PrivacyViolation
            A part of the model would escape clipping, or keeps statistics of records.
        """
        self.adapted.check()
        self._named = list(self.adapted.model.named_parameters())
        self._buffers = buffers_of(self.adapted.model)
        self._norms = batch_norms(self.adapted.model)
        self._mechanism = mechanism
        device = next(iter(self.adapted.parameters.values())).device.type
        self._plan = PassPlan(
            max(1, round(mechanism.batch_size)),
            self._microbatch_size,
            device,
            exact,
            grouped=mechanism.unit != RECORD,
        )
        self._settings = settings
        self._post.begin(settings)
        self._groups = self._post.groups(settings)
        self._optimizer = NoisyOptimizer(
            self._post.optimizer(settings),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip_norm,
            expected_batch_size=mechanism.batch_size,
            source=noise,
            weights=[mechanism.weights.of_part(f or HEAD) for f in self._groups],
        )
        self._filter = gradient_filter or NoFilter()
        self._optimizer.attach_step_hook(lambda _: self._post_process())

    def step(
        self,
        records: Records,
        indices: Tensor,
        active: Sequence[str],
        owners: Tensor | None = None,
    ) -> None:
        """Take one private step.

        Parameters
        ----------
        records : Records
            The client's private records.
        indices : Tensor
            Positions of the records that joined the step, int64, shape (n,). It may be empty; the
            update of the step then is noise.
        active : Sequence[str]
            Names of the arrays that train.
        owners : Tensor, optional
            Where the promise is for users: the user of each record, as a number from 0, int64,
            shape (n,), ascending (see `fedlora_flwr.privacy.units.Units.sample`). The mean gradient
            of a user's records is clipped to C.

        Raises
        ------
        PrivacyViolation
            The mechanism is for users and records come without owners, or the other way round. Rows
            cannot be told apart by record, a record's gradient depends on other records, an
            active array got no gradient or did not move, or the step wrote to a frozen parameter or
            a buffer.
        RuntimeError
            `start_round` has not been called.

        Guarantees
        ----------
        *What holds.* The active arrays move by a function of one noisy sum: each record's weighted
        gradient, joint over all active arrays, is clipped to C, and noise of deviation σC is added
        once. An empty batch is a step as well. Frozen arrays and buffers do not move.
        *Under which assumptions.* ``indices`` come from `poisson_batches`, and the loss of a record
        reads that record alone, which `verify` tests and cannot prove for every input.
        *What does not hold.* Time and memory of a step depend on the number and length of records.
        """
        with self._watched(records, active, moved=set(active)) as optimizer:
            for is_last in self._units(records, Sample(indices, owners), active, optimizer):
                optimizer.signal_skip_step(not is_last)
                optimizer.step()

    def whole_sum(
        self,
        records: Records,
        indices: Tensor,
        active: Sequence[str],
        whole: Callable[[Tensor], Tensor],
        owners: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add up a step's gradients in whole numbers. No noise is added and nothing moves.

        Parameters
        ----------
        records, indices, active, owners
            As for `step`; the sum is zero if ``indices`` is empty.
        whole : callable
            Turns gradients by unit, shape (n, D), over all active arrays together, into whole
            numbers of bounded norm (see `fedlora_flwr.secure_sum.rounding.rounded`).

        Returns
        -------
        dict[str, Tensor]
            The sum by name, int64, in the arrays' shapes. *Not private*: noise has to be added.

        Raises
        ------
        PrivacyViolation
            As for `step`; here no array may move.
        """
        total = torch.zeros(())
        with self._watched(records, active, moved=set()) as optimizer:
            for _ in self._units(records, Sample(indices, owners), active, optimizer):
                # Whole numbers add up exactly in fp64.
                total = total + with_fp64(whole(optimizer.rows())).sum(dim=0, dtype=torch.float64)
        # The optimizer's rows hold the arrays' columns in this order.
        named = [n for names in self._groups.values() for n in names if n in set(active)]
        shapes = {name: self.adapted.parameters[name].shape for name in named}
        sizes = [shape.numel() for shape in shapes.values()]
        parts = torch.split(total.to("cpu", torch.int64), sizes)
        return {n: part.view(shapes[n]) for n, part in zip(named, parts, strict=True)}

    def _units(
        self, records: Records, sample: Sample, active: Sequence[str], optimizer: NoisyOptimizer
    ) -> Iterator[bool]:
        """Give the optimizer the gradients of whole units; yield whether these are the last."""
        if (sample.owners is not None) != self._plan.grouped:
            raise PrivacyViolation(
                f"The mechanism's unit is a {self._mechanism.unit}, and the records of the step "
                f"came {'without' if sample.owners is None else 'with'} owners. Pass the owners of "
                "the records where the unit is a user, and only there."
            )
        for number, some in enumerate(parts := list(sample.split(self._microbatch_size)), start=1):
            for part in passes(records, some.records, self._plan):
                # Copies that fill a pass are left out of the loss, so they add zero to the sum.
                self._fill(part.batch, part.rows, active, slice(len(part.indices)))
                if some.owners is not None:
                    optimizer.gather(*some.of(part.indices))
                if some.owners is None or part.is_last:
                    yield part.is_last and number == len(parts)
                    optimizer.gathered = None
                optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _watched(
        self, records: Records, active: Sequence[str], moved: set[str]
    ) -> Iterator[NoisyOptimizer]:
        """Let ``active`` receive gradients, and check that exactly ``moved`` has changed."""
        optimizer = self._optimizer
        if optimizer is None:
            raise RuntimeError("start_round must be called before a step")
        if not self._verified:
            self.verify(records)
        self._activate(active)
        versions, buffers = self._versions(), states_of(self._buffers)
        with self.training():
            yield optimizer
        self._check_touched(versions, moved)
        check_buffers(self._buffers, buffers)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keep the model in training mode for a loop of steps, and leave it in evaluation mode.

        Without this context each step changes the mode twice, which takes milliseconds for a model
        of a thousand modules.
        """
        if self._training:
            yield
            return
        self._train_mode()
        self._training = True
        try:
            yield
        finally:
            self._training = False
            self.adapted.model.eval()

    def gradients_by_record(
        self, records: Records, indices: Tensor, active: Sequence[str], of: slice = slice(None)
    ) -> dict[str, Tensor]:
        r"""Return each record's own gradient, unclipped and *not private*: for checks only.

        Only the losses of the records in the slice ``of`` of the batch count. For each active
        array, the result has shape (records, \*shape of the array).
        """
        self._activate(active)
        self._fill_grad_samples(records, indices, active, of)
        parameters = self.adapted.parameters
        found = {name: parameters[name].grad_sample for name in active}  # type: ignore[attr-defined]
        self._activate(())
        return found

    def verify(self, records: Records) -> None:
        """Check that the model treats each record on its own (see `check_apart`).

        Raises
        ------
        PrivacyViolation
            A record's gradient depends on the other records of its batch.
        """
        self._norms = batch_norms(self.adapted.model)
        with activations_kept(self.adapted):
            self._verified = check_apart(
                self.adapted, self.gradients_by_record, self._train_mode, records
            )
        if self._training:
            self._train_mode()

    def _activate(self, active: Sequence[str]) -> None:
        """Let exactly the ``active`` arrays receive gradients, and give them to the optimizer."""
        chosen = set(active)
        for name, parameter in self.adapted.parameters.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        if self._optimizer is not None:
            self._optimizer.summed = self._optimizer.gathered = None
            for group, names in zip(
                self._optimizer.param_groups, self._groups.values(), strict=True
            ):
                group["params"] = [self.adapted.parameters[n] for n in names if n in chosen]

    def _post_process(self) -> None:
        original = self._optimizer.original_optimizer if self._optimizer else None
        self._post(self._settings, self._filter, original, self._mechanism.noise_variance_of)

    def _fill_grad_samples(
        self, records: Records, indices: Tensor, active: Sequence[str], of: slice = slice(None)
    ) -> None:
        batch = records.batch(indices) if len(indices) else {}
        self._fill(batch, len(indices), active, of)

    def _fill(
        self, batch: Batch, count: int, active: Sequence[str], of: slice = slice(None)
    ) -> None:
        parameters = self.adapted.parameters
        if count == 0:
            # Models crash on an empty batch. Its gradients have no rows, so no pass is needed.
            for name in active:
                p = parameters[name]
                p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            return
        device = next(iter(parameters.values())).device
        batch = {key: value.to(device) for key, value in batch.items()}
        self._sampler.num_records = count
        with torch.enable_grad():
            losses = self._losses(self.adapted.model, batch)
            if losses.shape != (count,):
                raise PrivacyViolation(
                    f"The task returned losses of shape {tuple(losses.shape)} for {count} "
                    "records; one loss per record is needed."
                )
            with as_in_forward(self.adapted.model):
                losses[of].sum().backward()  # type: ignore[no-untyped-call]
        for name in active:
            if parameters[name].grad_sample is None:  # type: ignore[attr-defined]
                raise PrivacyViolation(
                    f"No per-record gradient arrived for {name!r}: its layer did not run, or its "
                    "input was cut off from the loss."
                )

    def _train_mode(self) -> None:
        self.adapted.train()
        for norm in self._norms:
            norm.eval()

    def _versions(self) -> dict[str, int]:
        return {name: p._version for name, p in self._named}

    def _check_touched(self, before: dict[str, int], active: set[str]) -> None:
        """Refuse a step that moved a frozen parameter or did not move an active one."""
        moving = {id(self.adapted.parameters[name]) for name in active}
        for name, parameter in self._named:
            moved = parameter._version != before[name]
            if moved != (id(parameter) in moving):
                what = "moved although it is frozen" if moved else "is active but did not move"
                raise PrivacyViolation(f"After a private step {name!r} {what}.")
