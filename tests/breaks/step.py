"""Breaks of clipping: how long a record's gradient may be, and which rows are one record's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora_flwr.plan import A, B
from fedlora_flwr.privacy import clipping, engine, mechanism, microbatches, record_independence
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.grad_sample import GradSampler
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.breaks.breaks import by_tensor, caught_by, everywhere

Patch = pytest.MonkeyPatch
ENGINE = "tests/privacy/test_engine.py"
CLIPPING = "tests/privacy/test_clipping.py"
LOOP = "tests/clients/test_private_loop.py"
CHECKS = "tests/privacy/test_engine_checks.py"
BOUND = "test_one_record_moves_the_sum_by_at_most_c_over_all_tensors_together"
SUM = "test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch_size"


# --- clipping ---


def clipped_by(made: NoisyOptimizer, rows: Tensor, norms: Tensor) -> Tensor:
    """Return the sum of rows that are clipped by these norms."""
    factors: Tensor = clipping.clip_factors(norms, made.max_grad_norm, rows.dtype)
    return factors @ rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def summing(patch: Patch, sums: Any) -> None:
    """Let the sum of a pass be what a function makes of its rows."""

    def accumulate(self: NoisyOptimizer) -> None:
        found = sums(self, self.rows())
        self.summed = found if self.summed is None else self.summed + found

    patch.setattr(NoisyOptimizer, "clip_and_accumulate", accumulate)


@caught_by(ENGINE, BOUND + "[A-vit]")
def no_clipping(patch: Patch) -> None:
    """Gradients are divided by the clip norm, and long ones are not cut."""
    summing(patch, lambda made, rows: rows.sum(0) / made.unit)


@caught_by(
    "tests/privacy/test_clip_weights.py",
    "test_a_record_moves_the_noisy_sum_by_c_at_most_under_any_weights",
)
def weights_after_the_clip(patch: Patch) -> None:
    """Parts are clipped without their weights and multiplied by them afterward."""

    def sums(made: NoisyOptimizer, rows: Tensor) -> Tensor:
        plain = rows.clone()
        for columns, weight in made._by_group(plain):
            columns.div_(weight)
        found = clipped_by(made, plain, clipping.row_norms(plain))
        for columns, weight in made._by_group(found):
            columns.mul_(weight)
        return found

    summing(patch, sums)


@caught_by(ENGINE, BOUND + "[B-vit]")
def clip_by_tensor(patch: Patch) -> None:
    """Each tensor of a record is clipped on its own, so all together are longer than C."""

    def sums(made: NoisyOptimizer, rows: Tensor) -> Tensor:
        parts = by_tensor(made, rows)
        return torch.cat([clipped_by(made, p, clipping.row_norms(p)) for p in parts])

    summing(patch, sums)


@caught_by(ENGINE, SUM + "[*]")
def clip_the_batch_mean(patch: Patch) -> None:
    """The mean gradient of a batch is clipped, and not the gradient of each record."""

    def sums(made: NoisyOptimizer, rows: Tensor) -> Tensor:
        mean = rows.sum(0, keepdim=True) / made.expected_batch_size
        clipped = clipped_by(made, mean, clipping.row_norms(mean))
        return torch.mul(clipped, made.expected_batch_size)

    summing(patch, sums)


@caught_by(ENGINE, SUM + "[B]")
def microbatch_mean_as_a_record(patch: Patch) -> None:
    """The mean gradient of a pass counts as the gradient of one record."""

    def sums(made: NoisyOptimizer, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.sum(0)
        mean = rows.mean(0, keepdim=True)
        return clipped_by(made, mean, clipping.row_norms(mean)) * len(rows)

    summing(patch, sums)


def norm_without(patch: Patch, factor: str | None) -> None:
    """Leave tensors of one kind out of the norm by which records are clipped."""
    began = PrivateEngine._activate

    def activate(self: PrivateEngine, active: Any) -> None:
        began(self, active)
        if self._optimizer is not None:
            found = zip(self._groups, self._optimizer.param_groups, strict=True)
            self._optimizer.counted = [k != factor for k, g in found for _ in g["params"]]

    def sums(made: NoisyOptimizer, rows: Tensor) -> Tensor:
        counted = made.counted
        parts = [p for p, counts in zip(by_tensor(made, rows), counted, strict=True) if counts]
        return clipped_by(made, rows, clipping.row_norms(torch.cat(parts, dim=1)))

    patch.setattr(PrivateEngine, "_activate", activate)
    summing(patch, sums)


@caught_by(ENGINE, BOUND + "[B-roberta]")
def norm_without_the_head(patch: Patch) -> None:
    """A record's norm leaves out the head, whose gradient is then as long as it likes."""
    norm_without(patch, None)


@caught_by(ENGINE, BOUND + "[*-vit]")
def norm_without_a(patch: Patch) -> None:
    """A record's norm leaves out A where both factors train."""
    norm_without(patch, A)


@caught_by(ENGINE, BOUND + "[*-swin]")
def norm_without_b(patch: Patch) -> None:
    """A record's norm leaves out B where both factors train."""
    norm_without(patch, B)


@caught_by(CLIPPING, "test_norms_of_long_rows_are_right_to_the_last_digits")
def norms_in_single_precision(patch: Patch) -> None:
    """Norms are added up in fp32, so the norm of a long gradient is too small."""
    everywhere(
        patch,
        clipping.row_norms,
        lambda rows: torch.linalg.vector_norm(rows, dim=1).double(),
    )


@caught_by(CLIPPING, "test_gradients_in_half_precision_are_clipped_and_summed_in_fp32")
def sums_in_half_precision(patch: Patch) -> None:
    """Gradients in bf16 are clipped and added up in bf16, whose rounding takes them past C."""
    patch.setattr(
        NoisyOptimizer,
        "rows",
        lambda self: torch.cat([p.grad_sample.flatten(1) for p in self.params], dim=1),
    )


@caught_by(CLIPPING, "test_no_factor_is_rounded_up_past_its_norm")
def factors_rounded_up(patch: Patch) -> None:
    """A factor is rounded to the nearest number, so a clipped gradient may be longer than C."""

    def factors(norms: Tensor, clip_norm: float, kind: torch.dtype) -> Tensor:
        most = min(1 / clip_norm, torch.finfo(kind).max)
        return torch.where(norms.isfinite(), (1 / norms).clamp(max=most), 0.0).to(kind)

    everywhere(patch, clipping.clip_factors, factors)


@caught_by(CLIPPING, "test_a_record_with_one_broken_entry_counts_as_zero_as_a_whole[nan]")
def broken_gradients_pass(patch: Patch) -> None:
    """A gradient with an entry that is not finite is added as it is, and ruins the release."""

    def sums(made: NoisyOptimizer, rows: Tensor) -> Tensor:
        return (
            clipping.clip_factors(clipping.row_norms(rows), made.max_grad_norm, rows.dtype) @ rows
        )

    summing(patch, sums)


@caught_by(CLIPPING, "test_a_record_with_one_broken_entry_counts_as_zero_as_a_whole[inf]")
def broken_entries_alone_are_left_out(patch: Patch) -> None:
    """Of a gradient that is not finite only the broken entries are left out, and nothing is cut."""
    factors = clipping.clip_factors

    def kept(norms: Tensor, clip_norm: float, kind: torch.dtype) -> Tensor:
        return torch.where(norms.isfinite(), factors(norms, clip_norm, kind), 1 / clip_norm).to(
            kind
        )

    patch.setattr(clipping, "clip_factors", kept)


@caught_by(
    "tests/privacy/test_mechanism.py",
    "test_a_mechanism_that_means_nothing_is_refused_by_name[clip-norm-changes4]",
)
def noise_without_a_clip_norm(patch: Patch) -> None:
    """An infinite clip norm is accepted with a finite ε, so nothing bounds a record."""
    patch.setattr(Mechanism, "__post_init__", lambda self: None)


@caught_by(CLIPPING, "test_noise_that_fp32_cannot_carry_is_refused[1e-45]")
def noise_below_what_floats_carry(patch: Patch) -> None:
    """A noise multiplier that is lost to rounding is accepted."""
    patch.setattr(mechanism, "SMALLEST", 0.0)


# --- which rows are one record's ---


@caught_by("tests/privacy/test_grad_sample.py", "test_windows_of_a_record_are_folded_together")
def windows_as_records(patch: Patch) -> None:
    """The first axis is taken for the records, so each window of a picture is clipped alone."""
    patch.setattr(GradSampler, "rows", lambda self, tensor, name: tensor)


@caught_by(
    "tests/privacy/test_padding.py",
    "test_in_exact_passes_a_gradient_follows_from_its_record_bit_for_bit[1000.0-bert]",
)
def padded_to_the_longest(patch: Patch) -> None:
    """Texts of a batch are padded to the longest of them, which so decides how others are read."""

    def one_pass(records: Any, indices: Tensor, plan: Any) -> Any:
        yield indices, len(indices), records.batch(indices)

    patch.setattr(microbatches, "_passes", one_pass)


@caught_by(
    "tests/privacy/test_padding.py",
    "test_in_exact_passes_a_gradient_follows_from_its_record_bit_for_bit[1.0-llama]",
)
def copies_count(patch: Patch) -> None:
    """Copies of a record that fill a pass are added to the sum."""
    fill = PrivateEngine._fill
    patch.setattr(PrivateEngine, "_fill", lambda self, *given: fill(self, *given[:3]))


@caught_by(CHECKS, "test_a_model_that_mixes_records_is_refused_with_the_layers_name[normalized]")
def mixing_models_pass(patch: Patch) -> None:
    """A model that normalizes over the batch, as BatchNorm does, is not refused."""
    patch.setattr(engine, "check_apart", lambda *given: True)


@caught_by(CHECKS, "test_batch_norm_runs_on_its_stored_statistics_and_keeps_them")
def batch_norm_trains(patch: Patch) -> None:
    """BatchNorm runs in training mode, and its statistics keep private records."""
    patch.setattr(PrivateEngine, "_train_mode", lambda self: self.adapted.train())
    mixing_models_pass(patch)
    buffers_may_change(patch)


@caught_by(
    "tests/privacy/test_record_independence.py",
    "test_a_buffer_that_changes_later_is_noticed_in_its_step",
)
def buffers_may_change(patch: Patch) -> None:
    """A model may keep what it has seen of records in its buffers."""
    patch.setattr(engine, "check_buffers", lambda *given: None)
    patch.setattr(record_independence, "check_buffers", lambda *given: None)


@caught_by(LOOP, "test_arrays_of_a_server_that_is_not_trusted_are_looked_at_each_time")
def structure_is_checked_once(patch: Patch) -> None:
    """A process checks the model once, and not again at the arrays that a server has chosen."""
    patch.setattr(PrivateEngine, "verify", lambda self, records: None)
