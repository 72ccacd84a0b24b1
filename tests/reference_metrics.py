"""Comparison of features, Inception Scores, the Inception network and published batches with golden data.

The arrays in a file determine its kind. The name of an array determines what is computed for it, and its tolerance,
which is that of the folder's README.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models import inception
from models.manifolds import authenticity, density_coverage, precision_recall, precision_recall_openai, realism
from models.metrics import (
    Gaussian,
    by_class,
    frechet_distance,
    inception_score,
    inception_score_10split,
    kid,
    merge_in_order,
    moments,
    softmax,
    split_scores,
    vendi_score,
)
from models.neighbours import blocks, nearest, squared_radii
from tests.comparison import Row
from tests.reference_batches import compare_batches

Arrays = dict[str, NDArray[Any]]
NETWORK = 1e-4  # relative L2 error of an image's features: every wrong choice of layer, pool or resize gives more


def kid_subsets(
    reference: np.ndarray, samples: np.ndarray, num_subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Return mean and standard deviation of `kid` over random subsets, drawn as torch-fidelity draws them."""
    rng = np.random.RandomState(seed)  # numpy's old generator, since the published protocol is defined by it
    values = []
    for _ in range(num_subsets):
        subset = samples[rng.choice(len(samples), subset_size, replace=False)]
        values.append(kid(reference[rng.choice(len(reference), subset_size, replace=False)], subset).value)
    return float(np.mean(values)), float(np.std(values))


def balls_holding(
    points: NDArray[Any], centres: NDArray[Any], radii: NDArray[Any], strict: bool = False
) -> NDArray[np.int64]:
    """Return how many of the balls around centres [M, D] with squared radii [M] hold each point [N, D]."""
    limits = np.nextafter(radii, -1) if strict else radii
    rows = np.concatenate([block.within(limits)[0] for block in blocks(points, centres)])
    return np.bincount(rows, minlength=len(points))


def recognises(folder: Path) -> bool:
    """Return whether the folder has golden data of metrics."""
    return (folder / "npz" / "MANIFEST.json").exists() or any(_kind(path) for path in sorted(folder.glob("*.npz")))


def compare(folder: Path) -> list[Row]:
    """Return a row for every golden array and every published batch of the folder."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.npz")):
        kind = _kind(path)
        rows += kind(path) if kind else [Row(path.name, "*", "not covered", note="no check knows its arrays")]
    if (folder / "npz").is_dir():
        rows += compare_batches(folder / "npz")
    return rows


def _kind(path: Path) -> Callable[[Path], list[Row]] | None:
    try:
        names = set(_load(path))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        return partial(_unreadable, str(error))
    if {"ref", "sample"} <= names:
        return compare_features
    if "weight_keys" in names:
        return compare_inception
    if any("logits" in name or name.endswith("probs") for name in names):
        return compare_scores
    return None


def _unreadable(reason: str, path: Path) -> list[Row]:
    return [Row(path.name, "*", "FAIL", note=f"cannot be read: {reason}")]


def _load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _row(file: str, case: str, value: Any, golden: Any, tolerance: float, note: str = "") -> Row:
    """Compare the largest difference of two arrays with an absolute tolerance; equal infinities and NaN agree."""
    value, golden = np.asarray(value), np.asarray(golden)
    if value.shape != golden.shape:
        return Row(file, case, "FAIL", note=f"shape {value.shape}, golden {golden.shape}")
    with np.errstate(invalid="ignore"):
        same = (value == golden) | (np.isnan(value.astype(float)) & np.isnan(golden.astype(float)))
        largest = float(np.where(same, 0.0, np.abs(value.astype(float) - golden.astype(float))).max(initial=0.0))
    return Row(file, case, "pass" if largest <= tolerance else "FAIL", largest, tolerance, note)


def _guarded(file: str, case: str, compute: Callable[[], Row]) -> Row:
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  # reported as this row's failure
        return Row(file, case, "FAIL", note=f"{type(error).__name__}: {error}")


# --- Features -------------------------------------------------------------------------------------------------------


class FeatureCase:
    """A pair of feature sets; each quantity is computed once, when an array first needs it."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays, self.ref, self.sample = arrays, arrays["ref"], arrays["sample"]
        self.n = len(self.sample)

    @cached_property
    def offset(self) -> bool:
        """Return whether means are so much larger than the spread that float32 results of other code are useless."""
        spread = np.sqrt(np.trace(self.gaussians[0].covariance) / self.ref.shape[1])
        return bool(np.abs(self.gaussians[0].mean).mean() > 100 * spread)

    @cached_property
    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        return moments(self.ref).gaussian, moments(self.sample).gaussian

    @cached_property
    def trace(self) -> float:
        return sum(float(np.trace(g.covariance)) for g in self.gaussians)

    @cached_property
    def fid(self) -> float:
        return frechet_distance(*self.gaussians)

    @cached_property
    def subsets(self) -> tuple[float, float]:
        count, size, seed = (int(self.arrays[f"kid_{key}"]) for key in ("subsets", "subset_size", "rng_seed"))
        return kid_subsets(self.ref, self.sample, count, size, seed)

    @cached_property
    def openai(self) -> tuple[float, float]:
        return precision_recall_openai(self.ref, self.sample)

    def sharded(self) -> Gaussian:
        shards = np.split(self.sample, self.arrays["shard_cuts"][1:-1])
        return merge_in_order(moments(shard) for shard in shards).gaussian

    def precision_recall(self, k: int) -> tuple[float, float]:
        precision, recall = precision_recall(self.ref, self.sample, k)
        return precision.value, recall.value

    def prdc(self, k: int) -> dict[str, float]:
        density, coverage, *_ = density_coverage(self.ref, self.sample, k)
        inside = balls_holding(self.sample, self.ref, squared_radii(self.ref, k), strict=True) > 0
        covered = balls_holding(self.ref, self.sample, squared_radii(self.sample, k), strict=True) > 0
        strict = {"precision": float(inside.mean()), "recall": float(covered.mean())}
        return {**strict, "density": density.value, "coverage": coverage.value}

    def biased_kid(self) -> float:
        def kernel(x: NDArray[Any], y: NDArray[Any]) -> float:
            return float(((x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3).mean())

        within = kernel(self.sample, self.sample) + kernel(self.ref, self.ref)
        return within - 2 * kernel(self.sample, self.ref)

    def neighbour_ratio(self) -> NDArray[np.float64]:
        to_ref, within_ref = nearest(self.sample, self.ref, 1), nearest(self.ref, self.ref, 1)
        return np.sqrt(to_ref.squared[:, 0]) / np.sqrt(within_ref.squared[to_ref.index[:, 0], 0]).clip(1e-30)

    def by_class(self, metric: Callable[[Any, Any], Any]) -> list[Any]:
        labels = self.arrays["ref_labels"], self.arrays["sample_labels"]
        values = by_class(metric, self.ref, labels[0], self.sample, labels[1])
        return [values[int(c)] for c in self.arrays["classes"]]


def compare_features(path: Path) -> list[Row]:
    """Return the rows of a file with `ref` and `sample` features."""
    arrays, rows = _load(path), []
    case = FeatureCase(arrays)
    for name, golden in arrays.items():
        check = next((check for pattern, check in FEATURE_CHECKS if re.fullmatch(pattern, name)), None)
        if check is None:
            rows.append(Row(path.name, name, "not covered"))
        elif check is not _is_input:
            rows.append(_guarded(path.name, name, partial(_feature_row, path.name, name, golden, case, check)))
    return rows


Tolerance = Callable[[Any], float]
FeatureCheck = Callable[[FeatureCase, str], tuple[Any, Tolerance] | str]  # a text states why there is no target


def _feature_row(file: str, name: str, golden: Any, case: FeatureCase, check: FeatureCheck) -> Row:
    result = check(case, name)
    if isinstance(result, str):
        return Row(file, name, "pass", note=result)
    value, tolerance = result
    return _row(file, name, value, golden, tolerance(golden))


def _is_input(case: FeatureCase, name: str) -> str:
    return "an input"


def _relative(tolerance: float, floor: float = 0.0) -> Tolerance:
    """Return a tolerance relative to the largest entry."""
    return lambda golden: tolerance * float(np.abs(golden[np.isfinite(golden)]).max(initial=0.0)) + floor


def _absolute(tolerance: float) -> Tolerance:
    return lambda golden: tolerance


def _fid(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    if name == "fid_exact":
        is_close = case.trace * 1e-3 > case.arrays[name] and min(len(case.ref), case.n) > case.ref.shape[1]
        return case.fid, _absolute(min(1e-7 * case.trace + 1e-9, 1e-6 if is_close else np.inf))
    if name in ("fid_openai", "fid_torch_fidelity"):  # float32 means
        is_far = case.offset or case.arrays[name] > 100 * case.trace
        return case.fid, _relative(5e-4 if is_far else 1e-6, floor=1e-6)
    return case.fid, _absolute(1e-6 * case.trace + 1e-6)


def _means(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    mean = case.gaussians[name.startswith("sample")].mean
    return mean, _relative(1e-6 if name.endswith("openai") or case.offset else 1e-10)


def _sigma(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    return case.gaussians[name.startswith("sample")].covariance, _relative(1e-6 if case.offset else 1e-10)


def _shards(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    """Compare the merged statistics of shards with the golden mean and covariance."""
    merged, arrays = case.sharded(), case.arrays
    tolerance = 1e-6 if case.offset else 1e-10
    differences = [
        np.abs(merged.mean - arrays["sample_mu_f64"]).max() / np.abs(arrays["sample_mu_f64"]).max(),
        np.abs(merged.covariance - arrays["sample_sigma"]).max() / np.abs(arrays["sample_sigma"]).max(),
    ]
    return arrays[name] + (0 if max(differences) <= tolerance else np.nan), _absolute(0)


def _kid(case: FeatureCase, name: str) -> tuple[Any, Tolerance] | str:
    if name.startswith("kid_full"):
        value = case.biased_kid() if name == "kid_full_biased" else kid(case.ref, case.sample).value
        return value, _relative(1e-6 if case.offset else 1e-9, floor=1e-15)
    value = case.subsets["_std_" in name]
    if name.endswith("f64"):
        return value, _relative(1e-8 if case.offset else 1e-9)
    return "a record of float32 failing, no target" if case.offset else (value, _relative(1e-4))


def _published_precision(case: FeatureCase, name: str) -> tuple[Any, Tolerance] | str:
    """Compare with float32 results of other code, in which one decision may differ from the exact one."""
    if name.endswith("f16"):
        return case.openai["recall" in name], _absolute(0.01)
    if case.offset:
        return "a record of float32 failing, no target"
    precision, recall = case.precision_recall(3)
    if name.startswith("f_score"):
        return 2 * precision * recall / max(1e-5, precision + recall), _absolute(2 / min(case.n, len(case.ref)))
    rows = len(case.ref) if "recall" in name else case.n
    return (recall if "recall" in name else precision), _absolute(1 / rows + 1e-12)


def _exact_precision(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    return case.precision_recall(int(name[-1]))["recall" in name], _absolute(1e-12)


def _radii(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    return squared_radii(case.sample if "sample" in name else case.ref, int(name[-1])), _relative(1e-12)


def _decisions(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    points, centres = (case.sample, case.ref) if name.startswith("sample") else (case.ref, case.sample)
    return balls_holding(points, centres, squared_radii(centres, 3)) > 0, _absolute(0)


def _prdc(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    _, metric, k = name.split("_")
    return case.prdc(int(k[1:]))[metric], _absolute(1e-12)


def _realism(case: FeatureCase, name: str) -> tuple[Any, Tolerance] | str:
    if case.arrays[name].size == 0:
        return "" if np.isinf(realism(case.ref, case.sample)).any() else "golden is empty without copies"
    return realism(case.ref, case.sample), _relative(1e-9)


def _nearest(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    neighbours = nearest(case.sample, case.ref, 1)
    if "index" in name:
        return neighbours.index[:, 0], _absolute(0)
    return np.sqrt(neighbours.squared[:, 0]), _relative(1e-12)


def _ratio(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    """Compare entries relatively, because copies in the reference make some of them huge."""
    ratio, golden = case.neighbour_ratio(), case.arrays[name]
    return np.where(np.isclose(ratio, golden, rtol=1e-9, atol=0), golden, ratio), _absolute(0)


def _authenticity(case: FeatureCase, name: str) -> tuple[Any, Tolerance] | str:
    if name.endswith("exact"):
        return authenticity(case.ref, case.sample).value, _absolute(1e-9)
    if case.offset:
        return "a record of float32 failing, no target"
    return authenticity(case.ref, case.sample).value, _absolute(100 / case.n + 1e-9)


def _classes(case: FeatureCase, name: str) -> tuple[Any, Tolerance]:
    if name == "class_fid_exact":
        values = case.by_class(lambda r, s: frechet_distance(moments(r), moments(s)))
        traces = case.by_class(lambda r, s: sum(np.trace(moments(x).gaussian.covariance) for x in (r, s)))
        return values, _absolute(1e-7 * float(max(traces)) + 1e-9)
    if name == "class_n":
        return case.by_class(lambda r, s: (len(r), len(s))), _absolute(0)
    k = int(name[-1])
    return case.by_class(lambda r, s: precision_recall(r, s, k)["recall" in name].value), _absolute(1e-12)


# Pattern of an array's name -> function that computes its value and its tolerance.
FEATURE_CHECKS: list[tuple[str, FeatureCheck]] = [
    (r"ref|sample|(ref|sample)_labels|classes|kid_(subsets|subset_size|rng_seed)|\w+_min_rel_margin", _is_input),
    (r"(ref|sample)_mu_(openai|f64)", _means),
    (r"(ref|sample)_sigma", _sigma),
    (r"shard_cuts", _shards),
    (r"fid_\w+", _fid),
    (r"kid_(full|torch_fidelity)_\w+", _kid),
    (
        r"(precision|recall|f_score)_(openai_f32|openai_f16|torch_fidelity)|blocked\d+_(precision|recall)_f32",
        _published_precision,
    ),
    (r"(precision|recall)_exact_k\d", _exact_precision),
    (r"radii_sq_(ref|sample)_k\d", _radii),
    (r"sample_in_ref_manifold|ref_in_sample_manifold", _decisions),
    (r"prdc_(precision|recall|density|coverage)_k\d", _prdc),
    (r"realism_exact", _realism),
    (r"nn_(index|dist)_sample_to_ref", _nearest),
    (r"nn_ratio", _ratio),
    (r"authpct_(exact|dgm_eval)", _authenticity),
    (r"vendi_\w+_sample", lambda case, name: (vendi_score(case.sample), _relative(1e-9))),
    (r"class_(fid_exact|precision_k\d|recall_k\d|n)", _classes),
]


# --- Inception Score ------------------------------------------------------------------------------------------------


def compare_scores(path: Path) -> list[Row]:
    """Return the rows of a file with logits or probabilities and their scores."""
    arrays, rows = _load(path), []
    for name, golden in arrays.items():
        if name in ("logits", "logits1008") or (name.endswith("_probs")):
            continue
        value = _score(arrays, name)
        if value is None:
            rows.append(Row(path.name, name, "not covered"))
            continue
        tolerance = (2e-6 if "openai" in name else 1e-9) * max(1.0, float(np.abs(golden).max()))
        rows.append(_guarded(path.name, name, partial(_score_row, path.name, name, value, golden, tolerance)))
    return rows


def _score_row(file: str, name: str, value: Callable[[], Any], golden: Any, tolerance: float) -> Row:
    return _row(file, name, value(), golden, tolerance)


def _score(arrays: Arrays, name: str) -> Callable[[], Any] | None:
    """Return the function that computes the score of this name, or None if the name is unknown."""
    if name == "probs":
        return lambda: softmax(arrays["logits"])
    if name.endswith("_is_exact"):
        return lambda: inception_score(arrays[name.replace("_is_exact", "_probs")]).value
    if match := re.fullmatch(r"is(\d*)_(openai|exact)(_per)?_split(\d+)", name):
        probabilities, size = softmax(arrays[f"logits{match[1]}"]), int(match[4])
        bounds = np.append(np.arange(0, len(probabilities), size), len(probabilities))
        if match[3]:
            return lambda: split_scores(probabilities, bounds)[0]
        return lambda: inception_score(probabilities, size).value
    match = re.fullmatch(r"is(\d*)_(torch_fidelity|dgm_eval)_splits(\d+)_(shuffle1|shuffle0|noshuffle)(_std)?", name)
    if match is None:
        return None
    probabilities, count = softmax(arrays[f"logits{match[1]}"]), int(match[3])
    seed = 2020 if match[4] == "shuffle1" else None
    if match[5] is None:
        return lambda: inception_score_10split(probabilities, count, seed).value
    order = (
        np.arange(len(probabilities)) if seed is None else np.random.RandomState(seed).permutation(len(probabilities))
    )
    bounds = np.arange(count + 1) * len(probabilities) // count
    return lambda: split_scores(probabilities[order], bounds)[0].std()


# --- The Inception network ------------------------------------------------------------------------------------------


def random_weights(arrays: Arrays, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Return the state dict of the README's recipe, from one Philox stream over the sorted keys."""
    bits = np.random.Philox(key=int(arrays["seed"]))
    state = {}
    for key in sorted(shapes):
        shape = shapes[key]
        u = (bits.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**24
        if key.endswith(("bn.weight", "bn.running_var")):
            values = 0.5 + u
        else:
            by_name = {"bn.bias": 0.2, "bn.running_mean": 0.2, "fc.weight": float(arrays["fc_scale"]), "fc.bias": 0.5}
            ending = next((scale for name, scale in by_name.items() if key.endswith(name)), None)
            values = (2 * u - 1) * (np.sqrt(6 / np.prod(shape[1:])) if ending is None else ending)
        state[key] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return state


def compare_inception(path: Path) -> list[Row]:
    """Return the rows of a file with images and the outputs of a network with regenerated random weights."""
    arrays = _load(path)
    tables = sorted(path.parent.glob("*state_dict*.json"))
    if len(tables) != 1:
        return [Row(path.name, "*", "FAIL", note=f"expected one *state_dict*.json beside it, found {len(tables)}")]
    try:
        state = random_weights(arrays, json.loads(tables[0].read_text())["shapes"])
        network = inception.InceptionNetwork(state)
    except (ValueError, KeyError) as error:
        return [Row(path.name, "*", "FAIL", note=f"the network cannot be created: {error}")]
    rows = list(_weight_rows(path.name, arrays, state))
    outputs: dict[str, Arrays] = {}
    for name, golden in arrays.items():
        images, _, output = name.partition("/")
        if images == "ablation_rel_l2":
            is_expected = (golden <= NETWORK) == (output == "as_defined")
            note = "pool3 by a wrong choice" if output != "as_defined" else ""
            rows.append(Row(path.name, name, "pass" if is_expected else "FAIL", float(golden), NETWORK, note))
        elif output:
            if images not in outputs:
                outputs[images] = _network_outputs(network, state["fc.bias"], arrays[images])
            row = partial(_network_row, path.name, name, output, golden, outputs[images])
            rows.append(_guarded(path.name, name, row))
        elif golden.dtype != np.uint8 and not name.startswith("weight_") and name not in ("seed", "fc_scale"):
            rows.append(Row(path.name, name, "not covered"))
    return rows


def _weight_rows(file: str, arrays: Arrays, state: dict[str, torch.Tensor]) -> Iterator[Row]:
    keys = [str(key) for key in arrays["weight_keys"]]
    yield Row(file, "weight_keys", "pass" if keys == sorted(state) else "FAIL")
    flat = [state[key].flatten() for key in keys]
    yield _row(file, "weight_first", [float(f[0]) for f in flat], arrays["weight_first"], 0)
    yield _row(file, "weight_last", [float(f[-1]) for f in flat], arrays["weight_last"], 0)
    sums = np.array([f.double().sum().item() for f in flat])
    yield _row(file, "weight_sum_f64", sums / arrays["weight_sum_f64"], np.ones(len(keys)), 1e-9, "relative")


def _network_outputs(network: inception.InceptionNetwork, bias: torch.Tensor, images: NDArray[np.uint8]) -> Arrays:
    """Return all outputs for one set of images that golden arrays contain, by the first part of their names."""
    features = network(images)
    assert features.spatial is not None and features.logits is not None
    with torch.inference_mode():
        resized = inception.resize(torch.from_numpy(images).float())
        layers = inception.activations(network.units, ((resized - 128) / 128).permute(0, 3, 1, 2))
        means = {f"channel_mean/{name}": layer.mean((2, 3)).numpy() for name, layer in layers}
    branch = "Mixed_6d.branch1x1"  # comes first in its block
    means[f"channel_mean/{branch}"] = means["channel_mean/Mixed_6d"][:, : len(network.units[branch][0])]
    named = {"pool3": features.pool, "spatial": features.spatial, "logits": features.logits}
    biased = features.logits + bias.numpy()
    return {**named, **means, "resized": resized.numpy(), "biased": biased, "softmax": softmax(features.logits)}


def _network_row(file: str, name: str, output: str, golden: NDArray[Any], outputs: Arrays) -> Row:
    if match := re.fullmatch(r"resized_299_(?:stride(\d+)|full_image(\d+)|rows(\d+)to(\d+))", output):
        resized = outputs["resized"]
        if match[1]:
            value = resized[:, :: int(match[1]), :: int(match[1])]
        else:
            value = resized[int(match[2])] if match[2] else resized[0, int(match[3]) : int(match[4]) + 1]
        return _row(file, name, value, golden, 1e-3)
    if output.startswith("softmax_unbiased"):
        return _row(file, name, outputs["softmax"], golden, 1e-4)
    if output.startswith("logits_") and not output.startswith("logits_unbiased"):
        value = outputs["biased"]
    elif output in outputs:
        value = outputs[output]
    elif re.fullmatch(r"(pool3|spatial|logits_unbiased)(_\w+)?", output):
        value = outputs[output.split("_")[0]]
    else:
        return Row(file, name, "not covered")
    error = float((np.linalg.norm(value - golden, axis=1) / np.linalg.norm(golden, axis=1)).max())
    if output.endswith("pytorch_fid"):  # half-pixel resize and 2x/255 - 1: must differ from FID's own definition
        return Row(file, name, "pass" if error > NETWORK else "FAIL", error, note="another definition: must differ")
    return Row(file, name, "pass" if error <= NETWORK else "FAIL", error, NETWORK)
