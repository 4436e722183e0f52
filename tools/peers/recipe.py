"""The numbers of the three tasks, as `detco`'s recipe `detco-r50` has them.

T1 decodes to RGB. T2 adds one random resized crop and a flip. T3 is one decode and DetCo's four
views: two global crops, and two larger crops that are each cut into nine patches. Colour and blur
are drawn once a view, also for a view that is cut. Everything stays u8: normalising is the
device's work.
"""

BATCH = 64
# (side of the square view, least and largest share of the image's area)
GLOBAL = (224, (0.2, 1.0))
LOCAL = (255, (0.6, 1.0))
RATIO = (3 / 4, 4 / 3)
# A local view is a 3x3 grid of cells; from each cell one patch at its own offset.
GRID, CELL, PATCH = 3, 85, 64
JITTER, JITTER_P = (0.4, 0.4, 0.4, 0.1), 0.8  # brightness, contrast, saturation, hue
GRAY_P = 0.2
SIGMA, BLUR_P = (0.1, 2.0), 0.5


def corners(integers):
    """Top left corners (y, x) of a local view's nine patches, in random order.

    `integers(low, high)` draws an integer, both ends included.
    """
    cells = list(range(GRID * GRID))
    for last in range(len(cells) - 1, 0, -1):
        other = integers(0, last)
        cells[last], cells[other] = cells[other], cells[last]
    slack = CELL - PATCH
    return [
        (cell // GRID * CELL + integers(0, slack), cell % GRID * CELL + integers(0, slack))
        for cell in cells
    ]
