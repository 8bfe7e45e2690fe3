"""Why a picture cannot be written."""

from __future__ import annotations


class RewriteError(Exception):
    """A picture cannot be corrected. The message is a sentence for its photographer, without the file's name."""
