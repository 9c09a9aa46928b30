"""transformers' `TrainingArguments` with this project's defaults."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from bert_finetune.arguments import RunOptions
from bert_finetune.errors import InputError
from bert_finetune.option_rules import check_optimizer, check_options


@dataclass
class RunArguments(RunOptions, TrainingArguments):
    """All options of a training run: those of `RunOptions`, and the rest of `TrainingArguments`. Raises InputError for
    values that cannot be used."""

    def __post_init__(self):
        check_options(self)
        stepwise = self.evaluate_during_training or self.eval_steps or self.save_steps
        default = "steps" if stepwise else "epoch"
        # Left out, each of the two follows the other, so that every evaluation has its checkpoint.
        if self.eval_strategy is None:
            self.eval_strategy = self.save_strategy if self.save_strategy in ("steps", "epoch") else default
        if self.save_strategy is None:
            self.save_strategy = default if self.eval_strategy == "no" else self.eval_strategy
        self.eval_steps = self.save_steps = self.eval_steps or self.save_steps or 500
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = torch.cuda.is_available()
        # Without it, TrainingArguments refuses --bf16 where there is no GPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # TrainingArguments would fill in both by itself; here they are what the user asked for.
        asked = self.do_eval, self.metric_for_best_model
        try:
            super().__post_init__()
        # Values that are none, that do not go together, or need a package that is not there.
        except (ValueError, ImportError) as error:
            raise InputError(" ".join(str(error).split())) from error
        self.do_eval, self.metric_for_best_model = asked
        check_optimizer(self)

    @property
    def splits(self) -> list[str]:
        """What the run reads, of "train", "dev" and "test"."""
        needed = {"train": self.do_train, "dev": self.do_train or self.do_eval, "test": self.do_predict}
        return [split for split, reads in needed.items() if reads]
