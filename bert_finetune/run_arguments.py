"""transformers' `TrainingArguments` with this project's defaults."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from bert_finetune.arguments import RunOptions


@dataclass
class RunArguments(RunOptions, TrainingArguments):
    """All options of a training run: those of `RunOptions`, and the rest of `TrainingArguments`."""

    def __post_init__(self):
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
        for option, value in (
            ("train_batch_size", self.per_device_train_batch_size),
            ("eval_batch_size", self.per_device_eval_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"--{option} {value}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: must be from 0 to 4294967295")
        if self.hub_token is not None:
            raise ValueError("--hub_token: the command is kept beside the model, for all to read; set HF_TOKEN instead")
        if self.hub_strategy != "end":
            raise ValueError(f"--hub_strategy {self.hub_strategy}: only the finished folder is sent; leave it out")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub: under which name? Give --hub_model_id")
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = torch.cuda.is_available()
        # Without it, TrainingArguments refuses --bf16 where there is no GPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # TrainingArguments would fill in both by itself; here they are what the user asked for.
        asked = self.do_eval, self.metric_for_best_model
        super().__post_init__()
        self.do_eval, self.metric_for_best_model = asked

    @property
    def splits(self) -> list[str]:
        """What the run reads, of "train", "dev" and "test"."""
        needed = {"train": self.do_train, "dev": self.do_train or self.do_eval, "test": self.do_predict}
        return [split for split, reads in needed.items() if reads]
