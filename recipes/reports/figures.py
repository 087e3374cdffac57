"""What all figures share: markers, and how a figure is written."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


MARKERS = "ov^sDPX*"


def save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file
