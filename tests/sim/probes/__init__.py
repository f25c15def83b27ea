"""Probe kernels whose results on a GPU are recorded, and must be the simulator's."""
