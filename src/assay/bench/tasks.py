"""What is trained: model, data, loss, metric and budget; three tasks on real data are built in."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from assay.bench import datasets, models
from assay.bench.recipe import Budget
from assay.bench.spec import Spec, parse_specs
from assay.catalogue import UnknownMethod


@dataclass(frozen=True)
class Task:
    """Something to train, with its measure of success.

    ``model()`` returns a new network, initialised from torch's global generator. The three datasets are map-style
    and yield (input, target). ``loss(output, target)`` is the mean loss of a batch; ``metric(output, target)`` the
    mean of a batch, or, with ``whole_split=True``, is called once with the outputs and targets of the whole split
    (for measures that are no mean, such as the area under the ROC curve). ``direction`` says whether more of it
    (``"max"``) or less (``"min"``) is better. ``classes`` is the number of classes, None if it is no classification.

    >>> from assay.bench.tasks import resolve_task
    >>> resolve_task("digits").metric_name
    'accuracy'
    """

    name: str
    model: Callable[[], nn.Module]
    train: Any
    validation: Any
    test: Any
    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Any]
    metric_name: str = "metric"
    direction: str = "max"
    budget: Budget = field(default_factory=Budget)
    classes: int | None = None
    whole_split: bool = False
    about: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("max", "min"):
            raise ValueError(f"direction = {self.direction!r} is out of range: 'max' or 'min'")
        for split in ("train", "validation", "test"):
            if len(getattr(self, split)) == 0:
                raise ValueError(f"task {self.name!r}: the {split} dataset is empty")


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of the examples whose largest output is at the target."""
    return (output.argmax(-1) == target).float().mean()


def digits(model: str = "cnn") -> Task:
    """Handwritten digits, 8x8 grey pixels: 1,797 real images that come with scikit-learn."""
    factories: dict[str, Callable[[], nn.Module]] = {
        "cnn": functools.partial(models.cnn, 10),
        "mlp": functools.partial(models.mlp, 64, 10),
        "vit": functools.partial(models.ViT, 10),
    }
    _one_of("model", model, factories)
    pixels, labels = datasets.digits()
    train, validation, test = _split(pixels.view(-1, 1, 8, 8), labels, (500, 497, 800))
    about = "8x8 images of handwritten digits, 500 to train on, 497 to select on, 800 to test on"
    loss = nn.CrossEntropyLoss()
    budget = Budget(steps=600 if model == "vit" else 300, batch_size=64)
    name = "digits" if model == "cnn" else f"digits(model={model!r})"
    return Task(
        name, factories[model], train, validation, test, loss, accuracy, "accuracy", "max", budget, 10, about=about
    )


def tabular(dataset: str = "breast_cancer") -> Task:
    """Tables that come with scikit-learn: breast_cancer and wine (classes), diabetes (a number)."""
    import sklearn.datasets

    loaders = {"breast_cancer": 2, "wine": 3, "diabetes": None}
    _one_of("dataset", dataset, loaders)
    classes = loaders[dataset]
    table, target = getattr(sklearn.datasets, f"load_{dataset}")(return_X_y=True)
    inputs, targets = torch.tensor(table, dtype=torch.float32), torch.tensor(target)
    if classes is None:
        targets = targets.float()[:, None]
    sizes = (len(inputs) // 2, len(inputs) // 4, len(inputs) - len(inputs) // 2 - len(inputs) // 4)
    splits = _split(inputs, targets, sizes)
    # Scaled by the training split alone: the other two must not leak into it.
    mean, std = splits[0].tensors[0].mean(0), splits[0].tensors[0].std(0).clamp(min=1e-6)
    y_mean, y_std = (splits[0].tensors[1].mean(), splits[0].tensors[1].std()) if classes is None else (0, 1)
    train, validation, test = (
        TensorDataset((x - mean) / std, (y - y_mean) / y_std if classes is None else y)
        for x, y in (split.tensors for split in splits)
    )
    factory = functools.partial(models.mlp, inputs.shape[1], classes or 1)
    budget = Budget(steps=200, batch_size=32)
    name = "tabular" if dataset == "breast_cancer" else f"tabular(dataset={dataset!r})"
    about = f"{dataset}: {sizes[0]} rows to train on, {sizes[1]} to select on, {sizes[2]} to test on"
    if classes is None:
        about += "; squared error in units of the target's variance"
        return Task(
            name, factory, train, validation, test, F.mse_loss, F.mse_loss, "squared error", "min", budget, about=about
        )
    loss = nn.CrossEntropyLoss()
    return Task(name, factory, train, validation, test, loss, accuracy, "accuracy", "max", budget, classes, about=about)


def text(length: int = 64) -> Task:
    """A language model over bytes, on the source text of the running Python's standard library."""
    if not isinstance(length, int) or not 8 <= length <= 1024:
        raise ValueError(f"length = {length!r} is out of range: an integer from 8 to 1024")
    files = _library_files()
    # Whole files go to a split, so that no function stands in two of them.
    train, validation, test = (
        _windows(b"".join(path.read_bytes() for path in chosen), length, limit)
        for chosen, limit in ((files[2:], 24_576), (files[0:1], 512), (files[1:2], 512))
    )
    about = f"bytes of {len(files)} files of Python's standard library, in windows of {length}"
    return Task(
        "text" if length == 64 else f"text(length={length})",
        functools.partial(models.ByteTransformer, length),
        train,
        validation,
        test,
        byte_loss,
        bits_per_byte,
        "bits per byte",
        "min",
        Budget(steps=300, batch_size=16),
        about=about,
    )


def byte_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all positions, in nats."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def bits_per_byte(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all positions, in bits."""
    return byte_loss(output, target) / 0.6931471805599453


_LIBRARY = (
    "argparse.py ast.py bdb.py calendar.py cmd.py code.py codecs.py configparser.py contextlib.py copy.py "
    "csv.py dataclasses.py datetime.py decimal.py difflib.py dis.py doctest.py enum.py fractions.py ftplib.py "
    "functools.py gettext.py glob.py heapq.py imaplib.py inspect.py ipaddress.py locale.py mailbox.py"
)


def _library_files() -> list[Path]:
    """Modules of the standard library, in a fixed order; the first is for validation, the second for the test."""
    folder = Path(functools.__file__).parent
    held_out = [folder / "argparse.py", folder / "inspect.py"]
    training = [folder / name for name in _LIBRARY.split() if folder / name not in held_out]
    return held_out + [path for path in training if path.exists()]


def _windows(source: bytes, length: int, limit: int) -> TensorDataset:
    """At most ``limit`` windows of ``length + 1`` bytes, one after the other, as (bytes, next bytes)."""
    data = torch.frombuffer(bytearray(source), dtype=torch.uint8)
    count = min(limit, (len(data) - 1) // length)
    starts = torch.arange(count)[:, None] * length + torch.arange(length + 1)
    windows = data[starts].long()
    return TensorDataset(windows[:, :-1], windows[:, 1:])


def _split(inputs: Tensor, targets: Tensor, sizes: tuple[int, ...]) -> list[TensorDataset]:
    """Shuffle once, by a fixed seed, and cut; every run of every method sees the same splits."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(inputs[part], targets[part]) for part in order.split(list(sizes))]


def _one_of(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is out of range: one of {', '.join(allowed)}")


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "tabular": tabular, "text": text}


@functools.lru_cache(maxsize=8)
def resolve_task(name: str) -> Task:
    """The task that a user's word means: ``digits``, ``digits(model='vit')``, or ``my_task.py:task``.

    In a file the name after the colon is a :class:`Task` or a function without arguments that returns one.
    """
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _task_from_file(Path(path), attribute)
    (spec,) = _single(name)
    if spec.name not in TASKS:
        raise UnknownMethod(spec.name, list(TASKS), "task (or FILE.py:NAME)")
    try:
        return TASKS[spec.name](**spec.options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error


def _single(name: str) -> tuple[Spec]:
    arms = parse_specs(name)
    if len(arms) != 1 or len(arms[0]) != 1:
        raise ValueError(f"one task is wanted, not {name!r}")
    return (arms[0][0],)


def _task_from_file(path: Path, attribute: str) -> Task:
    if not path.is_file():
        raise ValueError(f"no task file {str(path)!r}")
    module_name = f"assay_task_{path.stem}"
    specification = importlib.util.spec_from_file_location(module_name, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.resolve().parent))  # so that the file may import its neighbours, as a script may
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the task file {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, attribute):
        raise ValueError(f"the task file {str(path)!r} has no {attribute!r}")
    found = getattr(module, attribute)
    task = found if isinstance(found, Task) else found() if callable(found) else found
    if not isinstance(task, Task):
        raise ValueError(f"{str(path)!r}: {attribute} is a {type(task).__name__}, not an assay.Task")
    return task
