"""Images whose splits and classes follow from file names, from folders, or from label files beside them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import takewhile

from orchestrator import storage
from orchestrator.data.config import Layout
from orchestrator.data.sources.archives import File, Tree, is_hidden, is_image, read_ranges
from orchestrator.data.sources.index import ACCEPTED, Entry, Reading, Splits, finding
from orchestrator.data.sources.labels import LabelMap, parse_label_map

# Names of files that may give the classes of images. Those of the last pattern belong to no published dataset, so it is
# unknown for which images they are.
_LABEL_FILES = (
    r"dataset\.json",
    r"val_annotations\.txt",
    r"LOC_(train|val)_solution\.csv",
    r"ILSVRC2012_validation_ground_truth\.txt",
    r"metadata\.(csv|jsonl)|(.*[_.-])?(labels?|annotations?)\.(csv|tsv|txt|json|jsonl)|(train|val|test)\.csv|trainLabels\.csv",
)
_CLASS_NAME_FILES = r"(synset_words|synsets|wnids|words|classes|class_names|LOC_synset_mapping)\.txt"
# Folders between a class and its images.
_IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "jpegs", "jpeg", "jpg", "png", "data", "pictures"}
_MAX_LABEL_FILE_BYTES = 512 << 20  # larger label files are not read
_KAGGLE_LEVELS = 4  # folders above a source in which Kaggle's label files are searched


class TreeReader:
    """Interprets a tree of images: class folders, files named <class>_<anything>, or images with label files.

    layout: auto, folder, flat or unlabelled.
    """

    def __init__(self, tree: Tree, layout: Layout, splits: Splits) -> None:
        self._tree, self._layout, self._splits = tree, layout, splits
        self._reading = Reading("", left_out=dict(tree.left_out))
        self._folders = Counter[str]()  # number of images in each folder
        self._examples: dict[str, str] = {}  # the first image of each folder
        self._folders_with_others: set[str] = set()  # folders with files that are no images, and empty folders
        self._companions: list[File] = []  # files that may have the labels of images, or names of classes
        self._parsed: dict[str, LabelMap | None] = {}  # label map of each label file; None if it cannot be parsed
        self._meanings: dict[str, tuple[str, str]] = {}  # (split or "", class or "") of the images in each folder
        self._label_maps: dict[str, LabelMap] = {}  # the label map of each split that uses one

    def read(self, labels: LabelMap | None) -> Reading:
        """Return the reading of the tree; labels: the label map that the user passed with --labels.

        Raises:
            ValueError: there are no images, or their classes cannot be determined.
        """
        reading, layout = self._reading, self._layout
        self._survey_files()
        members = self._tree.members
        empty_archives = [archive.stem for archive in members if archive.object and not len(members[archive])]
        if empty_archives:
            reading.findings["archives_without_files"] = finding(empty_archives)
        self._interpret_folders()
        self._parse_label_files()
        if labels is not None:
            reading.layout = f"images with the labels of {labels.uri}"
            self._label_maps = {split: labels for split, _ in self._meanings.values()}
        else:
            self._choose_label_maps()
        classes = {name for _, name in self._meanings.values() if name}
        self._describe_label_files(classes)
        reading.flat = layout == "flat" or (layout == "auto" and not self._label_maps and not classes)
        if reading.flat:
            self._check_flat()
            reading.layout = "files named <class>_<anything>"
        elif layout == "unlabelled" and labels is None:
            reading.layout = "images without labels"
        elif layout == "folder" and not classes:
            raise ValueError(f"{self._source} has no class folders, which --layout folder needs; pass another --layout")
        uses_edm = any(_is_edm(label_map.uri) for label_map in self._label_maps.values())
        if labels or layout in ("flat", "unlabelled") or uses_edm:  # folders are not used as classes
            reading.suspicions.pop("folders_within_classes", None)
            self._meanings = {folder: (split, "") for folder, (split, _) in self._meanings.items()}
        if labels or layout == "unlabelled":
            reading.suspicions.pop("unused_label_files", None)  # the user has decided which labels are used
        reading.entries = self._entries()
        return reading

    @property
    def _source(self) -> str:
        return f"--source {self._tree.listing.source}"

    def _survey_files(self) -> None:
        """Count images and other files, and collect the files that may have labels or names of classes."""
        endings, num_hidden = Counter[str](), 0
        companion = re.compile("|".join((*_LABEL_FILES, _CLASS_NAME_FILES)))
        for file in self._tree.files():
            folder, _, name = file.name.rpartition("/")
            if is_hidden(file.name):
                num_hidden += 1
            elif is_image(name):
                self._folders[folder] += 1
                self._examples.setdefault(folder, file.name)
            else:
                self._folders_with_others.add(folder)
                if name and (file.sidecar is None or name == "dataset.json"):
                    endings[os.path.splitext(name)[1].lower() or "none"] += 1
                if companion.fullmatch(name):
                    self._companions.append(file)
        if not self._folders:
            others = ", ".join(ending for ending, _ in endings.most_common(5))
            others = f", but files that end in {others}" if others else ""
            raise ValueError(f"{self._source} holds no images{others}; accepted: {ACCEPTED}")
        self._reading.left_out |= {f"files that end in {ending}": count for ending, count in endings.most_common()}
        if num_hidden:
            self._reading.left_out["hidden files"] = num_hidden

    # ---------------------------------------------------------------------------------------- meaning of the folders

    def _interpret_folders(self) -> None:
        """Find the split and the class of the images in every folder.

        Folders around all images are ignored, and so are folders such as `images` between a class and its images. One
        level of folders may be splits: the first level on which all names are names of splits.
        """
        splits = self._splits
        paths = {folder: folder.split("/") if folder else [] for folder in self._folders}
        common = _common_prefix(list(paths.values()))
        if len(paths) == 1 and common and self._layout == "folder":
            common = common[:-1]  # the only folder is the only class
        common = list(takewhile(lambda part: not splits.of_folder(part), common))
        paths = {folder: path[len(common) :] for folder, path in paths.items()}
        depth = min(map(len, paths.values()))
        split_levels = (i for i in range(depth) if "" not in {splits.of_folder(path[i]) for path in paths.values()})
        level = next(split_levels, None)
        split = {folder: "" if level is None else splits.of_folder(path[level]) for folder, path in paths.items()}
        class_paths = {folder: _class_path(path, level) for folder, path in paths.items()}
        # Ignore the folders around all classes as well, but keep at least one folder of every path: its class.
        nonempty = [path for path in class_paths.values() if path]
        num_common = min(len(_common_prefix(nonempty)), max(0, min(map(len, nonempty), default=0) - 1))
        class_paths = {folder: path[num_common:] for folder, path in class_paths.items()}
        splits.check_used()
        self._record_suspicions(class_paths)
        self._meanings = {folder: (split[folder], path[0] if path else "") for folder, path in class_paths.items()}

    def _record_suspicions(self, class_paths: dict[str, list[str]]) -> None:
        """Record names that make this interpretation of the folders suspicious.

        class_paths: for each folder with images, its class and the folders beneath it.
        """
        reading = self._reading
        if like := sorted({part for path in class_paths.values() for part in path if self._splits.looks_like(part)}):
            reading.suspicions["names_like_splits"] = finding(like)
        if nested := sorted("/".join(path) for path in class_paths.values() if len(path) > 1):
            reading.suspicions["folders_within_classes"] = finding(nested)
        parts = {part for folder in self._folders for part in folder.split("/")}
        empty = sorted({folder.rpartition("/")[2] for folder in self._folders_with_others} - parts - {""})
        if empty and any(class_paths.values()):
            reading.findings["folders_without_images"] = finding(empty)

    # --------------------------------------------------------------------------------------------------- label files

    def _parse_label_files(self) -> None:
        """Read and parse the label files beside the images, and those of Kaggle's ImageNet above them."""
        uri = self._tree.listing.uri
        contents = _kaggle_files_above(uri)
        for file in self._companions:
            has_labels = not re.fullmatch(_CLASS_NAME_FILES, file.name.rpartition("/")[2])
            if has_labels and file.size <= _MAX_LABEL_FILE_BYTES:
                byte_range = storage.Range(file.object or file.name, file.start, file.size)
                contents.append((file.name, read_ranges(uri, [byte_range])[0]))
        for name, data in contents:
            try:
                self._parsed[name] = parse_label_map(name, data, base=name[: name.rfind("/") + 1])
            except ValueError:
                self._parsed[name] = None  # reported as a file that is not used

    def _choose_label_maps(self) -> None:
        """Choose the label map of every split that uses one.

        EDM's dataset.json is used for all images. Other label files are used for splits without class folders.

        Raises:
            ValueError: some images are in no class folder, although other images of their split are in one.
        """
        maps = {name: label_map for name, label_map in self._parsed.items() if label_map is not None}
        edm = next(filter(_is_edm, maps), None)
        splits_with_classes = {split for split, name in self._meanings.values() if name}
        for folder, (split, name) in self._meanings.items():
            beside_classes = not name and split in splits_with_classes
            if beside_classes and self._layout in ("auto", "folder") and edm is None:
                raise ValueError(
                    f"{self._source}: {self._folders[folder]} images lie beside class folders and in none of them, for "
                    f"example {self._examples[folder]}; move them, or pass --labels FILE"
                )
        if self._layout == "auto" and edm is not None:
            no_labels = maps[edm].no_labels
            prefix = "images without labels, according to" if no_labels else "images with the labels of"
            self._reading.layout = f"{prefix} {edm}"
            self._label_maps = {split: maps[edm] for split, _ in self._meanings.values()}
            return
        self._reading.layout = "class folders" if splits_with_classes else "images with labels in files beside them"
        if self._layout in ("flat", "unlabelled"):
            return
        for split in sorted({split for split, _ in self._meanings.values()} - splits_with_classes):
            suitable = [labels for name, labels in maps.items() if not labels.no_labels and _is_for_split(name, split)]
            if suitable:
                self._label_maps[split] = suitable[0]

    def _describe_label_files(self, classes: set[str]) -> None:
        """Record how each known file beside the images is used. An unused label file is suspicious."""
        splits_by_file = defaultdict(list)
        for split, label_map in self._label_maps.items():
            splits_by_file[label_map.uri].append(split or "all")
        companions = {file.name for file in self._companions}  # files above the source may be for other images
        unused = []
        for name in sorted(companions | set(self._parsed)):
            labels, use = self._parsed.get(name), "not used"
            if name in splits_by_file:
                use = f"used for the labels of {' and '.join(splits_by_file[name])} images"
            elif labels and labels.labels and {label for label, _ in labels.labels.values()} <= classes:
                use = "not used: the folders name the same classes"
            elif name in companions and name in self._parsed:
                unused.append(name)
            self._reading.companions[name] = use
        if unused:
            self._reading.suspicions["unused_label_files"] = finding(unused)

    # ------------------------------------------------------------------------------------------------------- entries

    def _images(self) -> Iterator[File]:
        return (file for file in self._tree.files() if not is_hidden(file.name) and is_image(file.name))

    def _check_flat(self) -> None:
        """Raise ValueError unless the name of every image begins with <class>_."""
        without_class = [file.name for file in self._images() if not re.search(r"(^|/)[^/_]+_[^/]*$", file.name)]
        if without_class:
            raise ValueError(
                f"{self._source}: {len(without_class)} images have no class: they lie in no class folder, and their "
                f"names do not begin with a class and _, for example {without_class[0]}; pass --labels FILE, or "
                "--layout unlabelled if there are no classes"
            )

    def _entries(self) -> Iterator[Entry]:
        """Yield the images, and record findings about their labels.

        Raises:
            ValueError: a label map of numbers in order has more or fewer numbers than there are images.
        """
        reading, label_maps = self._reading, self._label_maps
        num_in_order = Counter[str]()  # by label map: images whose label follows from their position
        previous: dict[str, str] = {}  # by label map: the last of these images
        classes = {name for _, name in self._meanings.values()}
        misnamed: list[str] = []
        if label_maps:
            reading.classes = next(iter(label_maps.values())).classes
        for file in self._images():
            folder, _, name = file.name.rpartition("/")
            split, folder_class = self._meanings[folder]
            label: str | int | None = folder_class or None
            prefix = name.partition("_")[0]
            if reading.flat:
                label = prefix
            elif split in label_maps and label_maps[split].in_order:
                # ImageNet's images have a number, from 1 on. Other images count in the order of their names.
                labels = label_maps[split]
                match = re.match(r"ILSVRC2012_(?:val|test)_(\d+)", name)
                label = labels.in_order.get(int(match[1]) - 1 if match else num_in_order[labels.uri])
                num_in_order[labels.uri] += not match
                if not match:
                    _check_order(labels, previous.get(labels.uri, ""), file.name)
                    previous[labels.uri] = file.name
            elif split in label_maps:
                label, given_split = label_maps[split].find(file.name)
                split = given_split or split
            elif label != prefix and prefix in classes:
                misnamed.append(file.name)
            yield Entry(file.name, label, split, file.object, file.start, file.size)
        if misnamed:
            reading.findings["images_named_after_another_class"] = finding(misnamed)
        for labels in dict.fromkeys(label_maps.values()):
            count, expected = num_in_order[labels.uri], len(labels.in_order)
            if count not in (0, expected):
                raise ValueError(
                    f"label map {labels.uri} has {expected} numbers, but there are {count} images; accepted: one "
                    "number for each image"
                )
            if labels.labels and not labels.used:
                raise ValueError(
                    f"label map {labels.uri} names none of the images: its first name is {next(iter(labels.labels))}, "
                    f"and the first image is {next(self._images()).name}; accepted: names or paths of the images"
                )
            if unused := [key for key in labels.labels if key not in labels.used]:
                reading.findings["labels_without_image"] = finding(unused)


def _check_order(labels: LabelMap, previous: str, name: str) -> None:
    """Raise ValueError if two successive names are in the order of texts but not in that of their numbers: 10, 2."""
    numbers, previous_numbers = (list(map(int, re.findall(r"\d+", text))) for text in (name, previous))
    if numbers < previous_numbers and re.split(r"\d+", previous) == re.split(r"\d+", name):
        raise ValueError(
            f"label map {labels.uri} has one number for each image in the order of their names, but {previous} "
            f"precedes {name} as text and follows it as a number; write rows of an image's name and its label"
        )


def _common_prefix(paths: list[list[str]]) -> list[str]:
    """Return the first folders that all paths have in common."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def _class_path(path: list[str], level: int | None) -> list[str]:
    """Return a path without the level of the splits, and without folders such as `images` at its end."""
    folders = [part for i, part in enumerate(path) if i != level]
    while folders and folders[-1].lower() in _IMAGE_FOLDERS:
        folders.pop()
    return folders


def _is_edm(name: str) -> bool:
    """Return whether a file has the name of the label files that EDM's dataset tool writes."""
    return name.rpartition("/")[2] == "dataset.json"


def _is_for_split(name: str, split: str) -> bool:
    """Return whether a label file of a published dataset has the labels of a split."""
    file_name = name.rpartition("/")[2]
    if not re.fullmatch("|".join(_LABEL_FILES[1:4]), file_name):
        return False
    return split == "train" if "train" in file_name else split in ("validation", "")


def _kaggle_files_above(uri: str) -> list[tuple[str, bytes]]:
    """Return (URI, content) of the label files of Kaggle's ImageNet in the folders above a part of its tree."""
    files, parts = [], uri.rstrip("/").split("/")
    if not {"ILSVRC", "Data", "CLS-LOC"} & set(parts[-_KAGGLE_LEVELS:]):
        return []
    for level in range(1, min(_KAGGLE_LEVELS + 1, len(parts))):
        for name in ("LOC_val_solution.csv", "LOC_train_solution.csv"):
            file_uri = "/".join([*parts[:-level], name])
            if storage.exists(file_uri):
                files.append((file_uri, storage.read_bytes(file_uri)))
    return files
