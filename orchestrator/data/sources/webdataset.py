"""WebDataset: tars in which members with the same name up to its first dot are a sample: an image, a .cls, a .json."""

import json
from collections.abc import Iterator

from orchestrator.data.sources.archives import File, Tree, is_hidden, is_image
from orchestrator.data.sources.index import Entry, Reading, Splits, finding


def is_webdataset(tree: Tree) -> bool:
    """Return whether an archive has a .cls or .json for one of its images."""
    for archive, members in tree.members.items():
        if archive.object and members["sidecar"].null_count < len(members):
            files = list(tree.files(archive))
            samples = {_sample_name(file) for file in files if _is_image(file)}
            if any(file.sidecar and _sample_name(file) in samples for file in files):
                return True
    return False


def read_webdataset(tree: Tree, splits: Splits) -> Reading:
    """Read the images of WebDataset tars. Keys are <tar>/<name of the sample>. The names of tars give the splits.

    Raises:
        ValueError: no sample has a label, or a label is neither an integer nor a name (when entries are read).
    """
    reading = Reading("WebDataset")
    stems = [archive.stem for archive in tree.members if archive.object]
    split_of_tar = splits.of_shards(stems, reading.suspicions)
    reading.entries = _entries(tree, split_of_tar, reading)
    return reading


def _entries(tree: Tree, split_of_tar: dict[str, str], reading: Reading) -> Iterator[Entry]:
    """Yield the images, and record the labels that differ between .cls and .json.

    Raises:
        ValueError: no sample has a label, or a label is neither an integer nor a name.
    """
    keys: set[str] = set()  # fields of the .json files that have no label
    num_labelled, differing = 0, []
    for archive in tree.members:
        if archive.object is None:
            continue
        labels: dict[str, dict[str, str | int]] = {".cls": {}, ".json": {}}
        for file in tree.files(archive):
            if file.sidecar is not None:
                fields = json.loads(file.sidecar)
                keys.update(fields.get("keys", ()))
                if fields.get("label", -1) not in (-1, "", None):  # these mean that there is no label, as in Parquet
                    ending = ".json" if file.name.lower().endswith(".json") else ".cls"
                    labels[ending][_sample_name(file)] = _check_label(tree, file, fields["label"])
        merged = labels[".json"] | labels[".cls"]  # if a sample has both, the .cls is used
        num_labelled += len(merged)
        differing += [
            f"{archive.stem}/{name.removeprefix(archive.prefix)}"
            for name, label in labels[".json"].items()
            if merged[name] != label
        ]
        for file in tree.files(archive):
            if _is_image(file):
                name = _sample_name(file)
                key = f"{archive.stem}/{name.removeprefix(archive.prefix)}"
                yield Entry(key, merged.get(name), split_of_tar[archive.stem], file.object, file.start, file.size)
    if not num_labelled:
        raise ValueError(
            f"--source {tree.listing.source}: no sample has a label; the .json files have the fields "
            f"{', '.join(sorted(keys)[:20])}; pass --label-column with one of them, --labels FILE, or "
            "--layout unlabelled"
        )
    if differing:
        reading.findings["labels_that_differ_between_cls_and_json"] = finding(differing)


def _is_image(file: File) -> bool:
    """Return whether a file is the image of a sample; names with several dots, such as 1.mask.png, are not."""
    name = file.name.rpartition("/")[2]
    return name.count(".") == 1 and is_image(name) and not is_hidden(file.name)


def _sample_name(file: File) -> str:
    """Return the path of a file up to the first dot of its name."""
    folder, slash, name = file.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _check_label(tree: Tree, file: File, label: object) -> str | int:
    """Return a label as an integer or a name; raise ValueError if it is neither."""
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(
            f"{tree.listing.uri}/{file.object}: {file.name} has the label {label}; accepted: an integer or a name"
        )
    return label
