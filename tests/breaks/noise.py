"""Breaks of the noise: how much there is, whose it is, and what reads a gradient before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.privacy import clipping, masks
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.noise import SecureNoise, SeededNoise
from fedlora_flwr.privacy.postprocessing import optimizer as postprocessing
from fedlora_flwr.privacy.postprocessing.precondition import precondition
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies.as_lora import ASLoRA
from tests.breaks.breaks import by_tensor, caught_by, everywhere

Patch = pytest.MonkeyPatch
ENGINE = "tests/privacy/test_engine.py"
CLIPPING = "tests/privacy/test_clipping.py"
LOOP = "tests/clients/test_private_loop.py"
TRAINER = "tests/clients/test_trainer.py"
POST = "tests/privacy/test_post_processing.py"
NOISE = "test_noise_has_the_stated_deviation_on_trained_coordinates_and_is_nowhere_else"
SUM = "test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch_size"

# --- noise ---


@caught_by(ENGINE, NOISE + "[empty-A]")
def no_noise(patch: Patch) -> None:
    """No noise is added."""
    patch.setattr(NoisyOptimizer, "add_noise", lambda self: None)


@caught_by("tests/privacy/test_noise.py", "test_noise_is_standard_normal[seed]")
def a_tenth_of_the_noise(patch: Patch) -> None:
    """A tenth of the noise is added."""
    drawn = SeededNoise.normal_like
    patch.setattr(SeededNoise, "normal_like", lambda *given: drawn(*given) / 10)


@caught_by("tests/privacy/test_noise.py", "test_noise_is_standard_normal[os]")
def secure_noise_halved(patch: Patch) -> None:
    """The mean of four draws of the operating system's noise is taken, of deviation one half."""
    drawn = SecureNoise.normal_like
    patch.setattr(SecureNoise, "normal_like", lambda *given: drawn(*given) / 2)


def added(patch: Patch, noise: Callable[[NoisyOptimizer, Tensor], Tensor]) -> None:
    """Let the noise of a step be what a function makes of the sum."""

    def add(self: NoisyOptimizer) -> None:
        if self.noise_multiplier and self.summed is not None:
            self.summed = self.summed + self.noise_multiplier * noise(self, self.summed)

    patch.setattr(NoisyOptimizer, "add_noise", add)


@caught_by(CLIPPING, "test_a_record_adds_at_most_1_whatever_its_gradient_and_the_clip_norm")
def noise_for_half_the_clip_norm(patch: Patch) -> None:
    """Records are clipped to twice the norm that the noise is made for."""
    factors = clipping.clip_factors
    everywhere(patch, factors, lambda *given: 2 * factors(*given))


@caught_by(CLIPPING, "test_noise_has_deviation_sigma_before_the_clip_norm_comes_in[1e-20]")
def clip_norm_on_the_noise_twice(patch: Patch) -> None:
    """The noise is multiplied by C before and after it is added, which a small C makes vanish."""
    added(patch, lambda made, summed: made._source.normal_like(summed) * made.unit)


@caught_by(ENGINE, NOISE + "[three-B]")
def noise_divided_by_the_batch_size_twice(patch: Patch) -> None:
    """The noise is divided by the batch size before it is added, and again with the sum."""
    added(patch, lambda made, summed: made._source.normal_like(summed) / made.expected_batch_size)


@caught_by(ENGINE, NOISE + "[three-*]")
def head_without_noise(patch: Patch) -> None:
    """The head gets no noise."""

    def noise(made: NoisyOptimizer, summed: Tensor) -> Tensor:
        drawn = made._source.normal_like(summed)
        head = sum(p.numel() for p in made.original_optimizer.param_groups[-1]["params"])
        drawn[len(drawn) - head :] = 0
        return drawn

    added(patch, noise)


@caught_by(ENGINE, "test_an_empty_batch_is_a_step_of_pure_noise[B-vit]")
def empty_batches_without_noise(patch: Patch) -> None:
    """An empty batch gets no noise, which tells that nobody joined."""
    noisy = NoisyOptimizer.add_noise

    def add(self: NoisyOptimizer) -> None:
        if self.summed is not None and self.summed.any():
            noisy(self)

    patch.setattr(NoisyOptimizer, "add_noise", add)


@caught_by(LOOP, "test_an_empty_batch_is_a_step_of_the_noise_streams_own_noise")
def empty_steps_are_skipped(patch: Patch) -> None:
    """A step that no record joined is skipped, which tells that nobody joined."""
    step = PrivateEngine.step

    def skipping(self: PrivateEngine, records: Any, indices: Tensor, *given: Any) -> None:
        if len(indices):
            step(self, records, indices, *given)

    patch.setattr(PrivateEngine, "step", skipping)


@caught_by(ENGINE, SUM + "[A]")
def divided_by_who_joined(patch: Patch) -> None:
    """The sum is divided by the number of records that joined, and not by the expected one."""
    accumulate, scale = NoisyOptimizer.clip_and_accumulate, NoisyOptimizer.scale_grad

    def counting(self: NoisyOptimizer) -> None:
        self.joined = getattr(self, "joined", 0) + len(self.rows())
        accumulate(self)

    def scaled(self: NoisyOptimizer) -> None:
        expected, self.expected_batch_size = self.expected_batch_size, max(1, self.joined)
        scale(self)
        self.expected_batch_size, self.joined = expected, 0

    patch.setattr(NoisyOptimizer, "clip_and_accumulate", counting)
    patch.setattr(NoisyOptimizer, "scale_grad", scaled)


@caught_by(ENGINE, "test_noise_of_different_tensors_and_steps_is_independent")
def same_noise_for_two_factors(patch: Patch) -> None:
    """All tensors get the same draws, so their difference has no noise."""

    def noise(made: NoisyOptimizer, summed: Tensor) -> Tensor:
        sizes = [p.numel() for p in made.params]
        drawn = made._source.normal_like(summed[: max(sizes)])
        return torch.cat([drawn[:size] for size in sizes])

    added(patch, noise)


@caught_by("tests/privacy/test_noise.py", "test_seeded_noise_repeats_and_goes_on")
def same_noise_in_each_step(patch: Patch) -> None:
    """The generator starts again at each step."""
    made, drawn = SeededNoise.__init__, SeededNoise.normal_like

    def begin(self: SeededNoise, seed: int) -> None:
        self.seed = seed  # type: ignore[attr-defined]
        made(self, seed)

    def again(self: SeededNoise, reference: Tensor) -> Tensor:
        made(self, self.seed)  # type: ignore[attr-defined]
        return drawn(self, reference)

    patch.setattr(SeededNoise, "__init__", begin)
    patch.setattr(SeededNoise, "normal_like", again)


# --- randomness ---


def seeds(patch: Patch, chosen: Any) -> None:
    """Let the seeds of a client's generators be what a function makes of (purpose, stream)."""
    honest = LocalTrainer._seed
    patch.setattr(
        LocalTrainer,
        "_seed",
        lambda self, purpose, stream: honest(self, *chosen(purpose, stream)),
    )


@caught_by(LOOP, "test_an_empty_batch_is_a_step_of_the_noise_streams_own_noise")
def noise_by_the_seed_of_the_batches(patch: Patch) -> None:
    """Noise and batches have one seed, so what is learned of one tells the other."""
    seeds(patch, lambda purpose, stream: ("batches", stream))


@caught_by(TRAINER, "test_another_client_or_round_has_its_own[noise-stream1]")
def same_noise_in_each_round(patch: Patch) -> None:
    """The noise of a client is the same in each round, so the difference of two has none."""
    seeds(patch, lambda purpose, stream: (purpose, stream[:1]))


@caught_by(TRAINER, "test_another_client_or_round_has_its_own[noise-stream0]")
def same_noise_for_two_clients(patch: Patch) -> None:
    """Two clients draw the same noise, so the difference of their uploads has none."""
    seeds(patch, lambda purpose, stream: (purpose, stream[1:]))


@caught_by(TRAINER, "test_without_reproducibility_every_result_differs[False]")
def generator_reused_in_each_round(patch: Patch) -> None:
    """A process draws one secret seed, and begins each round's generator with it."""
    honest, drawn = LocalTrainer._seed, dict[str, int]()

    def seed(self: LocalTrainer, purpose: str, stream: tuple[object, ...]) -> int | None:
        if self.config.reproducible:
            return honest(self, purpose, stream)
        return drawn.setdefault(purpose, stream_seed(None))

    patch.setattr(LocalTrainer, "_seed", seed)


@caught_by(LOOP, "test_streams_of_a_real_run_follow_128_bits_of_the_operating_system[batches]")
def batches_by_the_runs_seed(patch: Patch) -> None:
    """The records of each step follow the run's seed, which the server knows."""
    honest = LocalTrainer._seed

    def seed(self: LocalTrainer, purpose: str, stream: tuple[object, ...]) -> int | None:
        known = replace(self.config, reproducible=True, secure_noise=False)
        return honest(
            replace(self, config=known) if purpose == "batches" else self, purpose, stream
        )

    patch.setattr(LocalTrainer, "_seed", seed)


@caught_by(
    "tests/privacy/test_noise.py", "test_seeded_noise_follows_all_bits_of_its_seed[4294967299]"
)
def noise_by_32_bits_of_its_seed(patch: Patch) -> None:
    """The noise follows 32 bits of its seed, and all of them can be tried on a release."""
    made = SeededNoise.__init__
    patch.setattr(SeededNoise, "__init__", lambda self, seed: made(self, seed % 2**32))


@caught_by("tests/privacy/test_masks.py", "test_masks_follow_every_bit_of_a_seed[127]")
def dropout_by_32_bits_of_its_seed(patch: Patch) -> None:
    """Dropout's masks follow 32 bits of their seed, and all of them can be tried on a release."""
    honest = masks.own_randomness
    everywhere(patch, honest, lambda seed: honest(seed % 2**32))


# --- what reads gradients ---


@caught_by(POST, "test_the_filter_is_first_and_then_the_other_factor_as_it_is[none-*]")
def momentum_of_raw_gradients(patch: Patch) -> None:
    """A momentum of sums without noise is kept, so a record counts in later steps, too."""
    noisy = NoisyOptimizer.add_noise

    def add(self: NoisyOptimizer) -> None:
        held = getattr(self, "held", None)
        if held is not None and self.summed is not None and held.shape == self.summed.shape:
            self.summed = self.summed + 0.9 * held
        self.held = self.summed
        noisy(self)

    patch.setattr(NoisyOptimizer, "add_noise", add)


@caught_by(POST, "test_nothing_of_it_changes_what_is_clipped_or_noised[B]")
def filter_before_the_noise(patch: Patch) -> None:
    """The filter reads the sum before the noise, and keeps it for later steps."""
    start: Any = PrivateEngine.start_round
    noisy = NoisyOptimizer.add_noise

    def started(self: PrivateEngine, *given: Any, **named: Any) -> None:
        chosen = given[3] if len(given) > 3 else named.pop("gradient_filter", None)
        start(self, *given[:3], None, **named)
        assert self._optimizer is not None
        self._optimizer.early = chosen
        self._optimizer.names = {id(p): n for n, p in self.adapted.parameters.items()}

    def add(self: NoisyOptimizer) -> None:
        if self.early is not None and self.summed is not None:
            parts = zip(self.params, by_tensor(self, self.summed), strict=True)
            smooth = [self.early(self.names[id(p)], part.view_as(p)) for p, part in parts]
            self.summed = torch.cat([part.flatten() for part in smooth])
        noisy(self)

    patch.setattr(PrivateEngine, "start_round", started)
    patch.setattr(NoisyOptimizer, "add_noise", add)


def raw_norms(patch: Patch) -> list[float]:
    """Return a list that gets the norm of each sum before its noise."""
    noisy, found = NoisyOptimizer.add_noise, list[float]()

    def add(self: NoisyOptimizer) -> None:
        if self.summed is not None:
            found.append(float(self.summed.norm()))
        noisy(self)

    patch.setattr(NoisyOptimizer, "add_noise", add)
    return found


@caught_by(POST, "test_the_filter_is_first_and_then_the_other_factor_as_it_is[binomial-*]")
def preconditioner_from_raw_gradients(patch: Patch) -> None:
    """The preconditioner's ridge follows the size of the gradient before its noise."""
    found = raw_norms(patch)
    patch.setattr(
        postprocessing,
        "precondition",
        lambda grad, other, factor, scaling, ridge: precondition(
            grad, other, factor, scaling, ridge * (1 + found[-1])
        ),
    )


@caught_by(
    "tests/clients/test_scores.py",
    "test_other_records_with_the_same_released_gradients_give_the_same_scores[none]",
)
def scores_from_raw_gradients(patch: Patch) -> None:
    """AS-LoRA's scores weigh the size of gradients before their noise."""
    found, honest = raw_norms(patch), ASLoRA._gain

    def gain(self: ASLoRA, names: Any, moved: Any) -> Any:
        weight = found[-1]
        score = honest(self, names, moved)
        return score and weight * score

    patch.setattr(ASLoRA, "_gain", gain)
