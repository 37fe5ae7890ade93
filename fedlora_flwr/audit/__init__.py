"""Audits: how much an attacker learns from what really runs, as a lower bound on ε."""
