"""WebDataset: tars in which the members with one name up to the first dot are a sample: an image, a .cls, a .json."""

import json
from collections.abc import Iterator

from orchestrator.data.sources.archives import File, Tree, is_hidden, is_image
from orchestrator.data.sources.index import Entry, Reading, Splits, finding


def is_webdataset(tree: Tree) -> bool:
    """Return whether the first archive with images has a .cls or .json for one of them."""
    for archive in tree.members:
        files = list(tree.files(archive)) if archive.object else []
        images = {_sample(file) for file in files if _is_image(file)}
        if images:
            return any(file.sidecar and _sample(file) in images for file in files)
    return False


def read_webdataset(tree: Tree, splits: Splits) -> Reading:
    """Read the images of WebDataset tars. Keys are <tar>/<name of the sample>. The names of tars give the splits.

    Raises:
        ValueError: no sample has a label, or a label is neither an integer nor a name (when entries are read).
    """
    reading = Reading("WebDataset")
    of_tar = {archive.stem: splits.of_shard(archive.stem) for archive in tree.members if archive.object}
    if any(of_tar.values()) and (others := [stem for stem, split in of_tar.items() if not split]):
        reading.suspicions["names_like_splits"] = finding(others)
    reading.entries = _entries(tree, of_tar, reading)
    return reading


def _entries(tree: Tree, of_tar: dict[str, str], reading: Reading) -> Iterator[Entry]:
    keys: set[str] = set()  # of .json files that have no label
    labelled, differing = 0, []
    for archive in tree.members:
        if archive.object is None:
            continue
        labels: dict[str, dict[str, str | int]] = {".cls": {}, ".json": {}}
        for file in tree.files(archive):
            if file.sidecar is not None:
                fields = json.loads(file.sidecar)
                keys.update(fields.get("keys", ()))
                if "label" in fields:
                    ending = ".json" if file.name.lower().endswith(".json") else ".cls"
                    labels[ending][_sample(file)] = _checked(tree, file, fields["label"])
        both = labels[".json"] | labels[".cls"]
        labelled += len(both)
        differing += [
            f"{archive.stem}/{name.removeprefix(archive.prefix)}"
            for name, label in labels[".json"].items()
            if both[name] != label
        ]
        for file in tree.files(archive):
            if _is_image(file):
                sample = _sample(file)
                key = f"{archive.stem}/{sample.removeprefix(archive.prefix)}"
                yield Entry(key, both.get(sample), of_tar[archive.stem], file.object, file.start, file.size)
    if not labelled:
        raise ValueError(
            f"--source {tree.listing.named}: no sample has a label; the .json files have the fields "
            f"{', '.join(sorted(keys)[:20])}; pass --label-column with one of them, --labels FILE, or "
            "--layout unlabelled"
        )
    if differing:
        reading.findings["labels_that_differ_between_cls_and_json"] = finding(differing)


def _is_image(file: File) -> bool:
    name = file.name.rpartition("/")[2]
    return name.count(".") == 1 and is_image(name) and not is_hidden(file.name)


def _sample(file: File) -> str:
    folder, slash, name = file.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _checked(tree: Tree, file: File, label: object) -> str | int:
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(
            f"{tree.listing.uri}/{file.object}: {file.name} has the label {label}; accepted: an integer or a name"
        )
    return label
