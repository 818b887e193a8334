"""What the products read of a packed weight: one file a layout."""
