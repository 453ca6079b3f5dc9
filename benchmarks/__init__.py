"""Measurements: of layerwise, of its peers, of the machine. ``make bench`` runs them."""
