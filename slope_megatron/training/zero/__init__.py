"""DeepSpeed ZeRO: what it partitions, and how gradients come to its partitions."""
