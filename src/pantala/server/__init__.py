"""HTTP surfaces over `control`: the Machines API and ours under `/v1`, the registry's tokens. Routes are thin."""
