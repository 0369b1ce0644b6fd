"""`bascule blame`: name the ranks that held a hung job up, from PyTorch Flight Recorder dumps. No torch."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bascule.guard import blame
from bascule.stages.answer import Answer


def main(arguments: Namespace) -> Answer:
    """Exit 0 whether somebody is named or not; 2 when the folder holds no dumps."""
    found = blame.blame(Path(arguments.folder))
    return Answer(text="\n".join(blame.describe(found)), data=found.to_json())
