"""Breaks of what leaves a device, and of who decides there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora_flwr.clients import guarded, local_round, local_store
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer, LocalUpdate
from fedlora_flwr.config import Limit, on_device
from fedlora_flwr.data import splits_apart
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.released import Released
from fedlora_flwr.wire import order as orders
from fedlora_flwr.wire.order import Order
from tests.breaks.breaks import caught_by, everywhere

Patch = pytest.MonkeyPatch
RELEASED = "tests/privacy/test_released.py"
ROUND = "tests/clients/test_local_round.py"
SHARED = "tests/clients/test_shared_factor.py"
BRIDGE = "tests/clients/test_bridge.py"
DEVICE = "tests/config/test_on_device.py"
ORDER = "tests/wire/test_order.py"
SILENT = "test_a_device_that_is_silent_has_the_packages_default"

# --- what a reply holds ---


@caught_by(RELEASED, "test_a_reply_holds_what_is_documented_and_nothing_else")
def raw_loss_in_metrics(patch: Patch) -> None:
    """The loss on private records is in every reply."""

    def measured(self: LocalRound, records: Any) -> dict[str, float]:
        return self._trainer.task.evaluate(self._trainer.adapted.model, records)

    patch.setattr(LocalRound, "_unprotected", measured)


@caught_by(ROUND, "test_the_number_of_records_is_released_only_where_it_is_the_weight")
def number_of_records_without_being_asked(patch: Patch) -> None:
    """A reply tells the number of records where it is not the weight."""
    release = LocalRound._release

    def released(self: LocalRound, *given: Any) -> Released:
        return replace(release(self, *given), num_examples=len(self._open()))

    patch.setattr(LocalRound, "_release", released)


@caught_by(RELEASED, "test_under_uniform_weighting_no_size_leaves")
def weights_by_size(patch: Patch) -> None:
    """The weight is the number of records where equal weights were promised."""
    patch.setattr(Mechanism, "weight", lambda made, weighting: float(made.num_records))


@caught_by(
    "tests/hostile/test_orders.py",
    "test_the_device_says_whether_its_size_or_noise_is_told[uniform]",
)
def a_message_chooses_the_weighting(patch: Patch) -> None:
    """A message that asks for weights by size gets them where the device forbids it, too."""
    patch.setattr(local_round, "check_asked", lambda order, config: None)


@caught_by(
    "tests/clients/test_trainer.py",
    "test_an_upload_holds_what_the_plan_trains_and_nothing_else[plan0-3-kinds0]",
)
def raw_gradient_of_the_frozen_factor(patch: Patch) -> None:
    """The upload also holds the frozen factor's gradient, which got neither clip nor noise."""
    honest = LocalTrainer.train

    def trained(
        self: LocalTrainer, arrays: Any, plan: Any, records: Any, *rest: Any, **named: Any
    ) -> LocalUpdate:
        sent = honest(self, arrays, plan, records, *rest, **named).arrays
        frozen = [name for name in self.adapted.parameters if name not in sent]
        raw = self.engine.gradients_by_record(records, torch.arange(len(records)), frozen)
        return LocalUpdate({**sent, **{n: g.sum(0).numpy() for n, g in raw.items()}})

    patch.setattr(LocalTrainer, "train", trained)


@caught_by(SHARED, "test_only_a_leaves_and_the_rest_is_kept")
def the_factor_that_stays_leaves(patch: Patch) -> None:
    """B and the head leave a client that was to keep them."""
    patch.setattr(Order, "leaves", lambda self, name: True)


# --- figures on private records ---


@caught_by(RELEASED, "test_evaluation_on_private_records_is_refused")
def evaluation_on_private_records(patch: Patch) -> None:
    """A message that asks for it gets the loss on private records."""

    def measured(self: LocalRound, order: Order, arrays: Any) -> dict[str, float]:
        whole, own = self._complete(order, arrays, order.server_round + 1)
        self._trainer.load({**whole, **own})
        return self._trainer.task.evaluate(self._trainer.adapted.model, self._open())

    patch.setattr(LocalRound, "measure", measured)


@caught_by(SHARED, "test_personal_evaluation_reads_public_records_only")
def personal_evaluation_on_private_records(patch: Patch) -> None:
    """A client that keeps a factor evaluates it on its own records."""
    made = LocalRound.__init__

    def begin(self: LocalRound, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        self._open_test = self._open

    patch.setattr(LocalRound, "__init__", begin)


@caught_by(
    "tests/data/test_splits_apart.py", "test_one_record_in_both_is_refused_in_any_form[1-csv]"
)
def private_records_in_the_test_split(patch: Patch) -> None:
    """A device evaluates on a split that holds one of its private records."""
    everywhere(patch, splits_apart.check_records_apart, lambda *given, **named: None)


# --- errors ---


@caught_by(BRIDGE, "test_what_a_library_says_about_records_stays_on_the_client")
def errors_quote_records(patch: Patch) -> None:
    """The text of any error travels, and a library's text may quote a record."""
    everywhere(patch, guarded.guarded, lambda call, *given: call(*given))


@caught_by(BRIDGE, "test_a_panic_of_a_library_in_rust_is_an_error_like_any_other")
def panics_quote_records(patch: Patch) -> None:
    """Errors are guarded, and panics of a library in Rust are not."""
    honest = guarded.guarded

    def guarding(call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except Exception as error:
            failed = error
        except BaseException as panic:
            raise RuntimeError(str(panic)) from None
        return honest(_raising(failed))

    everywhere(patch, honest, guarding)


def _raising(error: Exception) -> Callable[[], None]:
    def again() -> None:
        raise error

    return again


@caught_by(
    "tests/hostile/test_ten_rows.py",
    "test_8_a_failure_after_the_first_batch_is_in_the_ledger[refusing-1]",
)
def refusals_of_a_task_are_believed(patch: Patch) -> None:
    """A task's own code may call its error a refusal, whose text travels, with records open."""
    patch.setattr(local_round, "untold", nullcontext)


# --- who decides ---


def run_decides(patch: Patch, key: str) -> None:
    """Let a run's value win over the device's own."""
    honest = on_device._decided
    patch.setattr(
        on_device,
        "_decided",
        lambda run, own: {**honest(run, own), **{k: v for k, v in run.items() if k == key}},
    )


@caught_by(DEVICE, SILENT + "[epsilon]")
def a_run_chooses_epsilon(patch: Patch) -> None:
    """The budget is the one that the server sends."""
    run_decides(patch, "epsilon")


@caught_by(DEVICE, SILENT + "[ledger-scope]")
def a_run_chooses_the_scope(patch: Patch) -> None:
    """A server turns a budget for life into one for each run."""
    run_decides(patch, "ledger-scope")


@caught_by(DEVICE, SILENT + "[state-dir]")
def a_run_chooses_the_ledgers_folder(patch: Patch) -> None:
    """A server names a folder without a ledger, and with it a fresh budget."""
    run_decides(patch, "state-dir")


@caught_by(DEVICE, SILENT + "[test-split]")
def a_run_chooses_the_test_split(patch: Patch) -> None:
    """A server lets a device evaluate on the split that it trains on."""
    run_decides(patch, "test-split")


@caught_by(
    "tests/clients/test_device.py", "test_noise_follows_no_servers_seed_unless_the_device_says_so"
)
def a_run_chooses_reproducible_noise(patch: Patch) -> None:
    """A server lets a device's noise follow a seed that the server knows."""
    run_decides(patch, "reproducible")


def unlimited(patch: Patch, key: str) -> None:
    """Let a run have any value of a key that the device's file limits."""
    honest = Limit.check
    patch.setattr(
        Limit, "check", lambda self, value: None if self.key == key else honest(self, value)
    )


@caught_by(DEVICE, "test_a_device_limits_a_run_further[run1-True]")
def clip_norm_beyond_the_limit(patch: Patch) -> None:
    """A run's clip norm may be above the limit in the device's file."""
    unlimited(patch, "clip-norm")


@caught_by(DEVICE, "test_a_device_limits_a_run_further[run5-True]")
def steps_beyond_the_limit(patch: Patch) -> None:
    """A run may take more steps per round than the device's file allows."""
    unlimited(patch, "local-steps")


# --- arrays that a server has chosen ---


@caught_by(ORDER, "test_arrays_that_no_honest_run_sends_are_refused[nan]")
def arrays_that_are_no_numbers(patch: Patch) -> None:
    """Arrays with NaN are accepted, with which every record's gradient is broken."""
    honest = orders._numbers
    patch.setattr(
        orders,
        "_numbers",
        lambda name, array: array if np.isnan(array).any() else honest(name, array),
    )


@caught_by(ORDER, "test_arrays_that_no_honest_run_sends_are_refused[3e+38]")
def huge_arrays(patch: Patch) -> None:
    """Arrays of any size are accepted, with which padding decides how a record is read."""
    patch.setattr(orders, "MOST_ENTRY", float("inf"))


@caught_by(ROUND, "test_a_device_looks_at_the_model_in_each_round_and_a_simulation_does_not[True]")
def arrays_of_a_server_are_trusted(patch: Patch) -> None:
    """A device takes the arrays of a server for its own: passes follow the other records."""
    manner = LocalRound._manner

    def trusting(self: LocalRound, order: Order, summary: Any) -> Any:
        stream, _, number = manner(self, order, summary)
        return stream, False, number

    patch.setattr(LocalRound, "_manner", trusting)


# --- at rest ---


@caught_by("tests/clients/test_local_store.py", "test_what_is_kept_is_its_owners_alone")
def kept_factors_in_an_open_folder(patch: Patch) -> None:
    """Every user of the machine may read the factors that stay with the client."""
    patch.setattr(
        local_store, "private_folder", lambda path: path.mkdir(parents=True, exist_ok=True)
    )
