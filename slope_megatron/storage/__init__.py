"""How this program treats a disk: locks, what appears whole, links, what an earlier command left, and checksums."""
