"""The three products of a sparse linear, each behind a backend; the only part that imports `slope_kernels`."""
