"""What train.py and sample.py share as programs: text arguments taken literally, errors in one line."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from charlm.console import printable
from charlm.errors import InputError, RunStopped, first_line, install, nearest
from charlm.pool import follow_pool

BAD_INPUT, STOPPED = 2, 1  # exit codes
# Optional groups, null in conf/train.yaml's defaults. Hydra refuses the + that many type before them; it is dropped.
_OPTIONAL_GROUPS = ("+experiment=", "+sweep=")
_LISTS = ("data.path",)  # texts that may be several
_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "output", "prompt_file", "runs")  # ~ is expanded where others are read
_GROUPS = ("data", "model", "optimizer", "trainer", "logger")  # of which there is always one choice
_COMMANDS = ("-m", "--run", "-r", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")  # Hydra does one of them
_PLUGINS = {  # what Hydra's plugins bring, and the extra that installs each
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}
_UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def run(main: Callable[[], object], text_keys: Sequence[str]) -> None:
    """Run a Hydra application; `text_keys` are the settings whose values are text, such as a prompt.

    Bad input ends with one line on standard error and exit code 2, and what stops a run under way, such as a full
    disk, with one line and exit code 1. Everything else that fails is a fault of the program's, and keeps its
    traceback.
    """
    # The first to be registered is the last to be called: behind it Python would look through half a million objects
    # for cycles, with a second or two between a program's end and that of its process.
    atexit.register(gc.freeze)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of few characters costs these, not the text
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a full disk costs the log file, not a traceback for each line of it
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # have Hydra raise its errors, for us to put them in one line
    multirun = "-m" in sys.argv or "--multirun" in sys.argv
    if multirun:  # in front, for Hydra reads no settings behind a flag that itself stands behind some
        sys.argv[1:] = ["-m", *(argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun"))]
    _list_groups_where_asked()
    follow_pool()
    if multirun:  # processes of a cluster's launcher find charlm where this program does
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    sys.argv[1:] = [_literal(argument, text_keys, multirun) for argument in sys.argv[1:]]
    try:
        _refuse_unused(sys.argv[1:], multirun)
        if "hydra.run.dir" in text_keys and not multirun:
            sys.argv += _folder_of_all_ranks(sys.argv[1:])
        main()
    except (InputError, RunStopped, HydraException, OmegaConfBaseException) as error:
        refuse(error)
    except KeyboardInterrupt:  # before or behind the training, which has its own way with signals
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.filename is None or not (error.errno in _UNWRITABLE or _made_nowhere(error)):
            raise
        refuse(InputError(f"cannot write {error.filename}: {error.strerror}; choose another folder"))


class _Lazy:
    """Text that is made when it is asked for."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make

    def __str__(self) -> str:
        return self._make()


def _list_groups_where_asked() -> None:
    """Have Hydra look for all that can be chosen only where a help text names it, as `--hydra-help` does. Our own does
    not, and two thirds of its time went into that.
    """
    listed = Hydra.format_config_groups

    def lazily(self: Hydra, predicate: Callable[[str], bool], compact: bool = True) -> Any:
        return _Lazy(lambda: str(listed(self, predicate, compact)))

    Hydra.format_config_groups = lazily  # type: ignore[method-assign]


def _made_nowhere(error: OSError) -> bool:
    """Whether what is missing is so since its folder takes nothing new, which /proc reports in these words."""
    folder = Path(error.filename).parent
    if error.errno != errno.ENOENT or not folder.is_dir():
        return False
    try:
        with TemporaryFile(dir=folder):
            return False
    except OSError:
        return True


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of large libraries: they make half a million objects that stay, and Python would look through
    them for cycles again and again, a fifth of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def refuse(error: Exception) -> NoReturn:
    """Print what is wrong in one line, and exit with code 2, or 1 where it came up under way."""
    print(f"{os.path.basename(sys.argv[0])}: error: {_one_line(error)}", file=sys.stderr)
    raise SystemExit(STOPPED if isinstance(error, RunStopped) else BAD_INPUT)


@contextmanager
def job() -> Iterator[Path]:
    """Around a job that Hydra runs; gives its folder.

    Bad input takes back the empty folder that Hydra made, as Ctrl-C does before work begins, and ends the program; in a
    sweep it is raised, so that the other jobs go on.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        yield folder
    except (InputError, KeyboardInterrupt) as error:
        if folder != Path.cwd():
            with suppress(OSError):  # raised where a folder holds something
                folder.rmdir()
                folder.parent.rmdir()
        if isinstance(error, KeyboardInterrupt) or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        refuse(error)
    except RunStopped as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        refuse(error)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still has to write
        raise SystemExit(128 + signal.SIGPIPE) from None


def command(folder: Path) -> list[str]:
    """Return the program and its arguments that do again what this process does in a run's folder.

    A job that shares the process of a sweep, or that a cluster's worker runs, is told by its own settings.
    """
    if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
        return [Path(sys.argv[0]).name, *sys.argv[1:]]
    hydra = HydraConfig.get()
    return [f"{hydra.job.name}.py", *without_sweep(hydra.overrides.task), f"hydra.run.dir={quoted(str(folder))}"]


def without_sweep(overrides: Iterable[str]) -> list[str]:
    """Return a job's overrides but the choice of a sweep: they are those of its training alone."""
    return [override for override in overrides if override.lstrip("+").partition("=")[0] != "sweep"]


def _refuse_unused(arguments: Sequence[str], multirun: bool) -> None:
    """Refuse what Hydra would take and do nothing with, or not what is meant, or has no words for.

    Raises:
        InputError: a sweep without `-m`, a run's folder without a name, which would be the current folder, a change
            into it, a group of which nothing is chosen, or flags of Hydra's that do not go together.
    """
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    known = list(get_args_parser()._option_string_actions)
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag.startswith("--") and not any(name.startswith(flag) for name in known):
            setting = f"{flag.lstrip('-').replace('-', '_')}={value or 'VALUE'}"
            raise InputError(f"there is no {flag}; settings are written name=value, as in {setting}, see --help")
    commands = [flag for flag in flags if flag in _COMMANDS]
    if len(commands) > 1:
        raise InputError(f"{' and '.join(commands)} do not go together; give one of them")
    if "--resolve" in flags and not {"--cfg", "-c", "--help", "-h"}.intersection(flags):
        raise InputError("--resolve goes with --cfg, as in --cfg job --resolve")
    sweeping = multirun or "hydra.mode=MULTIRUN" in arguments
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "sweep" and value not in ("", "null") and not sweeping:
            raise InputError(f"{argument} is a sweep, which takes -m: python train.py -m {argument}")
        slurm = argument in ("hydra/launcher=slurm", "hydra/launcher=submitit_slurm")
        if slurm and find_spec("submitit") and not shutil.which("srun"):
            raise InputError(
                f"{argument} needs SLURM's srun, which is not here; hydra/launcher=pool sweeps on this machine"
            )
        if key in _GROUPS and value == "null":
            raise InputError(f"{argument} names none of conf/{key}/; choose one, as --help lists them")
        if key.lstrip("+") == "hydra.job.chdir" and value.lower() not in ("", "false", "null"):
            raise InputError(
                f"{argument} would look for relative paths in the run's folder; leave it out: what a run keeps is there"
            )
        if key in ("hydra.run.dir", "hydra.sweep.dir") and value in ("", "''", '""'):
            raise InputError(f"{argument} names no folder; leave it out, or name one, as in {key}=runs/NAME")


def _folder_of_all_ranks(arguments: Sequence[str]) -> list[str]:
    """Return what names the run's folder where several processes were started from outside: each by itself would choose
    another, by the time and at random.

    Under SLURM the job's number does, which a job that is queued again keeps, so that it goes on.

    Raises:
        InputError: torchrun started them, and no folder is named.
    """
    if any(argument.startswith(("hydra.run.dir=", "--")) for argument in arguments):
        return []
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "torchrun starts each process by itself, so name the run's folder, the same for all, with "
            "hydra.run.dir=runs/NAME"
        )
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return [f"hydra.run.dir=runs/slurm-{job}-{step}"]
    return []


def _literal(argument: str, text_keys: Sequence[str], multirun: bool) -> str:
    """Quote a text argument for Hydra, whose grammar would otherwise trim spaces and choke on `=`, `,` or `(`.

    What is quoted already, a list of files, and in a multirun what has a comma (alternatives to sweep) stays as it is.
    """
    if argument.startswith(_OPTIONAL_GROUPS):
        return argument[1:]
    key, equals, value = argument.partition("=")
    if not equals or key not in text_keys or value in ("", "null") or (multirun and "," in value):
        return argument
    if (value[0] in "'\"" and _is_quoted(argument)) or (value[0] == "[" and key in _LISTS):
        return argument
    if key in _PATHS:
        value = os.path.expanduser(value)  # a shell leaves the ~ of name=~/folder to the program
    literal = not key.startswith("hydra.")  # folders, which Hydra's users make of ${now:%H-%M} and such
    return f"{key}={quoted(value, literal)}"


def quoted(text: str, literal: bool = True) -> str:
    """Return a value as Hydra reads it back, whatever is in it; where it is not literal, `${}` keeps its meaning."""
    if literal:  # a backslash makes one of what follows, another one none of it
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text=text, quote=Quote.double).with_quotes()


def _is_quoted(argument: str) -> bool:
    try:
        return isinstance(OverridesParser.create().parse_override(argument)._value, QuotedString)
    except HydraException:
        return False


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    match cause:
        case MissingConfigException() if cause.missing_cfg_file in _PLUGINS:
            extra = _PLUGINS[cause.missing_cfg_file]
            command = install(extra) if extra != "ray" else "make setup-ray"  # which needs older versions of others
            text = f"{extra} is not installed; `{command}` does that"
        case MissingConfigException() if cause.missing_cfg_file:
            options = [option for option in cause.options or () if not option.endswith("_schema")]
            choices = f"; choose from {', '.join(options)}" if options else ""
            text = f"there is no {cause.missing_cfg_file} in conf/{choices}"
        case OverrideParseException() if "=" not in cause.override:
            text = f"{cause.override!r} is not of the form name=value"
        case OverrideParseException():
            text = f"cannot read {cause.override!r}: {first_line(cause)}; quote the value, as in 'key=\"a b\"'"
        case ConfigCompositionException() if str(cause).startswith("Ambiguous value for argument"):
            argument = str(cause).split("'")[1]
            key, _, value = argument.partition("=")
            text = f"{argument} gives several values: add -m to try each, or write {key}=[{value}] for a list"
        case ConfigAttributeError() | ConfigKeyError() if cause.full_key:
            text = f"there is no setting {cause.full_key}{_nearest(cause)}"
        case ValidationError() if cause.full_key and "is not a ListConfig" in str(cause):
            text = f"{cause.full_key} is a list: write it in brackets, as in '{cause.full_key}=[a,b]'"
        case OmegaConfBaseException() if cause.full_key:
            text = f"{cause.full_key}: {first_line(cause)}"
        case _:
            text = str(cause)
    return printable(" ".join(text.split()))


def _nearest(error: OmegaConfBaseException) -> str:
    """Name the setting that was probably meant."""
    if error.full_key == "data.path":
        return " with data=python_docs; choose another source with it: data=text, csv, jsonl, ..."
    parent = error.parent_node
    names = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
    near = nearest(str(error.key), names)
    prefix = str(error.full_key).rpartition(".")[0]
    return f"; did you mean {prefix + '.' if prefix else ''}{near}?" if near else "; see --help for what there is"
