"""The coordinator and the shards: who decides what is trained where, and who owns the layers."""
