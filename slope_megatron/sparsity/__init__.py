"""The mathematics of N:M sparse training in plain torch: no kernels, no ranks, any device."""
