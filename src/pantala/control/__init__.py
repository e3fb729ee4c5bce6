"""Use cases, reconcilers and workflows of the control plane."""
