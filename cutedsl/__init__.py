"""NVFP4 operators for inference: formats, quantization, contracts, runners, and their definition in plain torch.

Nothing in this package imports vLLM, and importing the package itself imports nothing else, not even torch: a kernel
compiler or a GPU is needed only by the part that uses one.
"""
