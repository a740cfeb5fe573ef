"""CIFAR-10 and CIFAR-100 as their files describe them: names, checksums, classes, sizes.

    layout = LAYOUTS["cifar100"]
    layout.python                      # {"train": md5, "test": md5}
    layout.class_names[layout.coarse[19]]

All that sets one of the two apart is here; `formats` and `sources` read either by its layout.

Source: the CIFAR page (https://www.cs.toronto.edu/~kriz/cifar.html) for names, formats and the md5
of the archives; torchvision's `cifar.py` for those of the python files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cifarflow.data.download import Remote

IMAGE_SHAPE = (32, 32, 3)
PIXELS = 32 * 32 * 3
TFDS_VERSION = "3.0.2"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a data set of 32x32 images lies in its files.

    Attributes:
      name: "cifar10", what `data` calls it, and TFDS its shards.
      title: "CIFAR-10", for people; in small letters what archives begin with.
      class_names: the classes, by label.
      python_folder: what the archive of the python version holds.
      python: its batch files and their md5, training batches in order and the test batch last.
      python_meta: a file beside them that is checked if it is there; nothing in it is needed.
      binary_folder: what the archive of the binary version holds.
      binary: its batch files and their md5, in the same order.
      python_archive_md5: of the .tar.gz, for the message about one that is cut short.
      binary_archive_md5: likewise.
      remote: what to download.
      labels_key: of the labels in a pickled batch.
      arrays_sha256: of the decoded arrays, see `formats.digest`: what npz and TFDS files are held
        against, which have no official checksum of their own.  Where it is "", the binary files
        that the arrays would make are held against theirs.
      coarse_names: the coarse classes; their label stands before the other in a binary record.
      coarse: the coarse class of each class.
      train_examples: training images, equally many in each training batch.
      test_examples: test images.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    python_folder: str
    python: Mapping[str, str]
    python_meta: Mapping[str, str]
    binary_folder: str
    binary: Mapping[str, str]
    python_archive_md5: str
    binary_archive_md5: str
    remote: Remote
    labels_key: bytes = b"labels"
    arrays_sha256: str = ""
    coarse_names: tuple[str, ...] = ()
    coarse: tuple[int, ...] = ()
    train_examples: int = 50_000
    test_examples: int = 10_000

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def label_bytes(self) -> int:
        """The bytes before the pixels in a record of the binary version; the last is the label."""
        return 2 if self.coarse else 1

    def examples_in(self, index: int) -> int:
        """How many images the batch file at this place has."""
        batches = len(self.python) - 1
        return self.train_examples // batches if index < batches else self.test_examples

    @property
    def archive_names(self) -> tuple[str, str]:
        """The official names of the archives of the python and the binary version."""
        stem = self.title.lower()
        return f"{stem}-python.tar.gz", f"{stem}-binary.tar.gz"

    @property
    def known_names(self) -> tuple[str, ...]:
        """Where in a folder Keras, torchvision, TFDS and people leave the set.

        Keras writes `-target`, `_archive` and `-py.tar.gz`.  A folder comes before an archive
        because it is read faster.
        """
        python_archive, binary_archive = self.archive_names
        return (
            f"{self.name}.npz",
            self.python_folder,
            f"{self.python_folder}-target/{self.python_folder}",
            self.binary_folder,
            python_archive,
            f"{self.python_folder}.tar.gz",
            f"{self.python_folder}-target_archive",
            binary_archive,
            f"{self.binary_folder}.tar.gz",
            f"{self.name}/{TFDS_VERSION}",
            TFDS_VERSION,
        )


CIFAR10 = Layout(
    name="cifar10",
    title="CIFAR-10",
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    python_folder="cifar-10-batches-py",
    python={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    python_meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    binary_folder="cifar-10-batches-bin",
    binary={
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    python_archive_md5="c58f30108f718f92721af3b95e74349a",
    binary_archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    # What TFDS's own `cifar10` downloads, with TFDS's checksum.
    remote=Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    arrays_sha256="9bb26ea52d5b395389569734654d923ce7ba78a18a63b56115e3cecfb33f114d",
)

# The table of the CIFAR page, by the names in the files; both kinds are numbered in the order of
# the alphabet.
_SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
_COARSE_OF = {
    fine: number for number, fines in enumerate(_SUPERCLASSES.values()) for fine in fines.split()
}

CIFAR100 = Layout(
    name="cifar100",
    title="CIFAR-100",
    class_names=tuple(sorted(_COARSE_OF)),
    python_folder="cifar-100-python",
    python={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    python_meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    binary_folder="cifar-100-binary",
    binary={
        "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
        "test.bin": "4499cfba6c016c1be1438163640a0898",
    },
    python_archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    binary_archive_md5="03b5dce01913d631647c71ecec9e9cb8",
    remote=Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        168_513_733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    labels_key=b"fine_labels",
    coarse_names=tuple(_SUPERCLASSES),
    coarse=tuple(_COARSE_OF[name] for name in sorted(_COARSE_OF)),
)

LAYOUTS = {layout.name: layout for layout in (CIFAR10, CIFAR100)}
