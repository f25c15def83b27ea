"""Public kernels that their authors tested on hardware, run in the simulator and compared with NumPy."""
