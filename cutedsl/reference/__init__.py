"""The operators in plain torch: the definition of a right answer, and the backend that runs anywhere.

Activations are quantized as a kernel would (W4A4), codes times block scales are exact in BF16, products of two such numbers
are exact in FP32, sums are FP32, and the tensor scales are applied in FP32 before the one rounding to BF16. Hardware
with FP4 computes the same function up to the order of summation.

Or activations stay BF16 (W4A16), which hardware without FP4 does at less cost: a matrix without scale groups, as
`runners.pack_matrix(..., activations="bf16")` makes it, takes x itself. The definition then differs in two places only: alpha
is weight_scale_2 alone, and what SwiGLU gives is rounded to BF16 once, to be the second matrix's x. The matrix says
which of the two it is made for, so that alpha and activation cannot disagree.
"""
