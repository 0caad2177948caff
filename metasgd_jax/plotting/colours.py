"""The colours of all figures, in the notation of matplotlib."""

BLUE, CORAL, GREY = '#2166ac', '#d6604d', '#777777'
GREEN, RED = '#1a7f37', '#c62828'
