"""The colours of all pictures, as matplotlib takes them."""

BLUE, ORANGE, GREY = '#2166ac', '#d6604d', '#777777'
GREEN, RED = '#1a7f37', '#c62828'
