"""The symbols by which the model knows media and tasks, and the pieces of a tokenizer that stand for them."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any

from dsmoe_vl.config.task_table import TASKS

# By their names in the recipe. A task's is in its row of the task table.
CONTROLS: dict[str, str] = {
    "image": "<image>",
    "video": "<video>",
    "frame": "<frame>",
    "embed": "<embed>",
    **{spec.name: spec.symbol for spec in TASKS if not spec.hears},
}
CONTROL_SYMBOLS = tuple(CONTROLS.values())
# Of models with a speech encoder, after the others. Tokenizers are made without them.
SPEECH_CONTROLS: dict[str, str] = {"speech": "<speech>", **{spec.name: spec.symbol for spec in TASKS if spec.hears}}

_Pieces: Any = make_dataclass("_Pieces", [(name, str, "") for name in {**CONTROLS, **SPEECH_CONTROLS}], frozen=True)


class ControlsConfig(_Pieces):
    """A piece of the tokenizer for each symbol: one that no text consists of. Empty: the piece with the symbol's name
    if that is one, else a row after the last piece."""
