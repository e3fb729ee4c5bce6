"""Pantala: your own Fly.io on your own servers."""

__version__ = "0.1.0"
