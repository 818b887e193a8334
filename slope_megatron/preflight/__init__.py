"""`slope preflight`: looks at nodes before a run."""
