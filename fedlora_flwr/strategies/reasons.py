"""What a failed client's error says, in one sentence of a round's report."""

from __future__ import annotations

import re

_LONGEST = 20_000  # characters
_MOST_LINES = 6  # of a message
_RAYS_WORDS = "worker process has died"
WORKER_DIED = "its worker process died: killed, or out of memory"
_NO_BRIDGE = "fitins.parameters"  # what Flower's own translation of a NumPyClient looks for
_RAISED = re.compile(r"<class '[\w.]+'>:<'(.*)'>", re.DOTALL)  # A SuperNode's, around an error's
_FRAME = re.compile(r"\s*File \".*\", line \d+")


def reason_of(text: str | None) -> str:
    """Return what an error's text says: its message, without the traceback before it.

    A message of several lines is joined, since its first line says what is wrong and the others say
    where. A client may send any text, of any length: only its end is looked at.
    """
    text = (text or "")[-_LONGEST:]
    if _RAYS_WORDS in text:
        return WORKER_DIED
    if _NO_BRIDGE in text:
        return "it is a NumPyClient: serve it with ClientApp(client_fn, mods=[fedlora_flwr.bridge])"
    message = _after_frames(_RAISED.sub(r"\1", text).splitlines())
    lines = [line.strip() for line in message if line.strip(" '>")]
    return " ".join(lines[:_MOST_LINES]) if lines else "no reason given"


def _after_frames(lines: list[str]) -> list[str]:
    """Return the lines after those of a traceback; all of them if there is none."""
    frames = [number for number, line in enumerate(lines) if _FRAME.match(line)]
    if not frames:
        return lines
    after = range(frames[-1] + 1, len(lines))
    return lines[next((n for n in after if not lines[n].startswith((" ", "\t"))), -1) :]
