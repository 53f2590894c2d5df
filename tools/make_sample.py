"""Draws the embedded sample of a data set from its full data, and prints its digest for `_SAMPLE_DIGESTS`.

    python tools/make_sample.py NAME [FOLDER]    FOLDER has the full data (default: WIB_DATA, else data)
"""
import hashlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from wib_nbdev.data import ImageDataset, holdout, load

SAMPLE = Path(__file__).parents[1] / 'wib_nbdev' / 'sample'


def draw_sample(full: ImageDataset) -> ImageDataset:
    "1,000 training and 500 test images, the same number of each class, in their published order."
    train = holdout(full, 1000 / len(full.y_train))
    test = holdout(replace(full, x_train=full.x_test, y_train=full.y_test), 500 / len(full.y_test))
    return replace(train, x_train=train.x_test, y_train=train.y_test, x_test=test.x_test, y_test=test.y_test)


def main(name: str, root: str | None = None) -> None:
    sample, file = draw_sample(load(name, root)), io.BytesIO()
    parts = ('x_train', 'y_train', 'x_test', 'y_test')
    np.savez_compressed(file, **{part: getattr(sample, part).numpy().astype(np.uint8) for part in parts})
    path = SAMPLE / f'{name}.npz'
    path.write_bytes(file.getvalue())
    print(f"{path.name}: '{hashlib.sha256(file.getvalue()).hexdigest()}'")


if __name__ == '__main__': sys.exit(__doc__) if len(sys.argv) == 1 else main(*sys.argv[1:])
