"""Breaks of what is kept, made or looked at around the private step.

They are of kept activations, weights in the clip, views of pictures, trained adapters that are used
again, and reports.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora_flwr.clients.trainer import LocalTrainer, LocalUpdate
from fedlora_flwr.data.records import Batch
from fedlora_flwr.lora import activations
from fedlora_flwr.lora.model_call import Call
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.report import promise, sections
from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.tasks.views import Views
from fedlora_flwr.trained import opened
from tests.breaks.breaks import caught_by, everywhere

Patch = pytest.MonkeyPatch
PREFIX = "tests/lora/test_prefix_cache.py"
WEIGHTS = "tests/privacy/test_clip_weights.py"
VIEWS = "tests/tasks/test_views.py"
PAGE = "tests/report/test_page.py"

# --- kept activations ---


@caught_by(PREFIX, "test_all_that_a_model_reads_tells_records_apart")
def records_that_share_a_first_input_share_activations(patch: Patch) -> None:
    """Activations are looked up by one of a record's inputs, which another record may share."""
    keys = Call.keys

    def by_one_input(self: Call, salt: bytes) -> list[bytes]:
        kwargs = {name: value for name, value in self.kwargs.items() if name == "input_ids"}
        return keys(Call(self.model, self.args, kwargs, self.rows, self.form), salt)

    patch.setattr(Call, "keys", by_one_input)


@caught_by(PREFIX, "test_a_frozen_weight_that_changes_is_noticed")
def activations_kept_when_frozen_weights_change(patch: Patch) -> None:
    """Activations of other frozen weights are used on, and the step is not that of the model."""
    patch.setattr(PrefixCache, "_refresh", lambda self, cut: None)


@caught_by(PREFIX, "test_the_file_has_no_name_and_ends_with_its_model")
def activations_in_a_file_with_a_name(patch: Patch) -> None:
    """Activations of private records are in a file that stays when the process has ended."""

    class Named:
        """`tempfile`, whose files have names and stay."""

        @staticmethod
        def TemporaryFile(**given: Any) -> Any:
            return (given["dir"] / "activations").open("w+b", given["buffering"])

    patch.setattr(activations, "tempfile", Named)


@caught_by(
    "tests/clients/test_trainer.py",
    "test_an_upload_holds_what_the_plan_trains_and_nothing_else[plan0-3-kinds0]",
)
def activations_leave(patch: Patch) -> None:
    """The upload also holds what the frozen layers make of the client's records."""
    honest = LocalTrainer.train

    def trained(
        self: LocalTrainer, arrays: Any, plan: Any, records: Any, *rest: Any, **named: Any
    ) -> LocalUpdate:
        sent = honest(self, arrays, plan, records, *rest, **named).arrays
        heard: list[Tensor] = []
        layer = self.adapted.layers[0].module
        hook = layer.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
        with torch.no_grad():
            self.task.losses(self.adapted.model, records.batch(torch.arange(len(records))))
        hook.remove()
        return LocalUpdate({**sent, "activations": heard[0].numpy()})

    patch.setattr(LocalTrainer, "train", trained)


# --- weights in the clip, and views ---


@caught_by(WEIGHTS, "test_the_noise_of_a_part_is_divided_by_its_weight")
def weights_are_not_divided_out(patch: Patch) -> None:
    """The sum is not divided by the weights, so noise and signal are not what is stated."""
    scale, by_group = NoisyOptimizer.scale_grad, NoisyOptimizer._by_group

    def undivided(made: NoisyOptimizer) -> None:
        patch.setattr(NoisyOptimizer, "_by_group", lambda made, tensor: iter(()))
        scale(made)
        patch.setattr(NoisyOptimizer, "_by_group", by_group)

    patch.setattr(NoisyOptimizer, "scale_grad", undivided)


@caught_by(WEIGHTS, "test_the_noise_of_a_part_is_divided_by_its_weight")
def the_head_is_divided_by_the_weight_of_b(patch: Patch) -> None:
    """The sum is divided by another part's weight than the one that its gradients were given."""
    scale, by_group = NoisyOptimizer.scale_grad, NoisyOptimizer._by_group

    def turned(made: NoisyOptimizer, tensor: Tensor) -> Any:
        found = list(by_group(made, tensor))
        return [(part, found[place - 1][1]) for place, (part, _) in enumerate(found)]

    def wrongly(made: NoisyOptimizer) -> None:
        patch.setattr(NoisyOptimizer, "_by_group", turned)
        scale(made)
        patch.setattr(NoisyOptimizer, "_by_group", by_group)

    patch.setattr(NoisyOptimizer, "scale_grad", wrongly)


@caught_by(VIEWS, "test_each_view_is_its_own_picture_shifted_and_maybe_mirrored[False-8-8]")
def views_of_two_records(patch: Patch) -> None:
    """A view mixes a picture with the next record's, so a record acts through two gradients."""
    make = Views.__call__

    def mixed(self: Views, batch: Batch) -> Batch:
        pictures = batch[self.field]
        return make(self, {**batch, self.field: (pictures + pictures.roll(1, dims=0)) / 2})

    patch.setattr(Views, "__call__", mixed)


# --- what is done with trained models, and reports ---


@caught_by(
    "tests/trained/test_evaluate.py",
    "test_code_that_a_folder_names_does_not_run_unless_the_caller_names_it",
)
def evaluating_runs_a_folders_code(patch: Patch) -> None:
    """The code that an adapter's folder names runs where somebody evaluates the adapter."""
    patch.setattr(opened, "is_place", lambda task: False)


@caught_by(PAGE, "test_folders_of_the_machine_are_not_told")
def reports_tell_folders(patch: Patch) -> None:
    """A report shows whole paths, with the names of users and hospitals in them."""
    everywhere(patch, sections.shown_value, str)


@caught_by(PAGE, "test_a_run_without_privacy_promises_nothing")
def reports_promise_without_noise(patch: Patch) -> None:
    """A report of a run without noise says what its epsilon would promise."""

    def promised(facts: RunFacts) -> str:
        parts = (promise._trust(facts), promise._meaning(facts), *promise._spent(facts))
        return " ".join(parts)

    everywhere(patch, promise.promise, promised)
