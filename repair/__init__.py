"""Locate, repair and prove: removing a known backdoor from a language model."""

__version__ = "0.1.0"
