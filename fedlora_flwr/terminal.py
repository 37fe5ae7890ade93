"""What every command does with an error."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console

from fedlora_flwr.errors import FedLoRAError


def guard(work: Callable[[], None]) -> None:
    """Turn an error that the package raises on purpose into one message and exit code 1."""
    try:
        work()
    except FedLoRAError as error:
        Console(stderr=True).print(f"Error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        raise typer.Exit(130) from None
