"""Images whose splits and classes follow from file names, from folders, or from label files beside them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass
class _Survey:
    """The kinds of files in a tree."""

    folders: Counter[str] = field(default_factory=Counter)  # number of images by folder
    first: dict[str, str] = field(default_factory=dict)  # one image of each folder
    without: set[str] = field(default_factory=set)  # folders with other files, or with none
    endings: Counter[str] = field(default_factory=Counter)  # extensions of files that are no images
    hidden: int = 0
    companions: list[File] = field(default_factory=list)


def read_names(tree: Tree, layout: Layout, labels: LabelMap | None, splits: Splits) -> Reading:
    """Read a tree of images: class folders, files named <class>_<anything>, or images with label files.

    layout: auto, folder, flat or unlabelled. labels: the user's label map.

    Raises:
        ValueError: there are no images, or their classes cannot be determined.
    """
    survey = _survey(tree)
    if not survey.folders:
        others = ", ".join(ending for ending, _ in survey.endings.most_common(5))
        others = f", but files that end in {others}" if others else ""
        raise ValueError(f"--source {tree.listing.named} holds no images{others}; accepted: {ACCEPTED}")
    endings = {f"files that end in {ending}": count for ending, count in survey.endings.most_common()}
    reading = Reading("", left_out=tree.left_out | endings)
    if survey.hidden:
        reading.left_out["hidden files"] = survey.hidden
    if empty := [piece.stem for piece in tree.pieces if piece.object and not len(piece.members)]:
        reading.findings["archives_without_files"] = finding(empty)
    places = _places(survey, splits, layout, reading)
    beside = _companions(tree, survey)
    if labels is not None:
        reading.layout = f"images with the labels of {labels.uri}"
        chosen = {split: labels for split, _ in places.values()}
    else:
        chosen = _choose(tree, reading, layout, survey, places, beside)
    classes = {name for _, name in places.values() if name}
    _name_companions(reading, survey, chosen, beside, classes)
    reading.flat = layout == "flat" or (layout == "auto" and not chosen and not classes)
    if reading.flat:
        _check_flat(tree)
        reading.layout = "files named <class>_<anything>"
    elif layout == "unlabelled" and labels is None:
        reading.layout = "images without labels"
    elif layout == "folder" and not classes:
        raise ValueError(f"--source {tree.listing.named} has no class folders, which --layout folder needs")
    if labels or layout in ("flat", "unlabelled") or any(_is_edm(found.uri) for found in chosen.values()):
        reading.suspicions.pop("folders_within_classes", None)  # folders are not used as classes
        places = {folder: (split, "") for folder, (split, _) in places.items()}
    if labels or layout == "unlabelled":
        reading.suspicions.pop("unused_label_files", None)  # the user has decided which labels are used
    reading.entries = _entries(tree, reading, places, chosen)
    return reading


def _survey(tree: Tree) -> _Survey:
    found = _Survey()
    known = re.compile("|".join((*_LABEL_FILES, _NAME_FILES)))
    for file in tree.files():
        folder, _, name = file.name.rpartition("/")
        if is_hidden(file.name):
            found.hidden += 1
        elif is_image(name):
            found.folders[folder] += 1
            found.first.setdefault(folder, file.name)
        else:
            found.without.add(folder)
            if name and (file.sidecar is None or name == "dataset.json"):
                found.endings[os.path.splitext(name)[1].lower() or "none"] += 1
            if known.fullmatch(name):
                found.companions.append(file)
    return found


# -------------------------------------------------------------------------------------------- meaning of the folders


def _places(survey: _Survey, splits: Splits, layout: Layout, reading: Reading) -> dict[str, tuple[str, str]]:
    """Return the split and the class of the images in every folder. Either may be empty.

    Folders around all images are ignored, and so are folders such as `images` between a class and its images. One level
    of folders may be splits: the first level on which all names are names of splits.
    """
    chains = {folder: folder.split("/") if folder else [] for folder in survey.folders}
    around = _shared(list(chains.values()))
    if len(chains) == 1 and around and layout == "folder":
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
    _suspect(reading, survey, splits, inner)
    return {folder: (split[folder], (chain or [""])[0]) for folder, chain in inner.items()}


def _shared(chains: list[list[str]]) -> list[str]:
    """Return the common first folders of all chains."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*chains, strict=False))]


def _inner(chain: list[str], level: int | None) -> list[str]:
    """Return the class folders of a chain: without the level of the splits, and without `images` at the end."""
    rest = [part for i, part in enumerate(chain) if i != level]
    while rest and rest[-1].lower() in _BETWEEN:
        rest.pop()
    return rest


def _suspect(reading: Reading, survey: _Survey, splits: Splits, inner: dict[str, list[str]]) -> None:
    """Record names that make this interpretation of the folders suspicious."""
    if like := sorted({part for chain in inner.values() for part in chain if splits.looks_like(part)}):
        reading.suspicions["names_like_splits"] = finding(like)
    if nested := sorted("/".join(chain) for chain in inner.values() if len(chain) > 1):
        reading.suspicions["folders_within_classes"] = finding(nested)
    parts = {part for folder in survey.folders for part in folder.split("/")}
    empty = sorted({folder.rpartition("/")[2] for folder in survey.without} - parts - {""})
    if empty and any(inner.values()):
        reading.findings["folders_without_images"] = finding(empty)


# ------------------------------------------------------------------------------------------------------ label files


def _companions(tree: Tree, survey: _Survey) -> dict[str, LabelMap | None]:
    """Return the label maps in files beside the images by name; None if a file that may be one cannot be read."""
    contents = _kaggle_files_above(tree.listing.uri)
    for file in survey.companions:
        if not re.fullmatch(_NAME_FILES, file.name.rpartition("/")[2]) and file.size <= _COMPANION_BYTES:
            place = storage.Range(file.object or file.name, file.start, file.size)
            contents.append((file.name, read_ranges(tree.listing.uri, [place])[0]))
    found: dict[str, LabelMap | None] = {}
    for name, data in contents:
        try:
            found[name] = parse_label_map(name, data, base=name[: name.rfind("/") + 1])
        except ValueError:
            found[name] = None  # reported as a file that is not used
    return found


def _choose(
    tree: Tree,
    reading: Reading,
    layout: Layout,
    survey: _Survey,
    places: dict[str, tuple[str, str]],
    beside: dict[str, LabelMap | None],
) -> dict[str, LabelMap]:
    """Return the label map of every split that has one.

    EDM's dataset.json is used for all images. Other label files are used for splits without class folders.
    """
    maps = {name: found for name, found in beside.items() if found is not None}
    named = Counter[str]()  # images in class folders, by split
    for folder, (split, name) in places.items():
        named[split] += survey.folders[folder] if name else 0
        beside_classes = not name and any(other for part, other in places.values() if part == split)
        if beside_classes and layout in ("auto", "folder") and not any(map(_is_edm, maps)):
            raise ValueError(
                f"--source {tree.listing.named}: {survey.folders[folder]} images lie beside class folders and in none "
                f"of them, for example {survey.first[folder]}; move them, or pass --labels FILE"
            )
    if layout == "auto" and (edm := next(filter(_is_edm, maps), None)):
        described = "images without labels, as {} says" if maps[edm].null else "images with the labels of {}"
        reading.layout = described.format(edm)
        return {split: maps[edm] for split, _ in places.values()}
    reading.layout = "class folders" if any(named.values()) else "images with labels in files beside them"
    chosen = {}
    for split in [] if layout in ("flat", "unlabelled") else sorted(named):
        serving = [found for name, found in maps.items() if not found.null and _serves(name, split)]
        if serving and not named[split]:
            chosen[split] = serving[0]
    return chosen


def _is_edm(name: str) -> bool:
    return name.rpartition("/")[2] == "dataset.json"


def _serves(name: str, split: str) -> bool:
    """Return whether a label file of a known kind has the labels of a split."""
    last = name.rpartition("/")[2]
    known = re.fullmatch("|".join(_LABEL_FILES[1:4]), last) is not None
    return known and split in (("train",) if "train" in last else ("validation", ""))


def _name_companions(
    reading: Reading,
    survey: _Survey,
    chosen: dict[str, LabelMap],
    beside: dict[str, LabelMap | None],
    classes: set[str],
) -> None:
    """Record how each known file beside the images is used. An unused label file is suspicious."""
    serves = defaultdict(list)
    for split, found in chosen.items():
        serves[found.uri].append(split or "all")
    within = {file.name for file in survey.companions}  # others lie above the source, and may belong to other images
    unused = []
    for name in sorted(within | set(beside)):
        labels = beside.get(name)
        if name in serves:
            reading.companions[name] = f"used for the labels of {' and '.join(serves[name])} images"
        elif labels and labels.names and labels.names <= classes:
            reading.companions[name] = "not used: the folders name the same classes"
        else:
            reading.companions[name] = "not used"
            unused += [name] if name in within and name in beside else []
    if unused:
        reading.suspicions["unused_label_files"] = finding(unused)


def _kaggle_files_above(uri: str) -> list[tuple[str, bytes]]:
    """Return (name, content) of the label files of Kaggle's ImageNet in the folders above a part of its tree."""
    found, parts = [], uri.rstrip("/").split("/")
    if not {"ILSVRC", "Data", "CLS-LOC"} & set(parts[-_ABOVE:]):
        return []
    for depth in range(1, min(_ABOVE + 1, len(parts))):
        for name in ("LOC_val_solution.csv", "LOC_train_solution.csv"):
            place = "/".join([*parts[:-depth], name])
            if storage.exists(place):
                found.append((place, storage.read_bytes(place)))
    return found


# ----------------------------------------------------------------------------------------------------------- entries


def _check_flat(tree: Tree) -> None:
    """Raise ValueError unless the name of every image begins with <class>_."""
    odd = [file.name for file in _images(tree) if "_" not in file.name.rpartition("/")[2]]
    if odd:
        raise ValueError(
            f"--source {tree.listing.named}: {len(odd)} images have no class: they lie in no class folder, and their "
            f"names do not begin with a class and _, for example {odd[0]}; pass --labels FILE, or --layout unlabelled "
            "if there are no classes"
        )


def _images(tree: Tree) -> Iterator[File]:
    return (file for file in tree.files() if not is_hidden(file.name) and is_image(file.name))


def _entries(
    tree: Tree, reading: Reading, places: dict[str, tuple[str, str]], chosen: dict[str, LabelMap]
) -> Iterator[Entry]:
    """Yield the images, and record findings about their labels."""
    numbered = Counter[str]()  # images of each split that got a label by their position
    classes, strangers = {name for _, name in places.values()}, list[str]()
    if chosen:
        reading.classes = next(iter(chosen.values())).classes
    for file in _images(tree):
        folder, _, name = file.name.rpartition("/")
        split, label = places[folder]
        if split == OUT:
            kind = "images that --split leaves out"
            reading.left_out[kind] = reading.left_out.get(kind, 0) + 1
            continue
        found: str | int | None = label or None
        prefix = name.partition("_")[0]
        if reading.flat:
            found = prefix
        elif split in chosen and chosen[split].in_order:
            match = re.match(r"ILSVRC2012_(?:val|test)_(\d+)", name)  # else the position in the order of the names
            place = int(match[1]) - 1 if match else numbered[split]
            numbered[split] += not match
            found = chosen[split].in_order.get(place)
        elif split in chosen:
            found, given = chosen[split].find(file.name)
            split = given or split
        elif found != prefix and prefix in classes:
            strangers.append(file.name)
        yield Entry(file.name, found, split, file.object, file.start, file.size)
    if strangers:
        reading.findings["images_named_after_another_class"] = finding(strangers)
    for labels in dict.fromkeys(chosen.values()):
        if labels.in_order and (count := sum(numbered.values())) not in (0, expected := len(labels.in_order)):
            raise ValueError(f"label map {labels.uri} has {expected} numbers, but there are {count} images")
        if unused := labels.unused():
            reading.findings["labels_without_image"] = finding(unused)
