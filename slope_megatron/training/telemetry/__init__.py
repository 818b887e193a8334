"""What a run says of itself: metrics, memory, FLOPs, bytes."""
