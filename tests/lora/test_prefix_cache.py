"""What frozen first layers make of a record is computed once, and nothing else changes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.lora.precision import run_in_bf16
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.conftest import MakeConfig
from tests.models import LLAMA, PLAIN_SGD, ROBERTA, SWIN, VIT, Family, active
from tests.support.forks import forked

# The last block, and the block in the middle that nothing but the cache leaves out.
LATE = {
    VIT: (r"blocks\.1\.attn\.qkv", "blocks.0.attn"),
    SWIN: (r"layers\.1\.blocks\.\d+\.attn\.qkv", "layers.0.blocks.0.attn"),
    ROBERTA: (r".*layer\.1\..*\.(query|value)", "roberta.encoder.layer.0.attention"),
    LLAMA: (r".*layers\.1\..*\.(q_proj|v_proj)", "model.layers.0.self_attn"),
}
HALF = Mechanism(1.0, 1.0, 20, 40)
GIB = 2**30


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def late(family: Family, targets: str | None = None, **changes: Any) -> AdaptedModel:
    spec = replace(family.spec(), targets=targets or LATE[family][0], **changes)
    model: Any = family.model().float()
    if family is LLAMA:
        model.config.use_cache = False  # As the package's tasks do.
    adapted = attach(model, spec, seed=1)
    with torch.no_grad():
        for number, p in enumerate(adapted.parameters.values()):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    return adapted


def records_of(family: Family, count: int = 40) -> TensorRecords:
    found = family.records(count).batch(torch.arange(count))
    return TensorRecords({k: v.float() if v.is_floating_point() else v for k, v in found.items()})


def trained(
    adapted: AdaptedModel, family: Family, mode: str, exact: bool = False, steps: int = 6
) -> dict[str, Tensor]:
    """Take private steps, and measure the model after each."""
    engine, records = PrivateEngine(adapted, family.losses), records_of(family)
    names = [n for n in active(adapted, "*") if "lora" not in n] if mode == "-" else None
    generator = torch.Generator().manual_seed(0)
    engine.start_round(HALF, PLAIN_SGD, SeededNoise(3), exact=exact)
    measured = []
    for _ in range(steps):
        indices = torch.randperm(len(records), generator=generator)[:23]
        engine.step(records, indices, names or active(adapted, mode))
        with torch.inference_mode():
            batch = records.batch(torch.arange(30))
            measured.append(family.losses(adapted.model, batch).clone())
    arrays = {name: p.detach().clone() for name, p in adapted.parameters.items()}
    return {**arrays, "measured": torch.stack(measured)}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@contextmanager
def calls_of(adapted: AdaptedModel, name: str) -> Iterator[list[int]]:
    """Count the records that a module sees."""
    seen: list[int] = []
    module = adapted.model.get_base_model().get_submodule(name)
    handle = module.register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("mode", ["B", "*"])
@pytest.mark.parametrize("family", LATE, ids=lambda family: family.name)
def test_steps_and_evaluations_have_the_same_bits(family: Family, mode: str, exact: bool) -> None:
    expected = trained(late(family), family, mode, exact)
    adapted = late(family)
    cache = PrefixCache(adapted, GIB)
    assert_equal(trained(adapted, family, mode, exact), expected)
    assert len(cache) >= 40
    # Now every record is known, and the first block does not run any more.
    with calls_of(adapted, LATE[family][1]) as seen, torch.no_grad():
        family.losses(adapted.model, records_of(family).batch(torch.arange(9)))
    assert not seen


@pytest.mark.parametrize(
    ("family", "mode"),
    [(VIT, "-"), (SWIN, "-"), (ROBERTA, "-"), *((family, "B") for family in LATE)],
    ids=lambda value: value.name if isinstance(value, Family) else value,
)
def test_bf16_has_the_same_bits(family: Family, mode: str) -> None:
    """In bf16, steps and evaluations may attend with different kernels."""

    def lower(adapted: AdaptedModel) -> AdaptedModel:
        run_in_bf16(adapted.model)
        return adapted

    expected = trained(lower(late(family)), family, mode)
    adapted = lower(late(family))
    cache = PrefixCache(adapted, GIB)
    assert_equal(trained(adapted, family, mode), expected)
    assert len(cache) >= 40


@pytest.mark.parametrize("family", [VIT, SWIN, ROBERTA], ids=lambda family: family.name)
def test_training_the_head_alone_needs_no_block(family: Family) -> None:
    targets = family.targets
    expected = trained(late(family, targets), family, "-")
    adapted = late(family, targets)
    cache = PrefixCache(adapted, GIB)
    cache.follow(family.head)
    assert_equal(trained(adapted, family, "-"), expected)
    with calls_of(adapted, LATE[family][1]) as seen, torch.no_grad():
        family.losses(adapted.model, records_of(family).batch(torch.arange(9)))
    assert not seen


def test_other_adapters_below_the_head_are_noticed() -> None:
    adapted, batch = late(VIT, VIT.targets), records_of(VIT).batch(torch.arange(20))
    cache = PrefixCache(adapted, GIB)
    cache.follow(("head.weight",))
    arrays, seen = adapted.read(), []
    with torch.no_grad():
        for scale in (1.0, 2.0, 1.0):
            adapted.write({name: scale * array for name, array in arrays.items()})
            seen.append(VIT.losses(adapted.model, batch))
            seen.append(VIT.losses(adapted.model, batch))
            cache._busy = True
            assert torch.equal(seen[-1], VIT.losses(adapted.model, batch))
            cache._busy = False
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[4], seen[0])


def test_a_frozen_weight_that_changes_is_noticed() -> None:
    adapted, batch = late(VIT), records_of(VIT).batch(torch.arange(20))
    cache = PrefixCache(adapted, GIB)
    with torch.no_grad():
        before = VIT.losses(adapted.model, batch)
        adapted.model.get_base_model().patch_embed.proj.weight.mul_(2)
        after = VIT.losses(adapted.model, batch)
        assert len(cache) == 20
        cache._busy = True
        assert torch.equal(after, VIT.losses(adapted.model, batch))
    assert not torch.equal(before, after)


def test_all_that_a_model_reads_tells_records_apart() -> None:
    adapted = late(ROBERTA)
    cache = PrefixCache(adapted, GIB)
    batch = dict(records_of(ROBERTA).batch(torch.arange(10)))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        ROBERTA.losses(adapted.model, batch)
        batch["attention_mask"][:, 4:] = 0
        masked = ROBERTA.losses(adapted.model, batch)
        cache._busy = True
        assert torch.equal(masked, ROBERTA.losses(adapted.model, batch))


def test_dropout_below_the_cut_is_drawn_again() -> None:
    def build(cached: bool) -> AdaptedModel:
        adapted = late(VIT)
        for module in adapted.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        if cached:
            PrefixCache(adapted, GIB)
        return adapted

    torch.manual_seed(5)
    expected = trained(build(False), VIT, "B")
    torch.manual_seed(5)
    assert_equal(trained(build(True), VIT, "B"), expected)


class Plain(nn.Module):
    """A model that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.first(x)).relu()))
        return out


class Skips(nn.Module):
    """A model whose head also reads what the first layer makes, which no later layer passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        out: Tensor = self.head(self.third(self.second(first).relu()) + first)
        return out


class Tied(nn.Module):
    """A model that reads the head's weight in its first layer, without calling the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.third = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.first(x @ self.third_weight()).relu()))
        return out

    def third_weight(self) -> Tensor:
        found: Any = self.third
        return found.lora_A.default.weight.T @ found.lora_A.default.weight  # type: ignore[no-any-return]


class Mixes(nn.Module):
    """A model whose second layer reads what depends on the other records."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.norm(self.first(x))).relu()))
        return out


def test_a_model_that_also_returns_keys_and_values_is_left_alone() -> None:
    adapted, batch = late(LLAMA), records_of(LLAMA).batch(torch.arange(12))
    cache = PrefixCache(adapted, GIB)
    with torch.no_grad():
        adapted.model(input_ids=batch["input_ids"], use_cache=True)
        found = adapted.model(input_ids=batch["input_ids"], use_cache=True)
    assert found.past_key_values.get_seq_length(0) == batch["input_ids"].shape[1]
    assert len(cache) == 0


@pytest.mark.parametrize(("kind", "cut"), [(Plain, 12), (Skips, 12), (Tied, 0), (Mixes, 12)])
def test_a_model_is_cut_where_its_results_stay_the_same(
    kind: Callable[[], nn.Module], cut: int
) -> None:
    torch.manual_seed(0)
    adapted = attach(kind(), LoRASpec(2, 4.0, 0.0, "third", ("head",)), seed=1)
    adapted.model.eval()
    x = torch.randn(12, 8)
    cache = PrefixCache(adapted, GIB)
    for scale in (1.0, 3.0):
        with torch.no_grad():
            adapted.parameters["third.lora_A.weight"].mul_(scale)
            found = [adapted.model(part) for part in (x, x, x[:7], x[2:])]
            cache._busy = True
            expected = [adapted.model(part) for part in (x, x, x[:7], x[2:])]
            cache._busy = False
        assert all(map(torch.equal, found, expected))
        assert len(cache) == cut


@pytest.mark.parametrize("limit", [0, 9_000, 15_000])
def test_a_file_that_is_full_costs_time_only(limit: int) -> None:
    expected = trained(late(VIT), VIT, "B")
    adapted = late(VIT)
    cache = PrefixCache(adapted, limit)
    assert_equal(trained(adapted, VIT, "B"), expected)
    assert len(cache) < 40
    assert (len(cache) > 0) == (limit > 0)


def test_a_folder_that_cannot_be_written_costs_time_only(cache_home: Path) -> None:
    cache_home.write_text("a file in the place of the folder")
    expected = trained(late(VIT), VIT, "B")
    adapted = late(VIT)
    PrefixCache(adapted, GIB)
    assert_equal(trained(adapted, VIT, "B"), expected)


def test_the_file_has_no_name_and_ends_with_its_model(cache_home: Path) -> None:
    def held() -> list[str]:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        names = [str(link.readlink()) for link in links if link.exists() or link.is_symlink()]
        return [name for name in names if name.startswith(str(cache_home))]

    adapted = late(VIT)
    PrefixCache(adapted, GIB)
    trained(adapted, VIT, "B")
    assert len(held()) == 1
    assert not [path for path in cache_home.rglob("*") if path.is_file()]
    del adapted
    gc.collect()
    assert not held()


def test_a_fork_and_its_parent_do_not_disturb_each_other() -> None:
    adapted, records = late(VIT), records_of(VIT)
    cache = PrefixCache(adapted, GIB)

    def measured(count: int) -> bytes:
        with torch.no_grad():
            found = VIT.losses(adapted.model, records.batch(torch.arange(count)))
        return found.numpy().tobytes()

    before = measured(20)
    assert forked(lambda: measured(20)) == before
    assert forked(lambda: measured(40)) == measured(40)
    assert measured(20) == before
    assert len(cache) == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "ffa-lora", "lora-targets": r"blocks\.3\.attn\.qkv"},
        {"strategy": "head-only"},
        {"strategy": "dp-lora", "lora-targets": r"blocks\.[23]\..*qkv", "precision": "bf16"},
    ],
    ids=["late", "head", "bf16"],
)
def test_a_run_has_the_same_arrays_and_figures(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = []
    for size in (0.0, 1.0):
        folder = tmp_path / str(size)
        config = make_config(**changes, prefix_cache=size, run_dir=str(folder), num_rounds=3)
        config = replace(config, state_dir=str(folder / "state"))
        run_in_process(prepare_run(config), run_dir := RunDirectory(folder), lambda _: None)
        rows: list[Any] = run_dir.rows("rounds")
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append(([(row["accuracy"], row["loss"]) for row in rows], weights))
    assert found[0] == found[1]


def test_a_trainer_follows_the_plan_of_each_round(make_config: MakeConfig) -> None:
    plans = [ComponentPlan.parse(text) for text in ("-", "B", "-", "A")]
    made = []
    for size in (0.0, 1.0):
        trainer = LocalTrainer.build(make_config(prefix_cache=size, local_steps=1))
        records = trainer.task.client_records(0, 3)
        mechanism = Mechanism(1.0, 1.0, 40, len(records))
        assert (trainer.prefix is None) == (size == 0)
        made.append(
            [
                trainer.train(trainer.start, plan, records, mechanism, ("c", number)).arrays
                for number, plan in enumerate(plans)
            ]
        )
    for ours, theirs in zip(*made, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_size_below_zero_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(InvalidValue, match=r"prefix-cache = -1\.0 .*>= 0"):
        make_config(prefix_cache=-1.0)
