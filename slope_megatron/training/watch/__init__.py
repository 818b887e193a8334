"""Looking at a run while it trains: ranks that die, steps that go wrong."""
