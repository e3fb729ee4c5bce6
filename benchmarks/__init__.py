"""The numbers of SPECIFICATION.md, measured again: `make bench [NAME=wake|deploy|cli|memory]`.

Each benchmark brings up a box of its own, so it needs root and what `scripts/install --tests` installs.
"""
