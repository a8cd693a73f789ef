"""Hub or local datasets -> batches of images."""

from .images import *
