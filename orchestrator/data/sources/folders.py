"""Images whose splits and classes follow from file names, from folders, or from label files beside them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import takewhile

from orchestrator import storage
from orchestrator.data.config import Layout
from orchestrator.data.sources.archives import File, Tree, is_hidden, is_image, read_ranges
from orchestrator.data.sources.index import ACCEPTED, OUT, Entry, Reading, Splits, finding
from orchestrator.data.sources.labels import LabelMap, parse_label_map

# Files that may give the classes of images. The meaning of those that match the last pattern is not known.
_LABEL_FILES = (
    r"dataset\.json",
    r"val_annotations\.txt",
    r"LOC_(train|val)_solution\.csv",
    r"ILSVRC2012_validation_ground_truth\.txt",
    r"metadata\.(csv|jsonl)|(.*[_.-])?(labels?|annotations?)\.(csv|tsv|txt|json|jsonl)|(train|val|test)\.csv|trainLabels\.csv",
)
_NAME_FILES = r"(synset_words|synsets|wnids|words|classes|class_names|LOC_synset_mapping)\.txt"  # of classes
_BETWEEN = {"images", "image", "imgs", "img", "jpegimages", "jpegs", "jpeg", "jpg", "png", "data", "pictures"}
_COMPANION_BYTES = 512 << 20  # larger label files are not read
_ABOVE = 4  # folders above a source in which Kaggle's label files are searched


def read_names(tree: Tree, layout: Layout, labels: LabelMap | None, splits: Splits) -> Reading:
    """Read a tree of images: class folders, files named <class>_<anything>, or images with label files.

    layout: auto, folder, flat or unlabelled. labels: the user's label map.

    Raises:
        ValueError: there are no images, or their classes cannot be determined.
    """
    return _Names(tree, layout, splits).read(labels)


class _Names:
    """The names in a tree of images, and their interpretation."""

    def __init__(self, tree: Tree, layout: Layout, splits: Splits) -> None:
        self._tree, self._layout, self._splits = tree, layout, splits
        self._reading = Reading("", left_out=dict(tree.left_out))
        self._folders = Counter[str]()  # number of images by folder
        self._first: dict[str, str] = {}  # one image of each folder
        self._without: set[str] = set()  # folders with other files, or with none
        self._companions: list[File] = []  # files that may have the labels of images, or names of classes
        self._maps: dict[str, LabelMap | None] = {}  # of the label files; None if one cannot be read
        self._places: dict[str, tuple[str, str]] = {}  # split and class of the images in every folder; may be empty
        self._chosen: dict[str, LabelMap] = {}  # the label map of every split that has one

    def read(self, labels: LabelMap | None) -> Reading:
        reading, layout = self._reading, self._layout
        self._survey()
        if empty := [
            archive.stem for archive, members in self._tree.members.items() if archive.object and not len(members)
        ]:
            reading.findings["archives_without_files"] = finding(empty)
        self._find_places()
        self._read_label_files()
        if labels is not None:
            reading.layout = f"images with the labels of {labels.uri}"
            self._chosen = {split: labels for split, _ in self._places.values()}
        else:
            self._choose()
        classes = {name for _, name in self._places.values() if name}
        self._describe_label_files(classes)
        reading.flat = layout == "flat" or (layout == "auto" and not self._chosen and not classes)
        if reading.flat:
            self._check_flat()
            reading.layout = "files named <class>_<anything>"
        elif layout == "unlabelled" and labels is None:
            reading.layout = "images without labels"
        elif layout == "folder" and not classes:
            raise ValueError(f"{self._source} has no class folders, which --layout folder needs")
        if (
            labels
            or layout in ("flat", "unlabelled")
            or any(_is_edm(label_map.uri) for label_map in self._chosen.values())
        ):
            reading.suspicions.pop("folders_within_classes", None)  # folders are not used as classes
            self._places = {folder: (split, "") for folder, (split, _) in self._places.items()}
        if labels or layout == "unlabelled":
            reading.suspicions.pop("unused_label_files", None)  # the user has decided which labels are used
        reading.entries = self._entries()
        return reading

    @property
    def _source(self) -> str:
        return f"--source {self._tree.listing.named}"

    def _survey(self) -> None:
        """Count the files of each kind."""
        endings, hidden = Counter[str](), 0
        known = re.compile("|".join((*_LABEL_FILES, _NAME_FILES)))
        for file in self._tree.files():
            folder, _, name = file.name.rpartition("/")
            if is_hidden(file.name):
                hidden += 1
            elif is_image(name):
                self._folders[folder] += 1
                self._first.setdefault(folder, file.name)
            else:
                self._without.add(folder)
                if name and (file.sidecar is None or name == "dataset.json"):
                    endings[os.path.splitext(name)[1].lower() or "none"] += 1
                if known.fullmatch(name):
                    self._companions.append(file)
        if not self._folders:
            others = ", ".join(ending for ending, _ in endings.most_common(5))
            others = f", but files that end in {others}" if others else ""
            raise ValueError(f"{self._source} holds no images{others}; accepted: {ACCEPTED}")
        self._reading.left_out |= {f"files that end in {ending}": count for ending, count in endings.most_common()}
        if hidden:
            self._reading.left_out["hidden files"] = hidden

    # ---------------------------------------------------------------------------------------- meaning of the folders

    def _find_places(self) -> None:
        """Find the split and the class of the images in every folder.

        Folders around all images are ignored, and so are folders such as `images` between a class and its images. One
        level of folders may be splits: the first level on which all names are names of splits.
        """
        splits = self._splits
        chains = {folder: folder.split("/") if folder else [] for folder in self._folders}
        around = _shared(list(chains.values()))
        if len(chains) == 1 and around and self._layout == "folder":
            around = around[:-1]  # the one folder is the one class
        around = around[: next((i for i, part in enumerate(around) if splits.of_folder(part)), len(around))]
        chains = {folder: chain[len(around) :] for folder, chain in chains.items()}
        depth = min(map(len, chains.values()))
        level = next((i for i in range(depth) if all(splits.of_folder(chain[i]) for chain in chains.values())), None)
        split = {folder: "" if level is None else splits.of_folder(chain[level]) for folder, chain in chains.items()}
        inner = {folder: _inner(chain, level) for folder, chain in chains.items()}
        shared = _shared([chain for chain in inner.values() if chain])
        deep = min((len(chain) for chain in inner.values() if chain), default=0)
        inner = {folder: chain[min(len(shared), max(0, deep - 1)) :] for folder, chain in inner.items()}
        self._suspect(inner)
        self._places = {folder: (split[folder], (chain or [""])[0]) for folder, chain in inner.items()}

    def _suspect(self, inner: dict[str, list[str]]) -> None:
        """Record names that make this interpretation of the folders suspicious."""
        reading = self._reading
        if like := sorted({part for chain in inner.values() for part in chain if self._splits.looks_like(part)}):
            reading.suspicions["names_like_splits"] = finding(like)
        if nested := sorted("/".join(chain) for chain in inner.values() if len(chain) > 1):
            reading.suspicions["folders_within_classes"] = finding(nested)
        parts = {part for folder in self._folders for part in folder.split("/")}
        empty = sorted({folder.rpartition("/")[2] for folder in self._without} - parts - {""})
        if empty and any(inner.values()):
            reading.findings["folders_without_images"] = finding(empty)

    # --------------------------------------------------------------------------------------------------- label files

    def _read_label_files(self) -> None:
        """Read the label files beside the images."""
        uri = self._tree.listing.uri
        contents = _kaggle_files_above(uri)
        for file in self._companions:
            if not re.fullmatch(_NAME_FILES, file.name.rpartition("/")[2]) and file.size <= _COMPANION_BYTES:
                place = storage.Range(file.object or file.name, file.start, file.size)
                contents.append((file.name, read_ranges(uri, [place])[0]))
        for name, data in contents:
            try:
                self._maps[name] = parse_label_map(name, data, base=name[: name.rfind("/") + 1])
            except ValueError:
                self._maps[name] = None  # reported as a file that is not used

    def _choose(self) -> None:
        """Choose the label map of every split that has one.

        EDM's dataset.json is used for all images. Other label files are used for splits without class folders.
        """
        maps = {name: label_map for name, label_map in self._maps.items() if label_map is not None}
        named = Counter[str]()  # images in class folders, by split
        for folder, (split, name) in self._places.items():
            named[split] += self._folders[folder] if name else 0
            beside_classes = not name and any(other for part, other in self._places.values() if part == split)
            if beside_classes and self._layout in ("auto", "folder") and not any(map(_is_edm, maps)):
                raise ValueError(
                    f"{self._source}: {self._folders[folder]} images lie beside class folders and in none of them, for "
                    f"example {self._first[folder]}; move them, or pass --labels FILE"
                )
        if self._layout == "auto" and (edm := next(filter(_is_edm, maps), None)):
            described = "images without labels, as {} says" if maps[edm].null else "images with the labels of {}"
            self._reading.layout = described.format(edm)
            self._chosen = {split: maps[edm] for split, _ in self._places.values()}
            return
        self._reading.layout = "class folders" if any(named.values()) else "images with labels in files beside them"
        for split in [] if self._layout in ("flat", "unlabelled") else sorted(named):
            serving = [label_map for name, label_map in maps.items() if not label_map.null and _serves(name, split)]
            if serving and not named[split]:
                self._chosen[split] = serving[0]

    def _describe_label_files(self, classes: set[str]) -> None:
        """Record how each known file beside the images is used. An unused label file is suspicious."""
        serves = defaultdict(list)
        for split, label_map in self._chosen.items():
            serves[label_map.uri].append(split or "all")
        within = {file.name for file in self._companions}  # others lie above the source: they may be for other images
        unused = []
        for name in sorted(within | set(self._maps)):
            labels, use = self._maps.get(name), "not used"
            if name in serves:
                use = f"used for the labels of {' and '.join(serves[name])} images"
            elif labels and labels.names and labels.names <= classes:
                use = "not used: the folders name the same classes"
            elif name in within and name in self._maps:
                unused.append(name)
            self._reading.companions[name] = use
        if unused:
            self._reading.suspicions["unused_label_files"] = finding(unused)

    # ------------------------------------------------------------------------------------------------------- entries

    def _images(self) -> Iterator[File]:
        return (file for file in self._tree.files() if not is_hidden(file.name) and is_image(file.name))

    def _check_flat(self) -> None:
        """Raise ValueError unless the name of every image begins with <class>_."""
        odd = [file.name for file in self._images() if "_" not in file.name.rpartition("/")[2]]
        if odd:
            raise ValueError(
                f"{self._source}: {len(odd)} images have no class: they lie in no class folder, and their names do not "
                f"begin with a class and _, for example {odd[0]}; pass --labels FILE, or --layout unlabelled if there "
                "are no classes"
            )

    def _entries(self) -> Iterator[Entry]:
        """Yield the images, and record findings about their labels."""
        reading, chosen = self._reading, self._chosen
        numbered = Counter[str]()  # images of each split that got a label by their position
        classes, strangers = {name for _, name in self._places.values()}, list[str]()
        if chosen:
            reading.classes = next(iter(chosen.values())).classes
        for file in self._images():
            folder, _, name = file.name.rpartition("/")
            split, label = self._places[folder]
            if split == OUT:
                kind = "images that --split leaves out"
                reading.left_out[kind] = reading.left_out.get(kind, 0) + 1
                continue
            class_label: str | int | None = label or None
            prefix = name.partition("_")[0]
            if reading.flat:
                class_label = prefix
            elif split in chosen and chosen[split].in_order:
                match = re.match(r"ILSVRC2012_(?:val|test)_(\d+)", name)  # else the position in the order of the names
                class_label = chosen[split].in_order.get(int(match[1]) - 1 if match else numbered[split])
                numbered[split] += not match
            elif split in chosen:
                class_label, given_split = chosen[split].find(file.name)
                split = given_split or split
            elif class_label != prefix and prefix in classes:
                strangers.append(file.name)
            yield Entry(file.name, class_label, split, file.object, file.start, file.size)
        if strangers:
            reading.findings["images_named_after_another_class"] = finding(strangers)
        for labels in dict.fromkeys(chosen.values()):
            if labels.in_order and (count := sum(numbered.values())) not in (0, expected := len(labels.in_order)):
                raise ValueError(f"label map {labels.uri} has {expected} numbers, but there are {count} images")
            if unused := labels.unused():
                reading.findings["labels_without_image"] = finding(unused)


def _shared(chains: list[list[str]]) -> list[str]:
    """Return the common first folders of all chains."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*chains, strict=False))]


def _inner(chain: list[str], level: int | None) -> list[str]:
    """Return the class folders of a chain: without the level of the splits, and without `images` at the end."""
    rest = [part for i, part in enumerate(chain) if i != level]
    while rest and rest[-1].lower() in _BETWEEN:
        rest.pop()
    return rest


def _is_edm(name: str) -> bool:
    return name.rpartition("/")[2] == "dataset.json"


def _serves(name: str, split: str) -> bool:
    """Return whether a label file of a known kind has the labels of a split."""
    last = name.rpartition("/")[2]
    known = re.fullmatch("|".join(_LABEL_FILES[1:4]), last) is not None
    return known and split in (("train",) if "train" in last else ("validation", ""))


def _kaggle_files_above(uri: str) -> list[tuple[str, bytes]]:
    """Return (name, content) of the label files of Kaggle's ImageNet in the folders above a part of its tree."""
    files, parts = [], uri.rstrip("/").split("/")
    if not {"ILSVRC", "Data", "CLS-LOC"} & set(parts[-_ABOVE:]):
        return []
    for depth in range(1, min(_ABOVE + 1, len(parts))):
        for name in ("LOC_val_solution.csv", "LOC_train_solution.csv"):
            place = "/".join([*parts[:-depth], name])
            if storage.exists(place):
                files.append((place, storage.read_bytes(place)))
    return files
