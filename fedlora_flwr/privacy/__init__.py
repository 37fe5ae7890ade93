"""The privacy contract in code: budget, private step, ledger, and what may leave."""
