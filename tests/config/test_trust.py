"""What fits a secure sum, and what is refused before a run."""

from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.clients.device import Device
from fedlora_flwr.config import RunConfig, device_config
from fedlora_flwr.config.settled import check_counted
from fedlora_flwr.errors import InvalidValue, OrderRefused

SUM: dict[str, Any] = {
    "trust-model": "secure-sum", "sample-rate": 0.1, "local-steps": 1, "delta": 1e-5,
    "strategy": "ffa-lora",
}  # fmt: skip


@pytest.mark.parametrize(
    "strategy", ["ffa-lora", "ffa-seeds", "rolora", "as-lora", "la-lora", "dp-lora", "fedsvd"]
)
def test_methods_that_work_with_a_mean_work_with_a_sum(strategy: str) -> None:
    assert RunConfig.of(SUM, {"strategy": strategy}).secure_sum


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("flexlora", "needs each upload"),
        ("flora", "needs each upload"),
        ("fedex-lora", "needs each upload"),
        ("fedsa-lora", "leaves a factor or a model with each client"),
        ("mr-mtl", "leaves a factor or a model with each client"),
    ],
)
def test_other_methods_are_refused_with_the_reason(strategy: str, why: str) -> None:
    with pytest.raises(InvalidValue, match=f"strategy = '{strategy}' .*{why}"):
        RunConfig.of(SUM, {"strategy": strategy})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample-rate", 0.0),
        ("local-steps", 2),
        ("epsilon", float("inf")),
        ("weighting", "size"),
        ("weighting", "inverse-noise"),
        ("share-head", False),
        ("client-ranks", "2,4"),
        ("server-optimizer", "adam"),
        ("dropouts", 10),
        ("clip-norm", float("inf")),
    ],
)
def test_what_a_sum_is_not_made_for_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        RunConfig.received(SUM, {"num-clients": 10, key: value})

    assert caught.value.key == key


def test_the_server_of_a_sum_must_know_among_how_many_the_noise_is_shared() -> None:
    with pytest.raises(InvalidValue, match="num-clients = 0 cannot be used"):
        check_counted(RunConfig.of(SUM))
    check_counted(RunConfig.of(SUM, {"num-clients": 4}))
    check_counted(RunConfig())


@pytest.mark.parametrize(
    ("key", "value"), [("sample-rate", 0.1), ("dropouts", 1), ("colluding", 1)]
)
def test_keys_of_a_sum_mean_nothing_without_one(key: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match="or trust-model = 'secure-sum'"):
        RunConfig.of({key: value})


def test_a_devices_file_may_name_a_secure_sum_and_leave_its_numbers_to_the_run(
    tmp_path: Path,
) -> None:
    file = tmp_path / "device.toml"
    text = 'client-id = "ward"\ntask = "digits"\nepsilon = 1.0\ndelta = 1e-5\ntrust-model = "{}"\n'
    whole = text.format("secure-sum") + f'peers = "any"\ncolluding = {SUM.get("colluding", 0)}\n'
    file.write_text(whole)

    assert Device.read(file).config(SUM).secure_sum
    for key in ("peers", "colluding"):
        lines = [line for line in whole.splitlines() if not line.startswith(key)]
        file.write_text("\n".join(lines))
        with pytest.raises(InvalidValue, match=f"^{key} = None"):
            Device.read(file)
    file.write_text(text.format("central"))
    with pytest.raises(InvalidValue, match="trust-model = 'central'"):
        Device.read(file)


def test_a_device_takes_part_in_the_trust_model_of_its_own_file_alone() -> None:
    own = {"task": "digits", "trust-model": "secure-sum", "delta": 1e-5}
    own["colluding"] = SUM.get("colluding", 0)

    assert device_config(SUM, own).least_shares == 2
    for file in ({"task": "digits"}, {"task": "digits", "trust-model": "local"}):
        with pytest.raises(OrderRefused, match="trust-model = 'secure-sum' is refused"):
            device_config(SUM, file)
    with pytest.raises(OrderRefused, match="trust-model = 'local' is refused"):
        device_config({"trust-model": "local"}, own)
    # How many clients may side with the server is no server's to say.
    with pytest.raises(OrderRefused, match="colluding = '2' is refused"):
        device_config({**SUM, "colluding": 2}, own)
    # A run that names none would have its noise added by each client, and the file says otherwise.
    with pytest.raises((OrderRefused, InvalidValue), match="sample-rate"):
        device_config({}, own)
