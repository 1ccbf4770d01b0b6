"""What runs on the device: kernels in Triton, and the functions that they are made of."""
