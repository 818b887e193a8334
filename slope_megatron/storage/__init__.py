"""How this program treats a disk: locks, what appears whole, links, and what an earlier command left."""
