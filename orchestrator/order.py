"""The order of training samples and the keys of all randomness, as pure arithmetic (numpy only).

Row groups are permuted by (seed, epoch) and dealt round-robin to P canonical streams. Each stream is divided into
windows of consecutive row groups, and the rows of a window are shuffled together. A global batch of B images takes B/P
rows from every stream, in the order of the streams. Worker r of W owns the streams [rP/W, (r+1)P/W). Therefore nothing
depends on W, no row group belongs to two streams, and the position of a run is one integer, the number of images seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, Field

OPEN_BYTES_LIMIT = 4 << 30  # decoded images that a worker may hold in unfinished windows


class Purpose(IntEnum):
    """The purpose of a random draw. Its number is part of every key, so never change a number or use it twice."""

    ROW_GROUPS = 1  # the epoch's permutation of row groups
    WINDOW = 2  # the shuffle inside a window
    FLIP = 3
    CROP = 4
    TIMESTEP = 5
    NOISE = 6  # training noise of a sample
    DROPOUT = 7
    SHARDS = 8  # the shuffle of all keys when a dataset is prepared
    SPLIT = 9  # training or validation
    LABEL = 10  # generation: the class of an index
    START = 11  # generation: the initial noise x_T of an index
    STEP = 12  # generation: the noise of an index at an original timestep
    WEIGHTS = 13  # initial parameters
    LIKELIHOOD = 14  # the noise of the variational bound
    UPSAMPLE_START = 15  # a cascade's second stage: x_T of an index
    UPSAMPLE_STEP = 16  # a cascade's second stage: the noise of an index at an original timestep
    LABEL_DROPOUT = 17  # whether a training sample keeps its label
    SEARCH = 21  # the proposals of a search


def keyed_rng(purpose: Purpose, seed: int, *key: int) -> np.random.Generator:
    """Return the generator for a purpose, a seed and up to two further integers, all in [0, 2**64).

    Each integer takes two 32-bit words of the key. Plain lists would collide, because numpy's SeedSequence splits an
    integer into as many words as it needs and pads with zeros: [1, 2**32] is [1, 0, 1], and [1] is [1, 0].

    Raises:
        ValueError: there are more integers, or one of them is out of range.
    """
    parts = (seed, *key, *([0] * (2 - len(key))))
    if len(parts) != 3 or not all(0 <= part < 2**64 for part in parts):
        raise ValueError(f"key {(seed, *key)} must be a seed and at most two integers, each in [0, 2**64)")
    entropy = [int(purpose)]
    for part in parts:
        entropy += [part & 0xFFFFFFFF, part >> 32]
    return np.random.default_rng(np.array(entropy, dtype=np.uint32))


def sample_rng(seed: int, epoch: int, sample: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of one training sample (its global row number) in one epoch."""
    return keyed_rng(purpose, seed, epoch, sample)


def index_rng(seed: int, index: int, purpose: Purpose, timestep: int = 0) -> np.random.Generator:
    """Return the generator of one generated image, and for the noise of a step, of one original timestep.

    Because the key has the original timestep, chains of different lengths share the noise of their common timesteps.
    """
    return keyed_rng(purpose, seed, index, timestep)


class OrderConfig(BaseModel, frozen=True, extra="forbid"):
    """The order of the samples. Any change gives other batches."""

    num_streams: int = Field(4, gt=0)  # streams of images, a power of two; the number of workers must divide it
    shuffle_row_groups: int = Field(4, gt=0)  # row groups of a stream that are shuffled together


@dataclass(frozen=True, eq=False)
class Unit:
    """The remaining rows of one window, which are read together.

    `first` is the offset of the first row in the stream's order of the epoch. `rows`, int64 [n, 2], contains (row group
    of the manifest, row within it) in the order in which the rows are consumed.
    """

    epoch: int
    stream: int
    first: int
    rows: np.ndarray

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Return the row groups that must be read, in ascending order."""
        return tuple(np.unique(self.rows[:, 0]).tolist())


class _Window(NamedTuple):
    stream: int
    number: int  # position among the windows of the stream in this epoch
    first: int  # offset of its first row in the stream's order of the epoch
    row_groups: np.ndarray
    rows: int  # how many of its rows the epoch's batches use


class OrderPlan:
    """The order of the samples for any number of workers, from any position.

    Every epoch has the same number of batches: floor(R_min / (B/P)). R_min is the sum of the floor(G/P) smallest of the
    G row groups, which is the least number of rows that a stream can hold. For N rows this is floor(N/B) if P divides G
    and all row groups have one size; the sizes that `prepare_dataset` writes differ by one row at most. In general it
    can be less, because each row group belongs to one stream. The rows that are left out differ from epoch to epoch,
    and no sample occurs twice in an epoch.

    Attributes: row_group_sizes; batch_size; rows_per_stream (B/P); batches_per_epoch; images_per_epoch.

    Raises:
        ValueError: num_streams is no power of two, does not divide batch_size, or is larger than the number of row
            groups; or a stream may have too few rows for one batch.
    """

    def __init__(self, row_group_sizes: tuple[int, ...], batch_size: int, config: OrderConfig, seed: int = 0) -> None:
        streams, groups = config.num_streams, len(row_group_sizes)
        if streams & (streams - 1):
            raise ValueError(f"order.num_streams={streams} is not a power of two; use 1, 2, 4, 8, ...")
        if batch_size <= 0 or batch_size % streams:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of order.num_streams={streams}")
        if groups < streams:
            raise ValueError(
                f"order.num_streams={streams} is more than the {groups} row groups of the dataset; lower "
                "--order.num-streams, or prepare the dataset with more row groups"
            )
        self.config, self.seed, self.row_group_sizes, self.batch_size = config, seed, row_group_sizes, batch_size
        self.rows_per_stream = batch_size // streams
        self._sizes = np.array(row_group_sizes, dtype=np.int64)
        min_rows = int(np.sort(self._sizes)[: groups // streams].sum())
        self.batches_per_epoch = min_rows // self.rows_per_stream
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_size={batch_size} takes {self.rows_per_stream} rows from each stream, but a stream may have "
                f"only {min_rows} rows; use batch_size <= {min_rows * streams}"
            )
        self.images_per_epoch = self.batches_per_epoch * batch_size

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch) after `position` images.

        Raises:
            ValueError: `position` is no multiple of the batch size.
        """
        if position < 0 or position % self.batch_size:
            raise ValueError(f"position={position} is not a multiple of batch_size={self.batch_size}")
        epoch, images = divmod(position, self.images_per_epoch)
        return epoch, images // self.batch_size

    def streams(self, rank: int, world_size: int) -> range:
        """Return the contiguous streams that worker `rank` of `world_size` owns.

        Raises:
            ValueError: `world_size` does not divide the number of streams, or `rank` is out of range.
        """
        if world_size <= 0 or self.config.num_streams % world_size:
            raise ValueError(f"world_size={world_size} does not divide num_streams={self.config.num_streams}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
        share = self.config.num_streams // world_size
        return range(rank * share, (rank + 1) * share)

    def steps(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, number of images seen before the step) of each global step from `position` on, without end."""
        self.locate(position)
        while True:
            yield self.locate(position)[0], position
            position += self.batch_size

    def units(self, rank: int, world_size: int, position: int = 0) -> Iterator[Unit]:
        """Yield the worker's units from `position` on, without end, in the order in which they are first needed.

        Units contain neither rows before the position nor rows that no batch of the epoch uses.
        """
        streams = self.streams(rank, world_size)
        epoch, step = self.locate(position)
        while True:
            order = keyed_rng(Purpose.ROW_GROUPS, self.seed, epoch).permutation(len(self._sizes))
            begin = step * self.rows_per_stream
            windows = [window for stream in streams for window in self._windows(order, stream)]
            windows = [window for window in windows if window.first + window.rows > begin]
            windows.sort(key=lambda window: (max(window.first, begin) // self.rows_per_stream, window.stream))
            for window in windows:
                yield self._unit(epoch, window, begin)
            epoch, step = epoch + 1, 0

    def open_bytes(self, world_size: int, bytes_per_row: int) -> int:
        """Return the most bytes of images that a worker holds in unfinished windows, of which each stream has one.

        They are the product of P/W streams, the row groups of a window, the rows of the largest row group, and
        `bytes_per_row`.

        Raises:
            ValueError: they are more than OPEN_BYTES_LIMIT.
        """
        streams, window = len(self.streams(0, world_size)), self.config.shuffle_row_groups
        rows = int(self._sizes.max())
        total = streams * window * rows * bytes_per_row
        if total > OPEN_BYTES_LIMIT:
            raise ValueError(
                f"a worker would hold {total / 2**30:.1f} GiB of open images ({streams} streams x window of {window} "
                f"row groups x {rows} rows x {bytes_per_row:,} bytes); at most {OPEN_BYTES_LIMIT / 2**30:.0f} GiB are "
                f"accepted: raise num_workers, or lower order.shuffle_row_groups={window} or "
                f"order.num_streams={self.config.num_streams}, or prepare the dataset with smaller row groups"
            )
        return total

    def _windows(self, order: np.ndarray, stream: int) -> Iterator[_Window]:
        """Yield the windows of a stream that the epoch's batches use."""
        dealt, size = order[stream :: self.config.num_streams], self.config.shuffle_row_groups
        first, end = 0, self.batches_per_epoch * self.rows_per_stream
        for number, start in enumerate(range(0, len(dealt), size)):
            row_groups = dealt[start : start + size]
            rows = int(self._sizes[row_groups].sum())
            if first < end:
                yield _Window(stream, number, first, row_groups, min(rows, end - first))
            first += rows

    def _unit(self, epoch: int, window: _Window, begin: int) -> Unit:
        """Return the rows of a window from the stream's row `begin` on, as far as the epoch's batches use them."""
        sizes = self._sizes[window.row_groups]
        row_groups = np.repeat(window.row_groups, sizes)
        rows = np.stack([row_groups, np.concatenate([np.arange(size) for size in sizes])], axis=1)
        key = epoch * self.config.num_streams + window.stream
        rows = rows[keyed_rng(Purpose.WINDOW, self.seed, key, window.number).permutation(len(rows))]
        skipped = max(begin - window.first, 0)
        return Unit(epoch, window.stream, window.first + skipped, rows[skipped : window.rows])
