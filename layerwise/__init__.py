"""Asynchronous layer-wise training of one model across machines that differ, are slow, or come and go."""
