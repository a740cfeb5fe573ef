"""Fixtures for all tests: real CIFAR-10 where there is one, and nobody's own caches."""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from pathlib import Path

import hypothesis
import pytest

# The same examples every time: a suite that fails now and then is worth little.  To look for new
# ones: HYPOTHESIS_PROFILE=default python -m pytest.
hypothesis.settings.register_profile("suite", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_modifyitems(items):
    """Where several processes share the tests, one file's stay together, for what they share.

    So do those of all files that wait for the same runs of the benchmarks.
    """
    waiting = {item.path for item in items if "quick_run" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "quick_run" if item.path in waiting else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _same_seeds():
    """The same initial weights in every run of the suite."""
    # Not loaded for tests that need none.
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


def _find_cifar10_dir():
    """The folder that holds cifar-10-batches-py; read before any fixture changes the variable."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for folder in (os.environ.get("CIFARFLOW_DATA"), beside):
        if not folder:
            continue
        for candidate in (Path(folder), Path(folder).parent):
            if (candidate / "cifar-10-batches-py" / "data_batch_1").is_file():
                return candidate.resolve()
    return None


_CIFAR10_DIR = _find_cifar10_dir()


@pytest.fixture(scope="session")
def cifar10_dir():
    """The folder that holds the real cifar-10-batches-py."""
    if _CIFAR10_DIR is None:
        pytest.skip("no real CIFAR-10: neither $CIFARFLOW_DATA nor ../shared/data has it")
    return _CIFAR10_DIR


@pytest.fixture(scope="session")
def some_images(tmp_path_factory):
    """2,000 images [N, 32, 32, 3] uint8 and labels int32: real CIFAR-10, else the stand-in set."""
    # Imported here, so that tests without data need not wait for TensorFlow.
    from cifarflow.data.cifar10 import load_cifar10
    from cifarflow.data.standin import load_standin

    cache = tmp_path_factory.mktemp("some_images")
    if _CIFAR10_DIR is None:
        train = load_standin(cache_dir=cache).train
    else:
        train = load_cifar10(_CIFAR10_DIR, verify=False, cache_dir=cache).train
    # Copies, so that the rest of the set can go.
    return train.images[:2000].copy(), train.labels[:2000].copy()


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """A function of a name in `benchmark_suite.COMMANDS`: the run's folder, and how it ended."""
    import benchmark_suite

    with benchmark_suite.quick_runs(tmp_path_factory.mktemp("benchmarks")) as run:
        yield run


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Gives every test empty caches of its own, and no data by the environment."""
    monkeypatch.setenv("CIFARFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("CIFARFLOW_DATA", raising=False)
