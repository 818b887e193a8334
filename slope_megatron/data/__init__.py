"""Text in, batches out: sources -> tokenizer -> prepare (once, on one machine) -> batches (on every rank)."""
