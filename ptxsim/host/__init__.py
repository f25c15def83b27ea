"""The host side: launches of compiled CuTe DSL functions, taken without a GPU."""
