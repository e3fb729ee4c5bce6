"""A cluster of 300 hosts and 100,000 machines on one machine for `make bench NAME=api`; `plan.py` says what is real."""
