"""Settings that runs of comparisons share in tests: two clients, one round."""

from __future__ import annotations

from fedlora_flwr.config import RunConfig

SHARED = RunConfig.of(
    {
        "partitioner": "iid",
        "num-clients": 2,
        "num-rounds": 1,
        "local-steps": 2,
        "device": "cpu",
        "reproducible": True,
    }
)
