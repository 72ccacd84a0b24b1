"""Named configs for preparing datasets."""

from orchestrator.config import DIGITS, IMAGES
from orchestrator.data.config import PrepareConfig


def dataset_presets() -> dict[str, tuple[str, PrepareConfig]]:
    """Return (description, config) of every dataset by name."""
    digits = PrepareConfig(source="digits", output="datasets/digits", name="digits", validation_fraction=0.2)
    images = PrepareConfig(
        source="images",
        output="datasets/images",
        name="images",
        background="white",
        exif_orientation="apply",
        validation_fraction=0.05,
    )
    imagenet = PrepareConfig(
        source="ILSVRC2012_img_train.tar",
        output="datasets/imagenet",
        name="imagenet",
        validation_fraction=0.004,  # 5,000 images, on which classifiers are validated
        num_workers=8,
    )
    cifar10 = PrepareConfig(source="cifar-10-binary.tar.gz", output="datasets/cifar10", name="cifar10")
    cifar100 = PrepareConfig(source="cifar-100-binary.tar.gz", output="datasets/cifar100", name="cifar100")
    imagenet64 = PrepareConfig(source="Imagenet64", output="datasets/imagenet64", name="imagenet64", num_workers=8)
    lsun = PrepareConfig(
        source="bedroom_train_lmdb", output="datasets/lsun-bedroom", name="lsun-bedroom", resolution=256, num_workers=8
    )
    about = "a folder for each class, archives, Parquet, or files with a label map"
    return {
        "digits": (DIGITS, digits),
        "images": (f"{IMAGES}: {about}", images),
        "images_cpu": (f"the same as images: {about}", images),
        "imagenet": ("ILSVRC2012 as downloaded: a tar of tars, read without unpacking", imagenet),
        "cifar10": ("CIFAR-10 from its binary archive, with its own training and test images", cifar10),
        "cifar100": ("CIFAR-100 from its binary archive, with its 100 fine classes", cifar100),
        "imagenet64": ("downsampled ImageNet of 64 pixels, from its .npz files in one folder", imagenet64),
        "lsun-bedroom": ("LSUN bedrooms from their LMDB, as crops of 256 pixels, without labels", lsun),
    }
