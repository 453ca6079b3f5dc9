"""``python -m layerwise``: the same as the ``layerwise`` command."""

from layerwise.cli.main import main

main()
