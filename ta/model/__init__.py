"""Folders to a module that gives losses, log-probabilities and scores, and back to folders.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ta.faces import face

if TYPE_CHECKING:  # what the package gives, listed here for editors and for face()
    from ta.model import adapters as adapters, export as export, load as load

__getattr__, __all__ = face(__name__, __file__)
