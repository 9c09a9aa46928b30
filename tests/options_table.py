"""The table of `TrainingArguments`' options in docs/options.md, made of the code's own rules.

python tests/options_table.py            # writes it anew
python tests/options_table.py --check    # says whether it is what the code gives; exit code 1 where not
"""

import dataclasses
import sys
from enum import Enum
from pathlib import Path

from transformers import TrainingArguments

from bert_finetune.option_rules import RULES, default_of, is_refused
from bert_finetune.run_arguments import RunArguments
from bert_finetune.trainer_options import trainer_options

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
BEGIN, END = "<!-- written by tests/options_table.py -->\n", "<!-- end of what is written -->\n"


def table() -> str:
    """A row for each option, in transformers' order."""
    fields = {field.name: field for field in dataclasses.fields(RunArguments)}
    theirs = {field.name: default_of(field) for field in dataclasses.fields(TrainingArguments)}
    rows = ["| option | default | |", "|---|---|---|"]
    for option in trainer_options():
        default = default_of(fields[option.name])
        shown = f"`{default.value if isinstance(default, Enum) else default}`" if default not in (None, "", []) else ""
        if default != theirs[option.name]:
            shown = f"{shown or 'by other options'}, set here"
        rules = RULES.get(option.name, ())
        word = "**refused**" if is_refused(option.name) else "works"
        told = f"{word}: " + "; ".join(rule.says for rule in rules) if rules else word
        rows.append(f"| `--{option.name}` | {shown} | {told} |")
    return "\n".join(rows) + "\n"


def page_with_table(page: str) -> str:
    """The page with its table as the code gives it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with_table(page)
    if sys.argv[1:] == ["--check"]:
        print("as the code gives it" if page == wanted else "not what the code gives: python tests/options_table.py")
        sys.exit(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
