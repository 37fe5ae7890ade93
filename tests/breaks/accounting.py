"""Breaks of the accounting: sampling, σ, ε, and what the ledger holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora_flwr.clients import local_round
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.privacy import (
    account,
    accountants,
    budget,
    calibration,
    ledger_batch,
    ledger_file,
    mechanism,
)
from fedlora_flwr.privacy.account import Account, Tally
from fedlora_flwr.privacy.accountants import Segment
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.privacy.ledger_batch import Batch
from fedlora_flwr.privacy.ledger_connection import Connection
from fedlora_flwr.privacy.ledger_file import LedgerFile
from fedlora_flwr.privacy.lifetime import choose_order
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.breaks.breaks import caught_by, everywhere

Patch = pytest.MonkeyPatch
LEDGER = "tests/privacy/test_ledger.py"
LIFETIME = "tests/privacy/test_lifetime.py"
REPEATS = "tests/privacy/test_repeats.py"
TRAINER = "tests/clients/test_trainer.py"
REFUSED = "test_a_client_that_cannot_keep_the_promise_is_refused_by_name"
FIXED = "test_the_first_record_fixes_the_settings_of_a_run"


def fresh_figures(patch: Patch) -> None:
    """Let no figure come from memory or from a file that sound code has written."""
    budget._spent.cache_clear()
    budget._calibrate.cache_clear()
    patch.setattr(budget, "_stored", lambda inputs, compute: compute())


# --- the sampling of records ---


@caught_by(
    "tests/privacy/test_mechanism.py", "test_poisson_batches_are_independent_draws_of_every_record"
)
def batches_of_a_fixed_size(patch: Patch) -> None:
    """Each step takes exactly b records, and is accounted as a Poisson sample."""

    def batches(made: Mechanism, num_steps: int, seed: int) -> Iterator[Tensor]:
        generator, size = np.random.default_rng(seed), max(1, round(made.batch_size))
        for _ in range(num_steps):
            yield torch.from_numpy(np.sort(generator.permutation(made.num_records)[:size]))

    everywhere(patch, mechanism.poisson_batches, batches)


@caught_by(TRAINER, "test_every_client_gets_the_noise_that_its_size_needs")
def rate_of_all_clients_records(patch: Patch) -> None:
    """σ is worked out for the records of all clients together, and not for the client's own."""
    honest = calibration.calibrated_mechanism

    def calibrated(config: RunConfig, num_records: int, **given: Any) -> Mechanism:
        made = honest(config, num_records * config.num_clients, **given)
        return replace(made, num_records=num_records)

    everywhere(patch, honest, calibrated)


@caught_by(
    "tests/privacy/test_limits.py", "test_noise_is_for_all_rounds_that_a_client_may_join[0-0.1]"
)
def noise_for_expected_participation(patch: Patch) -> None:
    """σ is worked out for the rounds that a client may expect, and not for all that may happen."""
    planned = RunConfig.planned_steps.fget  # type: ignore[attr-defined]
    patch.setattr(
        RunConfig,
        "planned_steps",
        property(lambda self: max(1, round(planned(self) * self.fraction_train))),
    )


@caught_by("tests/privacy/test_budget.py", "test_calibration_is_safe_and_tight[8-0.001-0.3-100]")
def noise_just_below_the_safe_one(patch: Patch) -> None:
    """Calibration returns a σ that is one percent below the one that it has found safe."""
    fresh_figures(patch)
    honest = budget._search

    def less(*given: Any) -> tuple[float, str]:
        sigma, accountant = honest(*given)
        return 0.99 * sigma, accountant

    patch.setattr(budget, "_search", less)


@caught_by(TRAINER, REFUSED + "[1000-delta-below 1/n = 0.001]")
def any_delta(patch: Patch) -> None:
    """A δ of 1/n is accepted, with which one record may be told whole."""
    patch.setattr(calibration, "check_budget", lambda *given: None)


# --- the accountants ---


def one_direction(patch: Patch, counted: str) -> None:
    fresh_figures(patch)
    directed = accountants._directed_epsilon
    patch.setattr(
        accountants,
        "_directed_epsilon",
        lambda *given: directed(*given) if given[-1] == counted else 0.0,
    )


@caught_by("tests/privacy/test_limits.py", "test_prv_covers_each_direction[segment0-0.001]")
def only_records_that_are_added(patch: Patch) -> None:
    """PRV covers one direction only, and not the one in which a record is taken away."""
    one_direction(patch, "add")


@caught_by("tests/privacy/test_limits.py", "test_prv_covers_each_direction[segment1-1e-05]")
def only_records_that_are_taken_away(patch: Patch) -> None:
    """PRV covers one direction only, and not the one in which a record is added."""
    one_direction(patch, "remove")


@caught_by("tests/privacy/test_budget.py", "test_different_segments_compose")
def later_settings_are_free(patch: Patch) -> None:
    """The ε of a history is that of its first settings, and steps with others are free."""
    fresh_figures(patch)
    honest = accountants.merge
    everywhere(patch, honest, lambda history: honest(history)[:1])


@caught_by(LEDGER, "test_a_long_run_reports_an_upper_bound_and_ends_with_the_exact_number")
def reported_steps_rounded_down(patch: Patch) -> None:
    """A long run's steps are rounded down before ε is worked out for a report."""

    def rounded(segments: tuple[Segment, ...], tallies: Any) -> tuple[Segment, ...]:
        return tuple(replace(s, steps=s.steps // 8 * 8) for s in segments)

    patch.setattr(account, "_rounded", rounded)


@caught_by(LIFETIME, "test_the_order_is_stored_with_the_first_row_and_never_changes")
def a_filter_reports_less(patch: Patch) -> None:
    """Under a filter the reported ε leaves out what the conversion to δ costs."""
    patch.setattr(account, "filtered_epsilon", lambda divergence, delta, order: divergence)


# --- what the budget allows ---


@caught_by(LEDGER, "test_a_plan_past_the_budget_is_refused_at_its_start")
def plans_past_the_budget(patch: Patch) -> None:
    """A plan whose ε is above the budget is admitted."""
    patch.setattr(account, "_check_fixed", lambda *given: None)


@caught_by(LEDGER, "test_a_release_past_the_plan_is_refused_and_not_written")
def steps_past_the_plan(patch: Patch) -> None:
    """A run may take more steps than σ was worked out for."""
    honest = account.admit

    def admitted(own: Account, tallies: Any, planned: Segment, steps: int, lapse: float) -> Any:
        taken = sum(t.mechanism.steps for t in tallies if t.run == own.run)
        more = replace(planned, steps=max(planned.steps, taken + steps))
        return honest(own, tallies, more, steps, lapse)

    patch.setattr(account, "_check_settings", lambda *given: None)
    everywhere(patch, honest, admitted)


@caught_by(LEDGER, FIXED + "[other0-noise-multiplier]")
def settings_change_within_a_run(patch: Patch) -> None:
    """A server may change σ after it has read the first rounds."""
    patch.setattr(account, "_check_settings", lambda *given: None)


@caught_by(LEDGER, "test_scope_run_starts_from_zero_and_scope_lifetime_does_not")
def a_new_name_is_a_new_budget(patch: Patch) -> None:
    """A budget for life counts the rows of the run that asks, so a new run starts from zero."""
    tallies = Connection.tallies
    patch.setattr(
        Connection,
        "tallies",
        lambda self, own, before=None: tallies(self, replace(own, scope="run"), before),
    )


@caught_by(LIFETIME, "test_runs_chosen_after_the_fact_do_not_get_past_the_ledger[1.0]")
def no_filter(patch: Patch) -> None:
    """Runs that were chosen after earlier results are composed as if they had been planned."""
    patch.setattr(account, "_filtered", lambda *given: False)
    patch.setattr(account, "is_bounded", lambda *given: True)
    patch.setattr(account, "_counted", lambda own, tallies: _each(tallies))


def _each(tallies: Sequence[Tally]) -> tuple[Segment, ...]:
    return accountants.merge([t.mechanism for t in tallies])


@caught_by(LIFETIME, "test_runs_chosen_after_the_fact_do_not_get_past_the_ledger[0.0]")
def settings_of_a_later_run_are_free(patch: Patch) -> None:
    """A later run may have less noise than the first one, under the rule of fixed settings."""
    patch.setattr(account, "is_bounded", lambda *given: True)
    patch.setattr(account, "_counted", lambda own, tallies: _each(tallies))


@caught_by(LIFETIME, "test_the_order_is_stored_with_the_first_row_and_never_changes")
def the_best_order_afterwards(patch: Patch) -> None:
    """The filter's order is chosen again for each run, once earlier releases are known."""

    def order(own: Account, tallies: Any, first: Segment) -> float:
        last = tallies[-1].mechanism if tallies else first
        return choose_order(own.epsilon, own.delta, last)

    patch.setattr(account, "_order", order)


# --- the ledger's rows ---


@caught_by("tests/clients/test_numpy_client.py", "test_every_release_is_in_the_ledger")
def empty_steps_are_not_counted(patch: Patch) -> None:
    """A row leaves out a step that no record joined."""
    row = LocalRound._row

    def made(self: LocalRound, *given: Any) -> Any:
        first, number, segment, *rest = row(self, *given)
        return first, number, replace(segment, steps=segment.steps - 1), *rest

    patch.setattr(LocalRound, "_row", made)


Train = Callable[[Any], Any]


def admitted(made: LocalRound, row: Any) -> Any:
    """Ask for a row's steps as `Ledger.record` does, and write nothing."""
    own, _, segment, planned, *_ = row
    held = made._ledger._read(own)
    return account.admit(own, held, planned, segment.steps, made._ledger.lapse)[0]


@caught_by(
    "tests/hostile/test_ten_rows.py",
    "test_8_a_failure_after_the_first_batch_is_in_the_ledger[failing-1]",
)
def failures_are_forgotten(patch: Patch) -> None:
    """A row is written once training has succeeded, so a failure is a free query."""

    def counted(self: LocalRound, row: Any, train: Train) -> Any:
        made = train(admitted(self, row))
        return made, self._ledger.record(*row)

    patch.setattr(LocalRound, "_counted", counted)


@caught_by(
    "tests/hostile/test_ten_rows.py",
    "test_8_a_failure_after_the_first_batch_is_in_the_ledger[failing_later-1]",
)
def rows_after_training(patch: Patch) -> None:
    """A row is written after training, also after a failure, and a kill in between loses it."""

    def counted(self: LocalRound, row: Any, train: Train) -> Any:
        made, before = None, admitted(self, row)
        try:
            made = train(before)
        finally:
            summary = self._ledger.record(*row)
        return made, summary

    patch.setattr(LocalRound, "_counted", counted)


@caught_by("tests/privacy/test_released.py", "test_an_exhausted_client_declines_with_no_arrays")
def exhausted_clients_train(patch: Patch) -> None:
    """A client whose budget is spent trains and answers without a row."""

    def unlimited(pays: Any) -> Any:
        def paid(self: Ledger, own: Account, *rest: Any) -> Any:
            with suppress(FedLoRAError):
                return pays(self, own, *rest)
            return self.summary(own)

        return paid

    for name in ("record", "vouch"):
        patch.setattr(Ledger, name, unlimited(getattr(Ledger, name)))


@caught_by(REPEATS, "test_fresh_noise_and_rounds_without_a_number_always_count[False-1]")
def a_repeated_round_counts_once(patch: Patch) -> None:
    """A round that is asked again gets no row, though its noise is another."""
    record = Ledger.record

    def recorded(self: Ledger, own: Account, number: int, *rest: Any) -> Any:
        with self.reading() as db:
            found = db.execute(
                "SELECT id FROM releases WHERE client = ? AND run = ? AND round = ?",
                (own.client, own.run, number),
            ).fetchone()
        return self.summary(own) if found else record(self, own, number, *rest)

    patch.setattr(Ledger, "record", recorded)


@caught_by(REPEATS, "test_records_that_changed_meanwhile_are_another_release")
def other_answers_to_one_question(patch: Patch) -> None:
    """A row pays for every answer to its question, though the records have changed."""
    patch.setattr(local_round, "digest_of", lambda arrays: "the same")


@caught_by(
    "tests/clients/test_numpy_client.py",
    "test_a_server_that_names_no_round_does_not_get_the_same_noise_twice",
)
def rounds_without_a_number_repeat(patch: Patch) -> None:
    """A server that names no round gets the noise of the first round each time."""
    manner = LocalRound._manner

    def made(self: LocalRound, order: Any, summary: Any) -> Any:
        return manner(self, order, replace(summary, steps=self._trainer.config.local_steps))

    patch.setattr(LocalRound, "_manner", made)


@caught_by(
    "tests/privacy/test_ledger_file.py",
    "test_a_damaged_ledger_is_named_and_refused[last row deleted]",
)
def lost_rows_are_not_missed(patch: Patch) -> None:
    """A ledger is not compared with its witness, so a row that is gone gives its budget back."""
    follow = LedgerFile._follow
    patch.setattr(LedgerFile, "_follow", lambda self, db, head, seen: follow(self, db, head, None))


@caught_by(LEDGER, "test_a_row_that_came_while_epsilon_was_worked_out_counts")
def rows_are_not_compared_again(patch: Patch) -> None:
    """A row is written although another one has come since the budget was looked at."""
    patch.setattr(ledger_batch, "_same", lambda now, before: True)


@caught_by("tests/privacy/test_ledger_batch.py", "test_no_reply_leaves_without_its_row")
def rows_held_back_are_lost(patch: Patch) -> None:
    """A simulation passes replies on although their rows are not on the disk."""
    patch.setattr(Batch, "write", lambda self: None)


@caught_by("tests/privacy/test_ledger_batch.py", "test_a_failure_counts_before_its_error_leaves")
def failures_leave_before_their_rows(patch: Patch) -> None:
    """An error leaves a simulated client while its row is held back."""
    patch.setattr(Ledger, "flush", lambda self: None)


@caught_by("tests/privacy/test_ledger_file.py", "test_the_ledger_is_its_owners_alone")
def a_ledger_in_an_open_folder(patch: Patch) -> None:
    """Every user of the machine may look into the ledger's folder."""
    patch.setattr(
        ledger_file, "private_folder", lambda path: path.mkdir(parents=True, exist_ok=True)
    )
