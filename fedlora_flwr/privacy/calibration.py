"""One client's mechanism, from a run's budget and the client's number of records or users."""

from __future__ import annotations

from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.account import UNBOUND, Terms
from fedlora_flwr.privacy.budget import calibrate, check_budget
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.lifetime import calibrate_run
from fedlora_flwr.privacy.mechanism import Mechanism


def calibrated_mechanism(
    config: RunConfig,
    num_units: int,
    *,
    terms: Terms = UNBOUND,
) -> Mechanism:
    """Work out one client's mechanism: σ from its own q and the planned number of steps.

    Under a secure sum, all clients have the run's q, and σ is the noise of the whole sum: the sum
    is one mechanism on the union of all clients' records, or users.

    Parameters
    ----------
    config : RunConfig
        Budget, ledger scope, clip norm and weights, batch size and planned steps. All planned steps
        count, even if a round asks only some of the clients: the server chooses the rounds of a
        client, and may choose all of them.
    num_units : int
        The client's n: its number of records, or of users where ``unit = "user"``.
    terms : Terms
        What earlier runs on the client's data have fixed (see `Ledger.terms`).

    Raises
    ------
    InvalidValue
        The client cannot keep the promise: δ ≥ 1/n, the batch size is larger than n, or no noise is
        enough for the budget.
    """
    weights = ClipWeights.configured(config)
    if not config.private:
        # Gradients are still clipped, so a run with and a run without privacy differ in noise only.
        batch_size = min(config.batch_size, num_units)
        return Mechanism(
            0.0, config.clip_norm, batch_size, num_units, weights=weights, unit=config.unit
        )
    common = config.sample_rate if config.secure_sum else None
    least = 1 if common else config.batch_size
    check_budget(config.epsilon, config.delta, least, num_units, config.unit)
    expected = common * num_units if common else config.batch_size
    rate, steps = common or config.batch_size / num_units, config.planned_steps
    if config.ledger_scope == "lifetime" and (config.run_epsilon or terms.order):
        sigma = calibrate_run(
            config.epsilon,
            config.delta,
            rate,
            steps,
            run_epsilon=config.run_epsilon or config.epsilon,
            order=terms.order,
        )
    else:
        sigma = calibrate(config.epsilon, config.delta, rate, steps)
    # Where the first run has fixed σ, the ledger would refuse a smaller one.
    sigma = max(sigma, terms.noise_multiplier)
    return Mechanism(sigma, config.clip_norm, expected, num_units, common, weights, config.unit)
