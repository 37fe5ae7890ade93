"""``python -m fedlora_flwr.cli`` is ``fedlora``."""

from fedlora_flwr.cli import app

app(prog_name="fedlora")
