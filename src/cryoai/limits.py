"""What a particle set has to be, for every part that asks."""

__all__ = ["BACKGROUND_RADIUS", "FEWEST_PARTICLES", "LARGEST_DEFAULT_BOX", "LARGEST_VALUE", "SMALLEST_BOX"]

FEWEST_PARTICLES = 20
# Sides of an image and, where none is asked for, of the working box at most.
SMALLEST_BOX = 32
LARGEST_DEFAULT_BOX = 128
# Outside this fraction of half the box an image is taken to show no particle.
BACKGROUND_RADIUS = 0.9
# Of a pixel, as it is and over the noise of its image: squares of larger ones overflow.
LARGEST_VALUE = 1e15
