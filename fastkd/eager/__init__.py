"""The PyTorch backend: blocks of rows in the cache, closed-form gradients; files as in kernels/."""
