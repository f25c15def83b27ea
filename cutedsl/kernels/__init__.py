"""Kernels, one file per operator and architecture; each file needs the CuTe DSL, importing this package does not."""
