"""`nvfp4 doctor`: says before a load whether a checkpoint will serve, and on what."""
