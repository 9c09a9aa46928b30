"""The command line of a training script. torch is imported only once all options are known to be there, so that --help
and a mistyped option are answered at once."""

import functools
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from transformers.hf_argparser import HfArgumentParser

from bert_finetune.arguments import RunOptions
from bert_finetune.errors import InputError
from bert_finetune.trainer_options import trainer_options


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """`--help` with the defaults, those of `found` (name -> where it comes from) in words; None says nothing."""

    def __init__(self, *args, found: dict[str, str], **kwargs):
        super().__init__(*args, **kwargs)
        self._found = found

    def _get_help_string(self, action: Action) -> str | None:
        if action.dest in self._found:
            return f"{action.help} (default: {self._found[action.dest]})"
        return action.help if action.default is None else super()._get_help_string(action)


class _ArgumentParser(HfArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see --help")

    def dataclasses(self, argv: list[str]) -> tuple:
        """The dataclasses, filled from `argv`."""
        *arguments, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(arguments)


def plain_parser(*dataclasses: type, description: str, hidden: tuple[str, ...] = ()) -> _ArgumentParser:
    """The options of a script that does not train: those of some dataclasses; --help is silent of the `hidden` ones."""
    parser = _ArgumentParser(
        list(dataclasses),
        description=description,
        usage="%(prog)s [options]",
        allow_abbrev=False,
        formatter_class=functools.partial(_HelpFormatter, found={}),
    )
    for action in parser._actions:
        if action.dest in hidden:
            action.help = SUPPRESS
    return parser


class Parser:
    """The options of a training script: some dataclasses of its own, `RunOptions`, and the rest of
    `TrainingArguments`.

    Complaints are `InputError`s: one line, exit code 2. Options must be written out: a prefix that happens to fit is an
    error. `found`: in words, for `--help`, the defaults that the script finds only once it knows other options.
    """

    def __init__(self, *dataclasses: type, description: str, found: dict[str, str] | None = None):
        self._dataclasses = dataclasses
        self._settings = {
            "description": description,
            "usage": "%(prog)s [options]",
            "allow_abbrev": False,
            "formatter_class": functools.partial(_HelpFormatter, found=found or {}),
        }
        self._defaults = {}

    def look(self, argv: list[str] | None) -> tuple:
        """The script's dataclasses and `RunOptions`, filled from `argv` (None: from the command line), before anything
        heavy is imported. Answers --help; raises InputError for options that are not there."""
        argv = sys.argv[1:] if argv is None else argv
        # The values of the Trainer's other options are looked at later.
        return self.light.dataclasses(argv)[: len(self._dataclasses) + 1]

    def set_defaults(self, **defaults) -> None:
        """Other defaults for what `parse` will read."""
        self._defaults |= defaults

    def parse(self, argv: list[str] | None) -> tuple:
        """The script's dataclasses and `RunArguments`, filled from `argv` (None: from the command line)."""
        self.look(argv)
        parser = self.full()
        parser.set_defaults(**self._defaults)
        return parser.dataclasses(sys.argv[1:] if argv is None else argv)

    def full(self) -> _ArgumentParser:
        """The argparse parser of all options."""
        from bert_finetune.option_rules import OPTIMIZERS
        from bert_finetune.run_arguments import RunArguments

        parser = _ArgumentParser([*self._dataclasses, RunArguments], **self._settings)
        (optim,) = (action for action in parser._actions if action.dest == "optim")
        optim.choices = list(OPTIMIZERS)  # transformers names many more, which are refused
        return parser

    @functools.cached_property
    def light(self) -> _ArgumentParser:
        """The argparse parser of all options that imports no torch; of the Trainer's other options it knows the names,
        and which values are numbers."""
        parser = _ArgumentParser([*self._dataclasses, RunOptions], **self._settings)
        known = {action.dest for action in parser._actions}
        for option in trainer_options():
            if option.name in known:
                continue
            spellings = [f"--{option.name}", f"--{option.name.replace('_', '-')}"]
            number = {"type": option.type} if option.type else {"nargs": "*"}
            told = option.help.replace("%", "%%") + f" (default: {option.default})" * (option.default != "None")
            parser.add_argument(*dict.fromkeys(spellings), help=told, **number)
            if option.switch:
                off = [f"--no_{option.name}", f"--no-{option.name.replace('_', '-')}"]
                parser.add_argument(*off, action="store_false", dest=option.name, help=SUPPRESS)
        return parser
