"""hotpixd: which pixels of a camera sensor are hot, stuck or dead, with a stated certainty."""

__version__ = "0.1.0"
