"""`slope bench`: 2:4 products, blocks, steps and models against dense ones on this machine."""
