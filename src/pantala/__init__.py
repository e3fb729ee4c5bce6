"""Pantala: your own Fly.io on your own servers."""
