"""The operators in plain torch: the definition of a right answer, and the backend that runs anywhere.

Activations are quantized as a kernel would, codes times block scales are exact in BF16, products of two such numbers
are exact in FP32, sums are FP32, and the tensor scales are applied in FP32 before the one rounding to BF16. Hardware
with FP4 computes the same function up to the order of summation.
"""
