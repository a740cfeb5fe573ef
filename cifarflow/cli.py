"""What the command-line runners share: flags from `Recipe`'s fields, and clear endings.

    cli.define_recipe_flags("lab_cnn")
    cli.define_run_flags()

    def main() -> None:
        run = train_recipe(cli.recipe_from_flags(), **cli.run_options_from_flags())

    if __name__ == "__main__":
        cli.run(main)

A field of `Recipe` is written once, in `Recipe`: its flag's name, type, choices and help come from
there.  Input that cannot work ends in one line on stderr and exit status 2; Ctrl-C, once the state
is saved, in status 130 and the command that goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.abc
import inspect
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import app, flags

from cifarflow.device import prepare_gpus
from cifarflow.errors import ON_NONFINITE, CifarflowError, ConfigError, check_float
from cifarflow.recipes.named import RECIPES, get_recipe
from cifarflow.recipes.options import parse_options
from cifarflow.recipes.recipe import Recipe
from cifarflow.reporting.progress import Progress
from cifarflow.training.cluster import STRATEGIES, read_cluster
from cifarflow.training.signals import TrainingInterrupted
from cifarflow.untrusted import one_line

if TYPE_CHECKING:
    from cifarflow.data.splits import Dataset
    from cifarflow.training.loop import Run

EXIT_BAD_INPUT = 2
# What has come: SIGTERM, which a KeyboardInterrupt does not tell.
_terminated: list[int] = []


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Holds back what TensorFlow's libraries write to stderr, whatever the log level.

    If something fails that is not the input's fault it is shown.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except (CifarflowError, KeyboardInterrupt):
            raise
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Keeps the libraries quiet while they load, before any log level can be set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with quiet_stderr():
            yield
    except KeyboardInterrupt:
        # TensorFlow takes seconds to load, long enough to change one's mind.
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + _signal_number())


class _QuietLoader(importlib.abc.Loader):
    """Loads TensorFlow as its own loader does, but quietly."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        with _quiet_import():
            self._loader.exec_module(module)
            # The first look at the devices writes as well.
            module.config.list_physical_devices()
        prepare_gpus()


class _QuietFinder(importlib.abc.MetaPathFinder):
    """Finds TensorFlow, for whoever imports it first, with a loader that is quiet.

    It is not loaded before it is needed: neither `--help` nor a bad flag waits for it.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name == "tensorflow" else None
        if spec is not None and spec.loader is not None:
            spec.loader = _QuietLoader(spec.loader)
        return spec


sys.meta_path.insert(0, _QuietFinder())

# Flags belong to the script that asks for them, so that its `--help` shows them.
flags.disclaim_key_flags()
FLAGS = flags.FLAGS


def recipe_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `Recipe` that have a flag: all but its name."""
    return [field for field in dataclasses.fields(Recipe) if field.name != "name"]


def define_recipe_flags(default: str | None) -> None:
    """Defines --recipe and a flag a field of `Recipe`.

    Args:
      default: the recipe taken when --recipe is not given; None defines no --recipe, for a runner
        that runs several.
    """
    if default is not None:
        flags.DEFINE_enum("recipe", default, sorted(RECIPES), "the named recipe to start from")
    for field in recipe_fields():
        text = field.metadata["help"]
        # A flag that is not given stays None and leaves the recipe's own value alone.
        if field.metadata["choices"]:
            flags.DEFINE_enum(field.name, None, field.metadata["choices"], text)
        elif isinstance(field.default, bool):
            flags.DEFINE_boolean(field.name, None, text)
        elif isinstance(field.default, int):
            flags.DEFINE_integer(field.name, None, text)
        elif isinstance(field.default, float):
            flags.DEFINE_float(field.name, None, text)
        else:
            flags.DEFINE_string(field.name, None, text)


def recipe_changes() -> dict[str, Any]:
    """The fields of `Recipe` that were given as flags, and their values.

    Raises:
      ConfigError: if one that holds several values cannot be read.
    """
    changes = {}
    for field in recipe_fields():
        value = FLAGS[field.name].value
        if value is None:
            continue
        if field.name in ("model_options", "learning_rate_scales", "freeze"):
            value = parse_options(value, flag=field.name)
        elif field.name == "drop_epochs":
            value = _parse_numbers(field.name, value)
        changes[field.name] = value
    return changes


def recipe_from_flags() -> Recipe:
    """The recipe that the command line asks for.

    Raises:
      ConfigError: if a value is out of range.
    """
    return get_recipe(FLAGS.recipe, **recipe_changes())


def define_run_flags(*, workdir_help: str = "") -> None:
    """Defines the flags of a run that are not part of its recipe."""
    flags.DEFINE_string(
        "data_dir", None, "where the data is, a file or folder (default: search, see README)"
    )
    flags.DEFINE_string(
        "workdir",
        None,
        workdir_help or "the run's folder (default: a new one, runs/RECIPE-DATE-TIME-PID)",
    )
    flags.DEFINE_boolean("resume", False, "go on with the run in --workdir; starts it if none")
    flags.DEFINE_enum(
        "on_nonfinite",
        "stop",
        ON_NONFINITE,
        "what a step is whose loss or gradients are not finite: the end of the run, or left out; "
        "the workdir's folder capsules keeps such steps",
    )
    define_check_flag()
    flags.DEFINE_boolean(
        "tensorboard", False, "write scalars and images for TensorBoard into the workdir"
    )
    flags.DEFINE_boolean(
        "profile",
        False,
        "profile some steps before training: print what bounds them, write a trace into the "
        "workdir's folder profile",
    )
    flags.DEFINE_enum(
        "strategy",
        "none",
        STRATEGIES,
        "who trains: one device; mirrored: all GPUs of this machine; multiworker: the processes "
        "that TF_CONFIG names, of which the first has the workdir",
    )
    flags.DEFINE_float(
        "worker_timeout_seconds",
        60.0,
        "for --strategy=multiworker: how long to wait for the other workers at the start",
    )
    flags.DEFINE_boolean("plots", True, "draw the pictures")
    flags.DEFINE_boolean("progress", True, "show progress on stderr")


def define_check_flag() -> None:
    """Defines --check."""
    flags.DEFINE_boolean("check", False, "before training, check what two tiny steps do")


def refuse_several_workers(runner: str) -> None:
    """For a runner of several runs in one process, of which a team trains but one.

    Args:
      runner: such as "examples/lab.py".

    Raises:
      ConfigError: if --strategy=multiworker was given.
    """
    if FLAGS.strategy == "multiworker":
        raise ConfigError(
            f"--strategy must be none or mirrored for {runner}, which has several runs in one "
            "process, not multiworker: run examples/train.py, a recipe at a time"
        )


def run_options_from_flags(name: str) -> dict[str, Any]:
    """The options of `train_recipe` that the command line asks for.

    Args:
      name: what a new workdir is named after.

    Raises:
      ConfigError: if two flags do not fit together.
    """
    if FLAGS.resume and not FLAGS.workdir:
        raise ConfigError("--resume needs --workdir: the folder of the run to go on with")
    check_float("--worker_timeout_seconds", FLAGS.worker_timeout_seconds, above_minimum=True)
    if FLAGS.strategy == "multiworker":
        read_cluster(os.environ.get("TF_CONFIG"))
    if FLAGS.strategy != "none" and FLAGS.profile:
        raise ConfigError(f"--profile needs --strategy=none, not {FLAGS.strategy}")
    for flag in ("workdir", "data_dir"):
        path = FLAGS[flag].value
        if path is not None and not path.strip():
            raise ConfigError(f"--{flag} must be a path, not {path!r}")
    if FLAGS.workdir is None:
        # Kept in the flag, so that the command to go on can name it.
        FLAGS["workdir"].value = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return {
        "workdir": FLAGS.workdir,
        "resume": FLAGS.resume,
        "data_dir": FLAGS.data_dir,
        "on_nonfinite": FLAGS.on_nonfinite,
        "check": FLAGS.check,
        "tensorboard": FLAGS.tensorboard,
        "profile": print if FLAGS.profile else None,
        "progress": Progress if FLAGS.progress else None,
        "strategy": FLAGS.strategy,
        "worker_timeout_seconds": FLAGS.worker_timeout_seconds,
    }


def _parse_numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} must be numbers joined by commas, not {text!r}") from None


def run(main: Callable[..., int | None], *, argv: list[str] | None = None) -> None:
    """Parses the flags, runs `main`, and ends the process.

    A `main` that has a parameter is given the list of the words that are no flags; to any other
    runner such a word is an error.

    Exit status: 0 when done or what `main` returns, 2 when the input cannot work (one line on
    stderr), 130 when interrupted by Ctrl-C and 143 by SIGTERM, with the state saved.  Any other
    exception is a bug and keeps its traceback.

    Args:
      main: what to run.
      argv: the program's name and what it was given; None takes the process's own.
    """
    takes_words = bool(inspect.signature(main).parameters)

    def terminate(number: int, frame: object) -> None:
        _terminated.append(number)
        raise KeyboardInterrupt

    def guarded(argv: Sequence[str]) -> int:
        # Where training does not note it: while data is read, say, or the test set.
        kept = signal.signal(signal.SIGTERM, terminate)
        try:
            if takes_words:
                return main(list(argv[1:])) or 0
            if len(argv) > 1:
                raise ConfigError(
                    f"unexpected argument {argv[1]!r}: options are written --name=value"
                )
            return main() or 0
        except CifarflowError as error:
            return complain(str(error))
        except TrainingInterrupted as error:
            can_resume = error.checkpoint is not None
            return _interrupted(str(error), signal_number=error.signal, can_resume=can_resume)
        except KeyboardInterrupt:
            # A run that has made its folder goes on from its newest checkpoint, or its start.
            workdir = FLAGS["workdir"].value if "workdir" in FLAGS else None
            begun = workdir is not None and _has_begun(workdir)
            return _interrupted("interrupted", signal_number=_signal_number(), can_resume=begun)
        finally:
            _terminated.clear()
            signal.signal(signal.SIGTERM, kept)

    # Flags may then stand behind words.
    FLAGS.set_gnu_getopt(takes_words)
    app.run(guarded, argv=argv, flags_parser=_parse_flags)


def _signal_number() -> int:
    """Of the signal that has interrupted this process."""
    return signal.SIGTERM if _terminated else signal.SIGINT


def help_text(usage: str, about: str, define_flags: Callable[[], None]) -> str:
    """What `--help` of a command prints, as wide as the terminal is.

    Args:
      usage: how it is called.
      about: the docstring of its module.
      define_flags: defines its flags.
    """
    before = set(FLAGS)
    define_flags()
    width = max(min(shutil.get_terminal_size().columns, 100), 40)
    texts = {}
    for name in FLAGS:
        flag = FLAGS[name]
        if name in before:
            continue
        choices = getattr(flag.parser, "enum_values", ())
        # absl puts the choices before the text, in one long word that no line is broken at.
        text = flag.help.removeprefix(f"<{'|'.join(choices)}>: ")
        if choices:
            text = f"{text}; one of {', '.join(choices)}"
        if flag.default not in (None, "", False):
            text = f"{text} (default: {'on' if flag.boolean else flag.default})"
        texts[f"[no]{name}" if flag.boolean else name] = text
    lines = [f"usage: {usage}", "", about.strip(), *(["", "flags:"] if texts else [])]
    column = max(map(len, texts), default=0) + 6
    for shown, text in texts.items():
        first = f"  --{shown}".ljust(column)
        indent = " " * column
        wrapped = textwrap.fill(
            text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
        )
        lines.append(wrapped)
    return "\n".join(lines)


def _has_begun(workdir: str) -> bool:
    """Whether there is a run in a folder, or one below it, to go on with."""
    return any(pathlib.Path(os.path.expanduser(workdir)).rglob("recipe.json"))


def _interrupted(message: str, *, signal_number: int, can_resume: bool) -> int:
    print(f"\n{message}", file=sys.stderr)
    if can_resume:
        print(f"to go on: {resume_command()}", file=sys.stderr)
    return 128 + signal_number


def print_summary(run: Run) -> None:
    """Prints in a few lines what came of a run, and where its files are, if they are here."""
    # Read from a file if the run was over already.
    summary: dict[str, Any] = {
        key: one_line(value) if isinstance(value, str) else value
        for key, value in run.summary.items()
    }
    print(
        f"{summary['recipe']} on {summary['dataset']}: test accuracy "
        f"{summary['test_accuracy']:.4f}, test loss {summary['test_loss']:.4f} after "
        f"{summary['epochs']:g} epochs, on {summary['examples']['test']:,} test images"
    )
    # A run of a single compiled call has none: that call compiles.
    rate = summary["images_per_second"]
    speed = f" at {rate:,.0f} images/s" if rate else ", too short to tell a speed,"
    print(
        f"{summary['train_seconds']:.1f} s of training{speed} in {summary['precision']} on "
        f"{summary['device']}"
    )
    if summary.get("skipped_steps"):
        print(f"{summary['skipped_steps']} of {summary['steps']} steps were skipped: not finite")
    # Of several workers the chief alone has any.
    files = f", all files in {run.workdir}" if run.workdir is not None else ""
    print(f"weights {summary['weights_sha256'][:16]}{files}")


def draw_and_print(run: Run, dataset: Dataset) -> None:
    """Draws a run's pictures into its workdir, if it has one, and prints where they are."""
    if run.workdir is None:
        return
    # Plotting is loaded here: whoever says --noplots does not wait for it.
    from cifarflow.reporting.pictures import draw_run

    paths = draw_run(run, dataset, run.workdir / "plots")
    print(f"pictures: {', '.join(path.name for path in paths.values())} in {run.workdir / 'plots'}")


def resume_command() -> str:
    """The command that goes on with an interrupted run: this one, with its workdir and --resume."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--resume=true")]
    if not FLAGS["workdir"].present:
        words.append(f"--workdir={FLAGS.workdir}")
    return shlex.join([*program(), *words, "--resume"])


def program() -> list[str]:
    """The words by which this process's program is started again."""
    python, path = pathlib.Path(sys.executable).name or "python", pathlib.Path(sys.argv[0])
    if path.name == "__main__.py":
        return [python, "-m", path.parent.name]
    if path.suffix == ".py":
        return [python, sys.argv[0]]
    # The console script, by its name where the shell would find it by that.
    found = shutil.which(path.name)
    is_found = found is not None and pathlib.Path(found).resolve() == path.resolve()
    return [path.name if is_found else sys.argv[0]]


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return list(FLAGS(argv))
    # Some of absl's own flags, and --noflag=value, raise the other.
    except (flags.Error, ValueError) as error:
        sys.exit(complain(str(error)))
    except SystemExit:
        # absl ends --help with status 1, as if something had gone wrong.
        sys.exit(0)


def complain(message: str) -> int:
    """Says in one line on stderr what cannot work; returns the exit status for that."""
    # What was given, or stands in a file, may be endless, or something that a terminal obeys.
    print(f"error: {one_line(message, length=1000)}", file=sys.stderr)
    return EXIT_BAD_INPUT
