"""The workers: forward passes streamed through the shards, and backward passes computed away from them."""
