"""One client's mechanism, from a run's budget and the number of its records."""

from __future__ import annotations

from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.account import UNBOUND, Terms
from fedlora_flwr.privacy.budget import calibrate, check_budget
from fedlora_flwr.privacy.lifetime import calibrate_run
from fedlora_flwr.privacy.mechanism import Mechanism


def calibrated_mechanism(
    config: RunConfig,
    num_records: int,
    *,
    terms: Terms = UNBOUND,
) -> Mechanism:
    """Work out one client's mechanism: σ from its own q and the planned number of steps.

    Parameters
    ----------
    config : RunConfig
        Budget, ledger scope, clip norm, batch size and planned steps. All planned steps count,
        also where a round takes only a share of the clients: which rounds a client joins is the
        server's choice, and it may join all of them.
    num_records : int
        The client's number of records n.
    terms : Terms
        What earlier runs on the client's data have fixed (see `Ledger.terms`).

    Raises
    ------
    InvalidValue
        The client cannot keep the promise: δ >= 1/n, or more records a batch than it has.
    """
    if not config.private:
        # Still clipped, so that noise alone separates a run from its private twin.
        batch_size = min(config.batch_size, num_records)
        return Mechanism(0.0, config.clip_norm, batch_size, num_records)
    check_budget(config.epsilon, config.delta, config.batch_size, num_records)
    rate, steps = config.batch_size / num_records, config.planned_steps
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
    # Less noise than the first run's would be refused, where that run has fixed it.
    sigma = max(sigma, terms.noise_multiplier)
    return Mechanism(sigma, config.clip_norm, config.batch_size, num_records)
