"""What all oracles resize pictures with."""

from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F


def resize(image, width, height, filter=InterpolationMode.BILINEAR):
    """torchvision's resize of a PIL image, whose horizontal pass comes first. Up to Pillow 12 it always does; Pillow 13
    begins with the vertical one where that shrinks much more (python-pillow/Pillow#9549), which rounds otherwise.
    """
    for sides in ([image.height, width], [height, width]):
        image = F.resize(image, sides, interpolation=filter, antialias=True)
    return image


def resize_short(image, short):
    """torchvision's `Resize(short)`: the ratio is kept."""
    return resize(image, *F.resize(image, short).size)
