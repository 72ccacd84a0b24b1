"""The process of `data_speed` that measures mosaicml-streaming, in an environment with that package.

Writes shards of the files named in FOLDER/paths. Then, for every line of its standard input, it reads all images once
and prints the seconds.
"""

import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

from orchestrator.data.crops import center_crop


class Images(StreamingDataset):
    """Decodes images, and crops them with `center_crop`."""

    def __init__(self, folder: str, image_size: int, batch_size: int) -> None:
        super().__init__(local=folder, shuffle=True, batch_size=batch_size)
        self.image_size = image_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        sample = super().__getitem__(index)
        image = Image.open(io.BytesIO(sample["image"])).convert("RGB")
        crop = center_crop(image, self.image_size)
        return np.array(crop[:, ::-1] if index % 2 else crop), sample["label"]


def main(folder: str, image_size: int, processes: int, batch_size: int) -> None:
    """Write the shards, and then read all images for every line of the standard input."""
    shards = str(Path(folder, "shards"))
    paths = Path(folder, "paths").read_text().splitlines()
    with MDSWriter(out=shards, columns={"image": "bytes", "label": "int"}) as writer:
        for label, path in enumerate(paths):
            writer.write({"image": Path(path).read_bytes(), "label": label % 10})
    loader: DataLoader = DataLoader(
        Images(shards, image_size, batch_size),
        batch_size=batch_size,
        num_workers=processes,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    for _ in sys.stdin:
        begin, count = time.perf_counter(), 0
        for batch, _ in loader:
            count += len(batch)
        assert count == len(paths)
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
